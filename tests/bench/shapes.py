"""Models to measure: the true architecture in a stated size, with random weights.

``small`` is written to a folder, so that everybody loads it the ordinary way. ``2b`` has the exact
shape of Qwen3-VL-Embedding-2B; its weights are drawn on the device and never touch a disk.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvl_batch.demo.checkpoint import embedding_dir, reranker_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 20_260_102
# Qwen3-VL's ChatML as far as texts and stills need it; the demo's checkpoint has no template.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of one Qwen3-VL model; ``note`` says what is not as in the model it stands for."""

    name: str
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    vision_hidden: int
    vision_inter: int
    vision_depth: int
    vision_heads: int
    deepstack: tuple[int, ...]
    vocab: int
    num_positions: int
    theta: float
    note: str = ""

    def shrunk(self) -> Shape:
        """Return the shape with a quarter of every width and 3 layers, to run its code anywhere."""
        return replace(
            self,
            hidden=self.hidden // 4,
            inter=self.inter // 4,
            layers=3,
            heads=self.heads // 4,
            kv_heads=self.kv_heads // 4,
            vision_hidden=self.vision_hidden // 4,
            vision_inter=self.vision_inter // 4,
            vision_depth=3,
            vision_heads=self.vision_heads // 4,
            deepstack=(0, 1, 2),
            vocab=2048,
            note=f"DRY RUN, not {self.name}: a quarter of every width, 3 of {self.layers} layers "
            f"and 3 of {self.vision_depth} in the tower, 2,048 tokens in the vocabulary",
        )


# Language model, tower and mergers share the parameters about as in the 2B model
# (1.41 : 0.31 : 0.10), as far as such small widths allow. Heads have the 2B model's size: attention
# over many small heads would cost far more than it does there.
SMALL = Shape(
    name="small",
    hidden=256,
    inter=768,
    layers=8,
    heads=2,
    kv_heads=1,
    head_dim=128,
    mrope_section=(24, 20, 20),
    vision_hidden=128,
    vision_inter=512,
    vision_depth=6,
    vision_heads=2,
    deepstack=(1, 2, 4),
    vocab=1024,
    num_positions=2304,
    theta=5e6,
    note="random weights, scaled to a CPU",
)
# config.json of Qwen3-VL-Embedding-2B.
TWO_B = Shape(
    name="2b",
    hidden=2048,
    inter=6144,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    mrope_section=(24, 20, 20),
    vision_hidden=1024,
    vision_inter=4096,
    vision_depth=24,
    vision_heads=16,
    deepstack=(5, 11, 17),
    vocab=151_936,
    num_positions=2304,
    theta=5e6,
    note="exact shape of Qwen3-VL-Embedding-2B, random weights drawn on the device",
)
SHAPES = {shape.name: shape for shape in (SMALL, TWO_B)}


def config_json(shape: Shape) -> dict[str, Any]:
    """Return config.json of a shape; token ids are those of the demo's tokenizer."""
    demo = json.loads((embedding_dir() / "config.json").read_text())
    ids = {key: value for key, value in demo.items() if key.endswith("token_id")}
    text = {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inter,
        "max_position_embeddings": 262_144,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": list(shape.mrope_section),
            "rope_theta": shape.theta,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "vocab_size": shape.vocab,
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "deepstack_visual_indexes": list(shape.deepstack),
        "depth": shape.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": shape.vision_inter,
        "num_heads": shape.vision_heads,
        "num_position_embeddings": shape.num_positions,
        "out_hidden_size": shape.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
        **ids,
    }


def write_folder(folder: Path, shape: Shape, *, reranker: bool = False) -> Path:
    """Write everything of a checkpoint but its weights, peers' files included."""
    source = reranker_dir() if reranker else embedding_dir()
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(source / name, folder / name)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.strip())
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=2))
    return folder


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return transformers' own model, unchanged, with random weights made on the device."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(SEED)
    with torch.device(device):
        model = Qwen3VLModel._from_config(
            Qwen3VLConfig(**config_json(shape)), dtype=dtype, attn_implementation="sdpa"
        )
    model.config.use_cache = model.config.text_config.use_cache = False
    return model.to(device).eval().requires_grad_(False)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's weights under the names that checkpoints on the hub use."""
    from safetensors.torch import save_file

    weights = {f"model.{name}": weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model on the same weights, whose configuration can be changed."""
    memo = {id(weight): weight for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def packed_form(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as ``load_checkpoint`` would return it, on the same weights."""
    from qvl_batch.model.load import prepare_model

    return prepare_model(sharing(model))
