"""What a source holds and a manifest does not: counted, and written down one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from qvl_batch.media.objects import MediaObject

EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that the source holds and that will not be embedded."""

    uri: str
    reason: str


class LeftOutLog:
    """Counts what is left out and writes each down; memory holds the counts and 20 examples."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[tuple[str, str]] = []
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> LeftOutLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, item: LeftOut) -> None:
        self.counts[item.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((item.uri, item.reason))
        line = json.dumps({"uri": item.uri, "reason": item.reason}, ensure_ascii=False)
        self._file.write(line + "\n")

    def keep_others(self, found: Iterable[MediaObject | LeftOut]) -> Iterator[MediaObject]:
        for item in found:
            if isinstance(item, LeftOut):
                self.add(item)
            else:
                yield item

    def summary(self) -> str:
        return "; ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
