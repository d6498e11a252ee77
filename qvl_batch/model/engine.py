"""The embedding engine: prompts to encoded vectors, each input on its own terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from qvl_batch.errors import BadVectorError, ModelError, UnitError
from qvl_batch.model.attention import kernel_name, takes_prefix
from qvl_batch.model.encode import encode, is_bad, truncate
from qvl_batch.model.forward import PackedModel, PackedPrompt
from qvl_batch.model.instruction_prefix import InstructionPrefixes
from qvl_batch.model.load import choose_device, choose_dtype, full_dim, load_checkpoint
from qvl_batch.model.prompt import PromptIds, PromptTokenizer
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.units import Embedded, EmbedInput

# Attention behind a prefix needs a mask on a CPU, with which the upper half is computed too: 1.1
# times the attention of the whole prompt for 300 tokens behind 15, 1.6 times for 700, more than the
# prefix saves of a long prompt.
_LONGEST_SHARING = 256

# Stands for a prompt that could not be made, so that indices stay those of the inputs.
_NO_PROMPT = PromptIds(np.zeros(0, np.int64), (), 0)


class EmbedEngine:
    """Turns inputs into encoded vectors; implements ``units.Engine``.

    Args:
        folder: A checkpoint folder.
        dim: Dimensions to keep of the model's full one.
        encodings: Any of ``float32, float16, int8, binary``.
        instruction: The system turn of inputs without an own instruction.
        max_tokens: The context.
        token_layout: ``unnested`` or ``nested``.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16``,
            ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_tokens: Language-model tokens of one forward pass, with 4 patches each in the vision
            tower; ``auto``: by the device's free memory.
        threads: Torch's CPU threads in this process; None leaves them.
        hard_limit_tokens: Treat longer forward passes as out of memory.
        reuse_prefix: Compute an instruction once, not in every prompt that begins with it.
        model: From ``prepare_model``, with its own device and type: the folder's weights are not
            read, and need not be there.

    Raises:
        ModelError: If the checkpoint can not be used or is smaller than ``dim``.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dim: int | None = None,
        encodings: Sequence[str] = ("float32",),
        instruction: str = DEFAULT_INSTRUCTION,
        max_tokens: int = 8192,
        token_layout: str = "unnested",
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        threads: int | None = None,
        hard_limit_tokens: int | None = None,
        reuse_prefix: bool = True,
        model: PreTrainedModel | None = None,
    ) -> None:
        folder = Path(folder)
        self.full_dim = full_dim(folder)
        self.dim = self.full_dim if dim is None else dim
        if self.dim > self.full_dim:
            raise ModelError(
                f"recipe.dim is {self.dim}, but the model {folder} has {self.full_dim} dimensions.",
                f"Lower recipe.dim to {self.full_dim} or less.",
            )
        if threads:
            torch.set_num_threads(threads)
        self.encodings = tuple(encodings)
        self.tokenizer = PromptTokenizer(
            folder,
            default_instruction=instruction,
            max_tokens=max_tokens,
            token_layout=token_layout,
        )
        self.tokenizer.require_endoftext()
        if model is None:
            chosen = choose_device(device)
            model = load_checkpoint(folder, dtype=choose_dtype(dtype, chosen), device=chosen)
        self._packed = PackedModel(
            model, batch_tokens=batch_tokens, hard_limit_tokens=hard_limit_tokens
        )
        self.reuse_prefix = reuse_prefix and takes_prefix(model.device, model.dtype)
        self._prefixes = InstructionPrefixes(self._packed)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass; smaller than asked for once memory ran out."""
        return self._packed.batch_tokens

    @property
    def attention_kernel(self) -> str:
        """What computes attention here, for logs and reports."""
        return kernel_name(self._packed.device, self._packed.dtype)

    def embed(self, inputs: list[EmbedInput]) -> Embedded:
        """Embed every input; failures are stated by index and harm no other input."""
        states, prompts, failures = self._states(inputs)
        for index in torch.nonzero(is_bad(states, self.dim)).flatten().tolist():
            failures.setdefault(index, _bad_vector(inputs[index], states[index], self.dim))
        return Embedded(
            columns=encode(states, self.dim, self.encodings),
            num_tokens=np.array([len(prompt.ids) for prompt in prompts], np.int32),
            truncated=np.array([prompt.truncated for prompt in prompts], np.bool_),
            failures=failures,
        )

    def embed_vectors(self, inputs: list[EmbedInput]) -> npt.NDArray[np.float32]:
        """Return the full vectors, normalised in float32, shape (n, full dimension).

        Raises:
            UnitError: The first failure, if any input fails.
        """
        states, _, failures = self._states(inputs)
        for index in torch.nonzero(is_bad(states, self.full_dim)).flatten().tolist():
            failures.setdefault(index, _bad_vector(inputs[index], states[index], self.full_dim))
        if failures:
            raise failures[min(failures)]
        return truncate(states, self.full_dim).cpu().numpy()

    def _states(
        self, inputs: list[EmbedInput]
    ) -> tuple[torch.Tensor, list[PromptIds], dict[int, UnitError]]:
        prompts, failures = [], {}
        for index, unit in enumerate(inputs):
            try:
                prompts.append(self.tokenizer.encode(unit))
            except UnitError as error:
                prompts.append(_NO_PROMPT)
                failures[index] = error
        usable = [index for index in range(len(inputs)) if index not in failures]
        whole = [
            PackedPrompt(prompts[i], (*inputs[i].videos, *inputs[i].images), inputs[i].uri)
            for i in usable
        ]
        packed = self._packed
        states = torch.zeros(len(inputs), self.full_dim, dtype=packed.dtype, device=packed.device)
        for group in self._prefixes.groups(whole, [self._num_shared(prompts[i]) for i in usable]):
            found, too_large = packed.last_states([*group.values()])
            indices = [usable[place] for place in group]
            states[indices] = found
            failures |= {indices[place]: error for place, error in too_large.items()}
        return states, prompts, failures

    def _num_shared(self, prompt: PromptIds) -> int:
        """Return how many first tokens are computed once for all, by the prompt alone."""
        if not self.reuse_prefix:
            return 0
        shared = self.tokenizer.num_instruction_tokens(prompt)
        rest = len(prompt.ids) - shared
        return shared if rest < max(_LONGEST_SHARING, 2 * shared) else 0


def _bad_vector(unit: EmbedInput, state: torch.Tensor, dim: int) -> BadVectorError:
    head = state[:dim].float()
    bad = int((~torch.isfinite(head)).sum())
    what = f"{bad} of {dim} values are NaN or Inf" if bad else f"norm is {head.norm().item():.3g}"
    return BadVectorError(unit.uri, f"the vector is not usable: {what}")
