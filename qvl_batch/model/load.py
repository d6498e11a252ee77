"""Checkpoints: where they come from, what is refused, how they are loaded.

Only safetensors are read and no code of a checkpoint is ever run. Anything that would leave a
weight at its random initial value is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_batch.errors import ModelError
from qvl_batch.model.download import fetch_folder, fetch_from_hub
from qvl_batch.storage import Storage, is_local, local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODEL_TYPE = "qwen3_vl"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BLOCK_BYTES = 8 * 1024 * 1024
DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_model(
    path: str, revision: str | None, storage: Storage, cache_dir: str | None = None
) -> Path:
    """Return a local folder that holds the checkpoint, fetching it once per node if need be.

    Args:
        path: A local folder, a hub id (``owner/name``), or a folder on an object store.
        revision: A hub commit, tag or branch; only with a hub id.
        storage: How object stores are reached.
        cache_dir: Where object-store checkpoints are kept; default
            ``~/.cache/qvl-batch/models``. The hub keeps its own cache.

    Returns:
        A folder with config.json, tokenizer.json and safetensors of a Qwen3-VL model.

    Raises:
        ModelError: If there is none, with the remedy.
        StorageError: If the object store's scheme or package is unknown.
    """
    if not is_local(path):
        _refuse_revision(path, revision)
        folder = fetch_folder(path, storage, cache_dir)
    elif os.path.isdir(os.path.expanduser(local_path(path))):
        _refuse_revision(path, revision)
        folder = Path(local_path(path)).expanduser()
    elif _looks_like_hub_id(path):
        folder = fetch_from_hub(path, revision)
    else:
        raise ModelError(
            f"There is no model folder {path}.",
            "Give a folder with config.json and *.safetensors, a hub id such as "
            "Qwen/Qwen3-VL-Embedding-2B, or an object-store folder.",
        )
    check_folder(folder, named=path)
    return folder


def _refuse_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(
            f"model.revision is {revision!r}, but {path} is not a hub id.",
            "Remove the revision: a folder is what it is.",
        )


def _looks_like_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def check_folder(folder: Path, *, named: str | None = None) -> None:
    """Check that a folder holds a loadable checkpoint.

    Raises:
        ModelError: If config.json, the weights or tokenizer.json are missing, if there are only
            pickle weights, or if it is another kind of model.
    """
    name = named or str(folder)
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {name}.", "Check the path.")
    read_config(folder, named=name)
    if not weight_files(folder):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{name} has only pickle weights ({', '.join(pickles[:3])}); only safetensors are "
                "loaded, since a pickle can run code.",
                "Convert them to safetensors, or take a checkpoint that has them.",
            )
        raise ModelError(
            f"{name} has no weights (*.safetensors).", "Download the checkpoint's weights too."
        )
    missing = _missing_shards(folder)
    if missing:
        raise ModelError(
            f"{name} lacks {', '.join(missing[:3])}, which its index lists.",
            "Download the missing shards.",
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{name} has no tokenizer.json.", "Download the checkpoint's tokenizer.json too."
        )


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    listed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return sorted(name for name in listed if not (folder / name).is_file())


def read_config(folder: Path, *, named: str | None = None) -> dict[str, Any]:
    """Return config.json of a Qwen3-VL checkpoint.

    Raises:
        ModelError: If it is missing, is not JSON, or says another model type.
    """
    name = named or str(folder)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{name} has no config.json, so it is not a model folder.",
            "Give the folder that holds config.json and *.safetensors.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{name}: config.json is not JSON ({error}).", "Download it again."
        ) from None
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise ModelError(
            f"{name} is a model of type {found!r}, not {MODEL_TYPE!r}.",
            "Use a Qwen3-VL-Embedding or Qwen3-VL-Reranker checkpoint.",
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted by name."""
    return sorted(Path(folder).glob("*.safetensors"))


