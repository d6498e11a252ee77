"""One packed forward pass: prompts and frames in, one hidden state per prompt out.

Tower and language model are transformers' own modules; only what stands around them is ours:
sequences lie behind each other in one row, and no padding exists anywhere.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from qvl_batch.errors import EmbedFailedError, UnitError
from qvl_batch.model.packing import pack
from qvl_batch.model.patches import patch_rows
from qvl_batch.model.positions import mrope_positions
from qvl_batch.model.prompt import PromptIds
from qvl_batch.units import Vision


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """A prompt with its frames, in the order of its spans (videos, then images)."""

    prompt: PromptIds
    visions: tuple[Vision, ...]
    uri: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids)


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the tower makes of frames: one row per language-model token.

    ``embeds`` has shape (tokens, hidden); ``deepstack`` holds one such tensor for each of the
    first language-model layers.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]


class PackedModel:
    """Runs packed prompts through one model, within what the device's memory holds.

    Args:
        model: From ``load_checkpoint``.
        batch_tokens: Tokens of one forward pass; halved for good when memory runs out.
        hard_limit_tokens: Treat a longer forward pass as out of memory: for a device that is
            shared, or to try the behaviour.
    """

    def __init__(
        self, model: PreTrainedModel, *, batch_tokens: int, hard_limit_tokens: int | None = None
    ) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.hard_limit_tokens = hard_limit_tokens
        self.device = model.device
        self.dtype = model.dtype

    def last_states(
        self, prompts: Sequence[PackedPrompt]
    ) -> tuple[torch.Tensor, dict[int, UnitError]]:
        """Return the final-norm hidden state at each prompt's last token.

        Returns:
            Shape (prompts, hidden) in the model's dtype, on the device; and by index the prompts
            that do not fit into memory even alone (their rows are 0).
        """
        hidden = self.model.config.text_config.hidden_size
        states = torch.zeros(len(prompts), hidden, dtype=self.dtype, device=self.device)
        failures: dict[int, UnitError] = {}
        waiting = list(range(len(prompts)))
        while waiting:
            packs = pack([prompts[i].num_tokens for i in waiting], self.batch_tokens)
            done = 0
            for chosen in packs:
                indices = [waiting[i] for i in chosen]
                result = self._try([prompts[i] for i in indices])
                if result is None and len(indices) > 1:
                    # Smaller from here on: the next pack would most likely fail as well.
                    tokens = sum(prompts[i].num_tokens for i in indices)
                    self.batch_tokens = max(1, min(self.batch_tokens, tokens) // 2)
                    break
                if result is None:
                    failures[indices[0]] = self._too_large(prompts[indices[0]])
                else:
                    states[indices] = result
                done += len(indices)
            waiting = waiting[done:]
        return states, failures

    def _too_large(self, prompt: PackedPrompt) -> UnitError:
        limit = f", the limit is {self.hard_limit_tokens}" if self.hard_limit_tokens else ""
        return EmbedFailedError(
            prompt.uri,
            f"{prompt.num_tokens} tokens do not fit into the memory of {self.device} even alone"
            f"{limit}: lower the pixel or frame budgets, or use a device with more memory",
        )

    def _try(self, prompts: Sequence[PackedPrompt]) -> torch.Tensor | None:
        """Return the last states, or None if memory ran out."""
        try:
            if self.hard_limit_tokens and (
                sum(prompt.num_tokens for prompt in prompts) > self.hard_limit_tokens
            ):
                raise torch.OutOfMemoryError("hard_limit_tokens")
            return self._forward(prompts)
        except torch.OutOfMemoryError:
            pass
        except RuntimeError as error:
            # How the CPU allocator says it.
            if "can't allocate memory" not in str(error):
                raise
        # Outside the handlers, whose traceback would keep the failed pass's tensors alive.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def vision_features(self, visions: Sequence[Vision]) -> VisionFeatures:
        """Return the tower's features of images and videos, behind each other in their order."""
        rows = torch.cat([patch_rows(v.pixels, self.device, self.dtype) for v in visions])
        grids = torch.tensor([v.grid for v in visions], dtype=torch.int64, device=self.device)
        out = self.model.visual(rows, grid_thw=grids, return_dict=True)
        return VisionFeatures(out.pooler_output, tuple(out.deepstack_features))

    @torch.inference_mode()
    def _forward(self, prompts: Sequence[PackedPrompt]) -> torch.Tensor:
        lengths = [prompt.num_tokens for prompt in prompts]
        starts = [0, *itertools.accumulate(lengths)]
        ids = torch.from_numpy(np.concatenate([p.prompt.ids for p in prompts])).to(self.device)
        positions = torch.from_numpy(
            np.concatenate([mrope_positions(p.num_tokens, p.prompt.spans) for p in prompts], axis=1)
        ).to(self.device)
        embeds = self.model.get_input_embeddings()(ids)
        visions = [vision for prompt in prompts for vision in prompt.visions]
        mask, deepstack = None, None
        if visions:
            features = self.vision_features(visions)
            mask_cpu = torch.zeros(starts[-1], dtype=torch.bool)
            for start, prompt in zip(starts, prompts, strict=False):
                for span in prompt.prompt.spans:
                    mask_cpu[start + span.start : start + span.end] = True
            mask = mask_cpu.to(self.device)
            embeds[mask] = features.embeds.to(embeds.dtype)
            deepstack = list(features.deepstack)
            mask = mask.unsqueeze(0)
        out = self.model.language_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(1),
            attention_mask=None,
            use_cache=False,
            visual_pos_masks=mask,
            deepstack_visual_embeds=deepstack,
            cu_seq_lens_q=torch.tensor(starts, dtype=torch.int32, device=self.device),
            max_length_q=max(lengths),
        )
        last = torch.tensor([edge - 1 for edge in starts[1:]], device=self.device)
        return out.last_hidden_state[0].index_select(0, last)
