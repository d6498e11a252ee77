"""Packed forward passes: prompts and frames in, one hidden state per prompt out.

Sequences lie behind each other in one row, and no padding exists anywhere. What does not fit into
the device's memory is done in smaller passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from qvl_batch.budget import MERGE
from qvl_batch.errors import EmbedFailedError, UnitError
from qvl_batch.model.attention import kernel_name
from qvl_batch.model.decoder import PackedDecoder, PackedRow, Prefix
from qvl_batch.model.memory import CPU_TOKENS, attempt, free_memory, tokens_that_fit
from qvl_batch.model.packing import pack
from qvl_batch.model.positions import mrope_positions
from qvl_batch.model.prompt import PromptIds, Span
from qvl_batch.model.tower import VisionFeatures, VisionTower, join_features
from qvl_batch.units import Vision

log = logging.getLogger(__name__)

Result = TypeVar("Result")
FeatureSource = Callable[[Sequence[Vision]], list[VisionFeatures]]

# A prefix token costs a pass its keys and values in one layer at a time, about a sixteenth of what
# a computed token costs; counted double, since the copies behind each other come on top.
_PREFIX_SHARE = 8


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """A prompt with the frames of its spans, in their order (videos, then images).

    With a ``prefix`` its first tokens are done: only the rest is computed, and ``visions`` are
    those of the rest.
    """

    prompt: PromptIds
    visions: tuple[Vision, ...]
    uri: str = ""
    prefix: Prefix | None = None

    @property
    def first(self) -> int:
        """The first token to compute."""
        return self.prefix.num_tokens if self.prefix is not None else 0

    @property
    def num_tokens(self) -> int:
        """The tokens to compute."""
        return len(self.prompt.ids) - self.first

    @property
    def cost_tokens(self) -> int:
        """What the prompt takes of a pass's token budget."""
        return self.num_tokens + self.first // _PREFIX_SHARE

    @property
    def spans(self) -> list[Span]:
        """The vision tokens to compute, counted from ``first``."""
        return [
            Span(span.start - self.first, span.rows, span.columns)
            for span in self.prompt.spans
            if span.start >= self.first
        ]