def full_dim(folder: Path) -> int:
    """Return the model's full embedding dimension, from config.json alone."""
    config = read_config(Path(folder))
    try:
        return int(config["text_config"]["hidden_size"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"{folder}: config.json states no text_config.hidden_size.", "Download it again."
        ) from None


def weights_digest(folder: Path) -> str:
    """Return what identifies a model's results: sha256 hex over its files.

    Hashed in this order, each as its name, its size in bytes and its bytes: the sorted
    ``*.safetensors``, then config.json, then tokenizer.json. The folder's own name and every other
    file are left out, so that a copy elsewhere has the same digest. Reads in 8 MiB blocks.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in [*weight_files(folder), folder / "config.json", folder / "tokenizer.json"]:
        if not path.is_file():
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def choose_device(device: str) -> torch.device:
    """Return the device to use: ``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ModelError: If CUDA is asked for and there is none.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"The device {device} is not there.", "Use model.device: cpu or auto.")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the compute type: ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}.", f"Allowed: {', '.join(DTYPES)}.")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def load_checkpoint(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load transformers' Qwen3VLModel for packed inference.

    The patch embedding is turned into a matrix product, attention is the packed one, nothing is
    cached between calls, and gradients are off. A checkpoint's ``lm_head`` is left out.

    Raises:
        ModelError: If a weight is missing, unknown or of another shape, or a file is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import Qwen3VLConfig, Qwen3VLModel

    check_folder(Path(folder))
    try:
        with _quiet_transformers():
            config = Qwen3VLConfig.from_pretrained(str(folder), local_files_only=True)
            model, report = Qwen3VLModel.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
                # So that they are in the report, which is refused below in words of our own.
                ignore_mismatched_sizes=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder} can not be loaded: {first[0]}", "Download it again.") from None
    _refuse_wrong_weights(folder, report)
    try:
        return prepare_model(model).to(device)
    except torch.OutOfMemoryError:
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        raise ModelError(
            f"The {size / 2**30:.1f} GiB of weights of {folder} do not fit into {device}'s memory.",
            "Free it from other processes, or use a larger device or a smaller model.",
        ) from None


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Change transformers' Qwen3VLModel in place for packed inference, wherever it comes from."""
    from qvl_batch.model import attention
    from qvl_batch.model.patches import LinearPatchEmbed

    attention.register()
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation = attention.PACKED_ATTENTION
        part.use_cache = False
    model.visual.patch_embed = LinearPatchEmbed(model.visual.patch_embed.proj)
    return model.eval().requires_grad_(False)


def _refuse_wrong_weights(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    unknown = sorted(key for key in report["unexpected_keys"] if not key.endswith("lm_head.weight"))
    wrong_shape = sorted(
        f"{name} is {tuple(stored)} in the file, config.json asks for {tuple(wanted)}"
        for name, stored, wanted in report["mismatched_keys"]
    )
    facts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for keys, what in (
            (missing, "missing"),
            (unknown, "unknown"),
            (wrong_shape, "of another shape"),
        )
        if keys
    ]
    if facts:
        raise ModelError(
            f"The weights of {folder} do not match its config.json: {'; '.join(facts)}.",
            "Nothing is initialised at random here: take config.json and all weights from one "
            "checkpoint.",
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load report off the terminal; we report ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_head_rows(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the given rows of the language-model head, float as stored, shape (len(ids), hidden).

    A tied head is the token embedding (2B), an untied one ``lm_head.weight`` (8B).

    Raises:
        ModelError: If the head is untied and missing, as in Qwen3-VL-Embedding-8B.
    """
    import torch
    from safetensors import safe_open

    config = read_config(Path(folder))
    tied = config.get(
        "tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)
    )
    wanted = "embed_tokens.weight" if tied else "lm_head.weight"
    for path in weight_files(Path(folder)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if key == wanted or key.endswith("." + wanted):
                    rows = file.get_slice(key)
                    return torch.cat([rows[i : i + 1] for i in ids])
    raise ModelError(
        f"{folder} has no {wanted}, whose rows for yes and no make the score.",
        "Use a Qwen3-VL-Reranker checkpoint.",
    )
