"""The peers: the official algorithm in plain transformers, and sentence-transformers.

Both use transformers' own model, tokenizer and image processor. transformers' processor of
Qwen3-VL asks for torchvision because of its videos alone; ``StillsProcessor`` is the same class
without its video part, so that torchvision is not needed (its wheels do not import next to a CPU
build of torch). Which image processor transformers then chooses (Pillow's or torchvision's) is
printed in the table.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from tests.bench.beds import Bed
from tests.bench.inputs import MAX_PX, MIN_PX, Item, load_rgb, resized

MAX_TOKENS = 8192


class Peer(Protocol):
    """What is measured of a peer; ``model`` is what it calls, ``processor`` transformers' one."""

    model: torch.nn.Module
    processor: StillsProcessor

    def embed(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Return normalised vectors, shape (n, hidden)."""
        ...


class StillsProcessor(Qwen3VLProcessor):
    """transformers' Qwen3-VL processor for texts and stills."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        for name in ("image", "video", "vision_start", "vision_end"):
            word = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
            setattr(self, f"{name}_token", word)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(word))
        # Not Qwen3VLProcessor's own, which demands a video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def stills_processor(folder: Path) -> StillsProcessor:
    """Return the processor of a folder, as ``AutoProcessor`` makes it."""
    AutoProcessor.register(Qwen3VLConfig, StillsProcessor, exist_ok=True)
    _name_processor(folder)
    # One of its parts warns of an argument that another part of transformers passes to it.
    warnings.filterwarnings("ignore", message="Passing `min_pixels` and `max_pixels`")
    return AutoProcessor.from_pretrained(folder, min_pixels=MIN_PX, max_pixels=MAX_PX)


def _name_processor(folder: Path) -> None:
    """Make a folder's files ask for ``StillsProcessor``."""
    for name in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["processor_class"] = StillsProcessor.__name__
        content.pop("video_processor", None)
        (folder / name).write_text(json.dumps(content))


class PlainTransformers:
    """The official embedder's steps, written in plain transformers code.

    Batches in order of arrival; pictures resized by Pillow, prompts by the chat template, right
    padding, the state at the last unmasked position, normalised.
    """

    def __init__(self, bed: Bed, batch: int = 8) -> None:
        self.model = bed.plain
        self.processor = stills_processor(bed.folder)
        self.processor.tokenizer.padding_side = "right"
        self._batch = batch

    def embed(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Return normalised vectors, shape (n, hidden)."""
        batches = [
            items[start : start + self._batch] for start in range(0, len(items), self._batch)
        ]
        return torch.cat([self._embed_batch(batch) for batch in batches]).float().cpu().numpy()

    @torch.inference_mode()
    def _embed_batch(self, items: Sequence[Item]) -> torch.Tensor:
        pictures = [Image.fromarray(resized(item.picture)) for item in items if item.picture]
        prompts = [
            self.processor.apply_chat_template(
                [_turn("system", DEFAULT_INSTRUCTION), _user_turn(item)],
                add_generation_prompt=True,
                tokenize=False,
            )
            for item in items
        ]
        fed = self.processor(
            text=prompts,
            images=pictures or None,
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            do_resize=False,
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(**fed, use_cache=False).last_hidden_state
        last = fed["attention_mask"].sum(dim=1) - 1
        pooled = states[torch.arange(len(items), device=states.device), last]
        # In float32: normalised in bfloat16, norms are off by 0.4 %.
        return torch.nn.functional.normalize(pooled.float(), dim=1)


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _user_turn(item: Item) -> dict[str, Any]:
    if item.picture:
        return {"role": "user", "content": [{"type": "image"}]}
    return _turn("user", item.text or "")


class SentenceTransformersPeer:
    """sentence-transformers' ``encode``, with the settings that make it comparable.

    The default instruction is its ``prompt``, and its pixel limits are the official ones. Its
    results differ from the official ones a little by its own resize (within 1e-3 on photos).

    Args:
        bed: The model.
        scratch: Where its own files go.
        batch: Its ``batch_size``.
        paths: Hand over pictures as paths instead of open ones.

    Raises:
        ImportError: If sentence-transformers is not there.
    """

    def __init__(self, bed: Bed, scratch: Path, batch: int = 8, *, paths: bool = False) -> None:
        from sentence_transformers import SentenceTransformer

        self._batch, self._paths = batch, paths
        stills_processor(bed.folder)
        folder = Path(shutil.copytree(bed.folder, scratch / f"peer-{batch}-{paths}"))
        _write_modules(folder, bed.shape.hidden)
        if not bed.on_disk:
            # Loaded on a small model, whose place the model in memory then takes.
            shutil.copy(embedding_dir() / "config.json", folder)
            shutil.copy(embedding_dir() / "model.safetensors", folder)
        transformers.utils.logging.disable_progress_bar()
        self._whole = SentenceTransformer(
            str(folder),
            device=str(bed.device),
            local_files_only=True,
            model_kwargs={"dtype": bed.plain.dtype, "attn_implementation": "sdpa"},
            processor_kwargs={"min_pixels": MIN_PX, "max_pixels": MAX_PX},
        )
        if not bed.on_disk:
            self._whole[0].model = bed.plain
        self.model = self._whole[0].model
        self.processor = self._whole[0].processor

    def embed(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Return normalised vectors, shape (n, hidden)."""
        inputs = [self._picture(item.picture) if item.picture else item.text for item in items]
        vectors = self._whole.encode(
            inputs,
            prompt=DEFAULT_INSTRUCTION,
            batch_size=self._batch,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.asarray(vectors, np.float32)

    def _picture(self, path: Path) -> Any:
        return {"image": str(path)} if self._paths else load_rgb(path)


def _write_modules(folder: Path, dim: int) -> None:
    """Write the files by which sentence-transformers reads at the last token and normalises."""
    package = "sentence_transformers"
    modules = [
        ("", f"{package}.base.modules.transformer.Transformer"),
        ("1_Pooling", f"{package}.sentence_transformer.modules.pooling.Pooling"),
        ("2_Normalize", f"{package}.base.modules.normalize.Normalize"),
    ]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(modules)
    ]
    way = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": way,
            "image": way,
            "message": {**way, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    pooling = {"embedding_dimension": dim, "pooling_mode": "lasttoken", "include_prompt": True}
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", listed),
        ("sentence_bert_config.json", transformer),
        ("1_Pooling/config.json", pooling),
    ):
        (folder / name).write_text(json.dumps(content))
