"""The reranking engine: the probability that a document answers a query."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from qvl_batch.errors import BadVectorError, UnitError
from qvl_batch.model.attention import kernel_name, takes_prefix
from qvl_batch.model.chat import DEFAULT_RERANK_INSTRUCTION
from qvl_batch.model.feature_store import FeatureStore
from qvl_batch.model.forward import FeatureSource, PackedModel, PackedPrompt
from qvl_batch.model.load import (
    check_folder,
    choose_device,
    choose_dtype,
    load_checkpoint,
    load_head_rows,
)
from qvl_batch.model.memory import feature_bytes
from qvl_batch.model.packing import pack
from qvl_batch.model.pairs import Pair, PairScore, shared_prefix
from qvl_batch.model.prompt import PromptIds, PromptTokenizer
from qvl_batch.units import EmbedInput

# A shorter prefix is not worth a pass of its own.
_LEAST_PREFIX_TOKENS = 16


@dataclass(slots=True)
class ReuseCounts:
    """What reuse has saved since the engine was made.

    ``num_visions`` counts the images and videos of all pairs, ``num_visions_encoded`` those that
    went through the tower. ``num_tokens`` counts the tokens of all pairs, ``prefix_tokens_saved``
    those that were not computed because another pair's were used.
    """

    num_pairs: int = 0
    num_visions: int = 0
    num_visions_encoded: int = 0
    num_tokens: int = 0
    prefix_tokens_saved: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Pairs by index, and how many first tokens they share (0: they are computed plainly)."""

    indices: tuple[int, ...]
    prefix_tokens: int = 0


