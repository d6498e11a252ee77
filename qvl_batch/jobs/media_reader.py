"""Fetch, verify and decode media that are asked for by address: of queries and of found rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qvl_batch import budget
from qvl_batch.errors import CorruptMediaError, UnitError
from qvl_batch.jobs.parts import Part
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, FetchLimits, FetchRequest, Source
from qvl_batch.recipe import Recipe, RerankRecipe
from qvl_batch.storage import Storage
from qvl_batch.units import Kind, PartPlan

CountTokens = Callable[..., int]

# Only wanted pages are decoded, so the length of a document is no matter here.
_ANY_LENGTH = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedMedium:
    """A medium to be read: which of its segments (None: all of them), for which prompt."""

    request: FetchRequest
    kind: Kind
    segments: frozenset[int] | None = None
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReadMedia:
    """How media are read: pickles to the actors.

    Args:
        recipe: The budgets and the segmentation.
        resize: Import path of the frame resize, called in the decoding process.
        load_counter: Gives the function that counts a prompt's tokens, to which videos are fitted;
            None: nothing is fitted or refused, as the official reranker has it.
    """

    storage: Storage
    recipe: Recipe | RerankRecipe
    fetch_limits: FetchLimits
    decode_limits: DecodeLimits
    resize: str
    load_counter: Callable[[], CountTokens] | None = None

    def open(self) -> MediaReader:
        return MediaReader(self)


class MediaReader:
    """A `ReadMedia` at work: owns the decoding process and the connections."""

    def __init__(self, setup: ReadMedia) -> None:
        budgets = dataclasses.replace(setup.recipe.document, max_pages=_ANY_LENGTH)
        self._recipe = dataclasses.replace(setup.recipe, document=budgets)
        self._fetcher = Fetcher(setup.storage, setup.fetch_limits)
        self._decoder = Decoder(setup.decode_limits, setup.resize)
        self._count = setup.load_counter() if setup.load_counter is not None else None
        self.num_fetched = 0

    def close(self) -> None:
        self._decoder.close()

    def read_all(self, wanted: Sequence[WantedMedium]) -> Iterator[list[Part] | UnitError]:
        """Yield the parts of each medium, in the order given, or why there are none."""
        sources = self._fetcher.fetch_all(one.request for one in wanted)
        for one, source in zip(wanted, sources, strict=True):
            if isinstance(source, UnitError):
                yield source
                continue
            self.num_fetched += 1
            with source:
                try:
                    yield self._decode(one, source)
                except UnitError as error:
                    yield error

    def _decode(self, wanted: WantedMedium, source: Source) -> list[Part]:
        uri, recipe = wanted.request.uri, self._recipe
        header = self._decoder.open(source, wanted.kind, dpi=recipe.document.dpi)
        context = budget.Context(self._counter(wanted.instruction), recipe.max_tokens)
        plans = budget.plan_unit(header, recipe, context, uri=uri)
        if wanted.segments is not None:
            lost = sorted(wanted.segments - {plan.segment for plan in plans})
            if lost:
                raise CorruptMediaError(uri, f"has {len(plans)} segment(s), row {lost[0]} is gone")
            plans = [plan for plan in plans if plan.segment in wanted.segments]
        return list(zip(plans, self._decoder.decode(plans), strict=True))

    def _counter(self, instruction: str | None) -> Callable[[PartPlan], int]:
        count = self._count
        if count is None:
            return lambda _: 0
        return lambda plan: count(instruction=instruction, plans=[plan])
