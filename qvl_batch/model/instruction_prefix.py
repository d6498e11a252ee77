"""The keys and values of instructions, computed once for all units that begin with one."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qvl_batch.model.decoder import Prefix
from qvl_batch.model.forward import PackedModel, PackedPrompt
from qvl_batch.model.packing import pack
from qvl_batch.model.prompt import PromptIds

# What is kept from one call to the next, and how many tokens of different instructions are ready
# at a time: 118 MB at the 2B model's size in bfloat16.
MOST_KEPT = 8
MOST_TOKENS = 1024


class InstructionPrefixes:
    """Puts what was computed of a prompt's instruction before the prompt.

    Every instruction is known by its token ids. Those used last are kept.

    Args:
        packed: What computes them.
    """

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._kept: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()

    def groups(
        self, prompts: Sequence[PackedPrompt], num_shared: Sequence[int]
    ) -> Iterator[dict[int, PackedPrompt]]:
        """Yield the prompts by index with their prefixes, as many at a time as may be ready.

        Args:
            prompts: Without prefixes.
            num_shared: How many first tokens of each are its instruction's; 0: it is left as it is.
        """
        indices: dict[bytes, list[int]] = collections.defaultdict(list)
        for index, (prompt, shared) in enumerate(zip(prompts, num_shared, strict=True)):
            indices[prompt.prompt.ids[:shared].tobytes()].append(index)
        names = [*indices]
        for chosen in pack([len(_ids(name)) for name in names], MOST_TOKENS):
            ready = self._ready([names[i] for i in chosen])
            yield {
                index: dataclasses.replace(prompts[index], prefix=ready.get(names[i]))
                for i in chosen
                for index in indices[names[i]]
            }

    def _ready(self, names: Sequence[bytes]) -> dict[bytes, Prefix]:
        """Return the prefixes; without those that did not fit into memory."""
        missing = [name for name in names if name and name not in self._kept]
        prompts = [PackedPrompt(PromptIds(_ids(name), (), len(_ids(name))), ()) for name in missing]
        for name, prefix in zip(missing, self._packed.prefixes(prompts), strict=True):
            if prefix is not None:
                self._kept[name] = _alone(prefix)
        ready = {name: self._kept[name] for name in names if name in self._kept}
        for name in ready:
            self._kept.move_to_end(name)
        while len(self._kept) > MOST_KEPT or self.num_tokens > MOST_TOKENS:
            self._kept.popitem(last=False)
        return ready

    @property
    def num_tokens(self) -> int:
        """The tokens whose keys and values are kept."""
        return sum(prefix.num_tokens for prefix in self._kept.values())


def _ids(name: bytes) -> np.ndarray:
    return np.frombuffer(name, np.int64)


def _alone(prefix: Prefix) -> Prefix:
    """Return a copy: what the decoder gives are views that would keep a whole pass alive."""
    layers = tuple((keys.clone(), values.clone()) for keys, values in prefix.layers)
    return Prefix(prefix.num_tokens, layers)