class RerankEngine:
    """Scores query-document pairs as the official reranker does.

    The score is ``sigmoid((W[yes] - W[no]) . h)`` with the two rows of the language-model head and
    the final-norm hidden state at the last token. Pairs are packed; none changes another's score.

    Two things are done once: the vision features of a document for all queries that meet it, and
    everything up to the document for all documents of a query. Neither changes a score.

    Args:
        folder: A checkpoint folder.
        instruction: What counts as relevant; used verbatim.
        max_tokens: The context; the official cut allows 5 tokens more. The two official copies
            disagree (10,240 in the repository, 8,192 on the hub).
        token_layout: ``unnested`` or ``nested``.
        dtype: As for ``EmbedEngine``.
        device: As for ``EmbedEngine``.
        batch_tokens: Language-model tokens of one forward pass.
        threads: Torch's CPU threads in this process; None leaves them.
        hard_limit_tokens: Treat longer forward passes as out of memory.
        reuse_vision: Keep features that will be needed again.
        reuse_prefix: Keep the keys and values of what stands before the documents. A pair that is
            truncated, or the only one of its query, is computed plainly.
        vision_cache_bytes: Memory that kept features may hold; None: a part of the device's.
        model: As for ``EmbedEngine``; its head is its token embedding.

    Raises:
        ModelError: If the checkpoint can not be used.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        instruction: str | None = None,
        max_tokens: int = 10_240,
        token_layout: str = "unnested",
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        threads: int | None = None,
        hard_limit_tokens: int | None = None,
        reuse_vision: bool = True,
        reuse_prefix: bool = True,
        vision_cache_bytes: int | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        folder = Path(folder)
        if threads:
            torch.set_num_threads(threads)
        if model is None:
            check_folder(folder)
        self.instruction = instruction or DEFAULT_RERANK_INSTRUCTION
        self.tokenizer = PromptTokenizer(folder, max_tokens=max_tokens, token_layout=token_layout)
        yes, no = (self.tokenizer.vocabulary_id(word) for word in ("yes", "no"))
        if model is None:
            chosen = choose_device(device)
            rows = load_head_rows(folder, [yes, no])
            model = load_checkpoint(folder, dtype=choose_dtype(dtype, chosen), device=chosen)
        else:
            rows = model.get_input_embeddings().weight[[yes, no]]
        self._packed = PackedModel(
            model,
            batch_tokens=batch_tokens,
            hard_limit_tokens=hard_limit_tokens,
            prefixes=reuse_prefix,
        )
        if vision_cache_bytes is None:
            vision_cache_bytes = feature_bytes(model.device)
        self.reuse_vision = reuse_vision
        self.reuse_prefix = reuse_prefix and takes_prefix(model.device, model.dtype)
        self._store = FeatureStore(self._packed.tower, vision_cache_bytes)
        self.counts = ReuseCounts()
        # Subtracted and rounded as the official class does: in the model's dtype.
        rows = rows.to(model.device, model.dtype)
        self._direction = rows[0] - rows[1]

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass; smaller than asked for once memory ran out."""
        return self._packed.batch_tokens

    @property
    def attention_kernel(self) -> str:
        """What computes attention here, for logs and reports."""
        return kernel_name(self._packed.device, self._packed.dtype)

    def score(
        self, query: EmbedInput, documents: list[EmbedInput], *, instruction: str | None = None
    ) -> list[float | UnitError]:
        """Return one score in 0..1 per document, or why there is none."""
        return self.score_pairs([Pair(query, document, instruction) for document in documents])

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float | UnitError]:
        """Return one score in 0..1 per pair, or why there is none; pairs may come in any order."""
        return [
            result if isinstance(result, UnitError) else result.score
            for result in self.judge_pairs(pairs)
        ]

    def judge_pairs(self, pairs: Sequence[Pair]) -> list[PairScore | UnitError]:
        """Do as `score_pairs`, and say also what was scored."""
        results: list[float | UnitError | None] = [None] * len(pairs)
        prompts: dict[int, PromptIds] = {}
        for index, pair in enumerate(pairs):
            wanted = pair.instruction or self.instruction
            try:
                prompts[index] = self.tokenizer.encode_pair(wanted, pair.query, pair.document)
            except UnitError as error:
                results[index] = error
        groups = self._groups(pairs, prompts)
        encoded_before = self._packed.tower.num_encoded
        uses = [
            use
            for index in prompts
            for use in zip(pairs[index].visions, pairs[index].frame_names(), strict=True)
        ]
        with self._store.expecting(uses):
            # Only so many prefixes are kept at a time.
            for chosen in pack([g.prefix_tokens for g in groups], self._packed.batch_tokens):
                self._score_groups([groups[i] for i in chosen], pairs, prompts, results)
        counts = self.counts
        counts.num_pairs += len(prompts)
        counts.num_visions += len(uses)
        counts.num_visions_encoded += self._packed.tower.num_encoded - encoded_before
        counts.num_tokens += sum(len(prompt.ids) for prompt in prompts.values())
        judged: list[PairScore | UnitError] = []
        for index, result in enumerate(results):
            if isinstance(result, float):
                prompt = prompts[index]
                judged.append(PairScore(result, len(prompt.ids), prompt.truncated))
            else:
                assert result is not None
                judged.append(result)
        return judged

    def _groups(self, pairs: Sequence[Pair], prompts: dict[int, PromptIds]) -> list[_Group]:
        """Return the pairs by what they share; every index of ``prompts`` once."""
        by_query: dict[Hashable, list[int]] = collections.defaultdict(list)
        plain, groups = [], []
        for index, prompt in prompts.items():
            if self.reuse_prefix and not prompt.truncated:
                by_query[pairs[index].query_identity()].append(index)
            else:
                plain.append(index)
        for indices in by_query.values():
            query = pairs[indices[0]].query
            num_spans = sum(vision.grid[0] for vision in (*query.videos, *query.images))
            shared = shared_prefix([prompts[i] for i in indices], num_spans)
            if len(indices) > 1 and shared >= _LEAST_PREFIX_TOKENS:
                groups.append(_Group(tuple(indices), shared))
            else:
                plain += indices
        return [*groups, _Group(tuple(plain))] if plain else groups

    def _score_groups(
        self,
        groups: Sequence[_Group],
        pairs: Sequence[Pair],
        prompts: dict[int, PromptIds],
        results: list[float | UnitError | None],
    ) -> None:
        """Fill in the results of some groups."""
        features = self._store.features if self.reuse_vision else None
        packed = self._packed_prompts(groups, pairs, prompts, features)
        states, failures = self._packed.last_states([*packed.values()], features)
        with torch.inference_mode():
            scores = torch.sigmoid((states @ self._direction).float()).tolist()
        for place, (index, score) in enumerate(zip(packed, scores, strict=True)):
            if place in failures:
                results[index] = failures[place]
            elif score != score:
                results[index] = BadVectorError(pairs[index].document.uri, "the score is NaN")
            else:
                results[index] = score
            self._store.used(pairs[index].visions)

    def _packed_prompts(
        self,
        groups: Sequence[_Group],
        pairs: Sequence[Pair],
        prompts: dict[int, PromptIds],
        features: FeatureSource | None,
    ) -> dict[int, PackedPrompt]:
        """Return what is to be computed of every pair, its prefix being computed here."""
        sharing = [group for group in groups if group.prefix_tokens]
        begins = []
        for group in sharing:
            pair, prompt = pairs[group.indices[0]], prompts[group.indices[0]]
            spans = tuple(span for span in prompt.spans if span.start < group.prefix_tokens)
            ids = prompt.ids[: group.prefix_tokens]
            visions = pair.visions[: pair.num_query_visions]
            begins.append(PackedPrompt(PromptIds(ids, spans, len(ids)), visions, pair.query.uri))
        prefixes = dict(zip(sharing, self._packed.prefixes(begins, features), strict=True))
        packed = {}
        for group in groups:
            prefix = prefixes.get(group)
            if prefix is not None:
                self.counts.prefix_tokens_saved += prefix.num_tokens * (len(group.indices) - 1)
            for index in group.indices:
                pair = pairs[index]
                visions = pair.visions[pair.num_query_visions if prefix is not None else 0 :]
                packed[index] = PackedPrompt(prompts[index], visions, pair.document.uri, prefix)
        return packed