class PackedModel:
    """Runs packed prompts through one model, within what the device's memory holds.

    Args:
        model: From ``load_checkpoint``.
        batch_tokens: Language-model tokens of one forward pass; halved for good when memory runs
            out. ``auto``: on CUDA what the free memory is enough for, on a CPU a fixed number.
        hard_limit_tokens: Treat a longer forward pass as out of memory: for a device that is
            shared, or to try the behaviour. The tower's passes are bounded by 4 patches a token.
        prefixes: Whether prefixes are kept as well, so that ``auto`` leaves room for them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_tokens: int | Literal["auto"] = "auto",
        hard_limit_tokens: int | None = None,
        prefixes: bool = False,
    ) -> None:
        self.model = model
        self.device = model.device
        if batch_tokens == "auto":
            batch_tokens = self._tokens_that_fit(prefixes)
        self.batch_tokens = batch_tokens
        self.hard_limit_tokens = hard_limit_tokens
        self.tower = VisionTower(
            model.visual,
            max_patches=MERGE * MERGE * batch_tokens,
            hard_limit_patches=MERGE * MERGE * hard_limit_tokens if hard_limit_tokens else None,
        )
        self._decoder = PackedDecoder(model.language_model)
        log.info(
            "%s on %s in %s: attention by %s, %d tokens a pass",
            model.name_or_path,
            self.device,
            str(self.dtype).removeprefix("torch."),
            kernel_name(self.device, self.dtype),
            batch_tokens,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.dtype

    def _tokens_that_fit(self, prefixes: bool) -> int:
        if self.device.type != "cuda":
            return CPU_TOKENS
        return tokens_that_fit(
            self.model.config, self.dtype.itemsize, free_memory(self.device), prefixes=prefixes
        )

    def last_states(
        self, prompts: Sequence[PackedPrompt], features: FeatureSource | None = None
    ) -> tuple[torch.Tensor, dict[int, UnitError]]:
        """Return the final-norm hidden state at each prompt's last token.

        Args:
            prompts: What to compute.
            features: Where the features of frames come from; the tower, if not given.

        Returns:
            Shape (prompts, hidden) in the model's dtype, on the device; and by index the prompts
            that do not fit into memory even alone (their rows are 0).
        """
        hidden = self.model.config.text_config.hidden_size
        states = torch.zeros(len(prompts), hidden, dtype=self.dtype, device=self.device)
        failures: dict[int, UnitError] = {}
        waiting = list(range(len(prompts)))
        while waiting:
            packs = pack([prompts[i].cost_tokens for i in waiting], self.batch_tokens)
            done = 0
            for chosen in packs:
                indices = [waiting[i] for i in chosen]
                row = [prompts[i] for i in indices]
                result = self._try(self._decoder.last_states, row, features)
                if result is None and len(indices) > 1:
                    # Smaller from here on: the next pack would most likely fail as well.
                    tokens = sum(prompt.cost_tokens for prompt in row)
                    self.batch_tokens = max(1, min(self.batch_tokens, tokens) // 2)
                    break
                if result is None:
                    failures[indices[0]] = self._too_large(row[0])
                else:
                    states[indices] = result
                done += len(indices)
            waiting = waiting[done:]
        return states, failures

    def prefixes(
        self, prompts: Sequence[PackedPrompt], features: FeatureSource | None = None
    ) -> list[Prefix | None]:
        """Return the keys and values of whole prompts, to be the prefixes of longer ones.

        None stands for a prompt whose pass did not fit into memory; longer prompts must then be
        computed as a whole, by which they find the size that fits.
        """
        found: list[Prefix | None] = []
        for chosen in pack([prompt.num_tokens for prompt in prompts], self.batch_tokens):
            row = [prompts[i] for i in chosen]
            found += self._try(self._decoder.prefixes, row, features) or [None] * len(row)
        return found

    def _too_large(self, prompt: PackedPrompt) -> UnitError:
        limit = f", the limit is {self.hard_limit_tokens}" if self.hard_limit_tokens else ""
        return EmbedFailedError(
            prompt.uri,
            f"{len(prompt.prompt.ids)} tokens do not fit into the memory of {self.device} even "
            f"alone{limit}: lower the pixel or frame budgets, or use a device with more memory",
        )

    def _try(
        self,
        compute: Callable[[PackedRow], Result],
        prompts: Sequence[PackedPrompt],
        features: FeatureSource | None,
    ) -> Result | None:
        """Return what the decoder computes of the prompts, or None if memory ran out."""
        tokens = sum(prompt.cost_tokens for prompt in prompts)
        if self.hard_limit_tokens and tokens > self.hard_limit_tokens:
            return None
        return attempt(lambda: self._forward(compute, prompts, features), self.device)

    @torch.inference_mode()
    def _forward(
        self,
        compute: Callable[[PackedRow], Result],
        prompts: Sequence[PackedPrompt],
        features: FeatureSource | None,
    ) -> Result:
        ids = np.concatenate([prompt.prompt.ids[prompt.first :] for prompt in prompts])
        positions = np.concatenate([_positions(prompt) for prompt in prompts], axis=1)
        embeds = self.model.get_input_embeddings()(torch.from_numpy(ids).to(self.device))
        visions = [vision for prompt in prompts for vision in prompt.visions]
        index, deepstack = None, ()
        if visions:
            found = join_features((features or self.tower.features)(visions))
            index = torch.from_numpy(_visual_index(prompts)).to(self.device)
            embeds.index_copy_(0, index, found.embeds.to(embeds.dtype))
            deepstack = found.deepstack
        return compute(
            PackedRow(
                embeds=embeds,
                positions=torch.from_numpy(positions).to(self.device),
                lengths=[prompt.num_tokens for prompt in prompts],
                prefixes=[prompt.prefix for prompt in prompts],
                visual_index=index,
                deepstack=deepstack,
            )
        )


def _positions(prompt: PackedPrompt) -> np.ndarray:
    whole = mrope_positions(len(prompt.prompt.ids), prompt.prompt.spans)
    return whole[:, prompt.first :]


def _visual_index(prompts: Sequence[PackedPrompt]) -> np.ndarray:
    """Return where the vision tokens of a row stand, in the order of their features."""
    parts, start = [], 0
    for prompt in prompts:
        parts += [np.arange(start + span.start, start + span.end) for span in prompt.spans]
        start += prompt.num_tokens
    return np.concatenate(parts)
