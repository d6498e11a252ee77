"""Vision features that are computed once for all prompts that need them."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qvl_batch.model.tower import VisionFeatures, VisionTower
from qvl_batch.units import Vision


@dataclass(frozen=True, slots=True)
class FrameName:
    """What frames are known by; a ``lasting`` name means the same frames in every call."""

    key: Hashable
    lasting: bool


class FeatureStore:
    """Keeps features while they will be asked for again, within a size.

    Within ``expecting`` every image and video has a name. Features that are expected more than
    once are kept until the last time; those with a lasting name afterwards as well, until others
    need the room.

    Args:
        tower: What computes features.
        max_bytes: Device memory that features may hold; what does not fit is computed anew.
    """

    def __init__(self, tower: VisionTower, max_bytes: int) -> None:
        self._tower = tower
        self._max_bytes = max_bytes
        self._names: dict[int, FrameName] = {}
        self._expected: collections.Counter[FrameName] = collections.Counter()
        # In the order of their last use.
        self._kept: collections.OrderedDict[FrameName, VisionFeatures] = collections.OrderedDict()
        self.size_bytes = 0

    @contextlib.contextmanager
    def expecting(self, uses: Iterable[tuple[Vision, FrameName]]) -> Iterator[None]:
        """Name what will be asked for, once for every use. The objects must live meanwhile."""
        for vision, name in uses:
            self._names[id(vision)] = name
            self._expected[name] += 1
        try:
            yield
        finally:
            self._names.clear()
            self._expected.clear()
            self._drop(name for name in [*self._kept] if not name.lasting)

    def used(self, visions: Iterable[Vision]) -> None:
        """Note that these have been asked for once more, and drop what nobody expects again."""
        names = [self._names[id(vision)] for vision in visions]
        self._expected.subtract(names)
        self._drop(n for n in dict.fromkeys(names) if self._expected[n] <= 0 and not n.lasting)

    def features(self, visions: Sequence[Vision]) -> list[VisionFeatures]:
        """Return the features of named visions, in their order.

        Raises:
            torch.OutOfMemoryError: If one temporal group does not fit even alone.
        """
        names = [self._names[id(vision)] for vision in visions]
        missing = {
            name: vision
            for name, vision in zip(names, visions, strict=True)
            if name not in self._kept
        }
        computed = dict(zip(missing, self._tower.features([*missing.values()]), strict=True))
        found = [computed[name] if name in computed else self._kept[name] for name in names]
        for name in dict.fromkeys(names):
            if name in self._kept:
                self._kept.move_to_end(name)
            elif name.lasting or self._expected[name] > 1:
                self._keep(name, computed[name])
        return found

    def _keep(self, name: FrameName, features: VisionFeatures) -> None:
        for old in [*self._kept]:
            if self.size_bytes + features.size_bytes <= self._max_bytes:
                break
            if self._expected[old] <= 0:
                self._drop([old])
        if self.size_bytes + features.size_bytes <= self._max_bytes:
            # A copy: what the tower gives are views that would keep a whole pass alive.
            self._kept[name] = VisionFeatures(
                features.embeds.clone(), tuple(layer.clone() for layer in features.deepstack)
            )
            self.size_bytes += features.size_bytes

    def _drop(self, names: Iterable[FrameName]) -> None:
        for name in names:
            features = self._kept.pop(name, None)
            if features is not None:
                self.size_bytes -= features.size_bytes
