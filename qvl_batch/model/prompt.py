"""Prompts as token ids, from the checkpoint's own tokenizer.json.

The layout is that of the official classes (Qwen3-VL-Embedding, ``qwen3_vl_embedding.py`` and
``qwen3_vl_reranker.py``) rendered with Qwen3-VL's ChatML. Two deliberate points:

* What a user writes is text. ``<|im_end|>`` in a text is ten ordinary characters, never a
  control token (the official classes let it become one).
* A prompt's length is known from plans alone, before a pixel exists.

Only the small ``tokenizers`` package is needed here: neither torch nor transformers is imported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import EmbedFailedError, ModelError
from qvl_batch.model.chat import (
    USER_TURN,
    Piece,
    VisionShape,
    embed_instruction,
    embed_pieces,
    merged,
    pair_pieces,
    shape_of,
    split_plans,
)
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.units import EmbedInput, PartPlan

# <|im_end|> \n <|im_start|> assistant \n: what the official reranker never cuts.
RERANK_TAIL_TOKENS = 5

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, slots=True)
class Span:
    """The pads of one temporal group: ``rows * columns`` tokens from ``start`` on."""

    start: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class PromptIds:
    """One tokenised prompt.

    ``ids`` is int64 of shape ``(tokens,)``. ``spans`` are the vision tokens in the order of their
    features: videos, then images, each by temporal group. ``num_untruncated`` is the length before
    any cut.
    """

    ids: npt.NDArray[np.int64]
    spans: tuple[Span, ...]
    num_untruncated: int

    @property
    def truncated(self) -> bool:
        return len(self.ids) < self.num_untruncated


class PromptTokenizer:
    """Tokenises the prompts of one checkpoint.

    Args:
        folder: A checkpoint folder with tokenizer.json and config.json.
        default_instruction: The system turn of inputs without an own instruction.
        max_tokens: The context: longer prompts are cut as the official class cuts them.
        token_layout: ``unnested`` or ``nested`` vision tokens of videos.

    Raises:
        ModelError: If the tokenizer is missing, unreadable, lacks a token that prompts need, or
            disagrees with config.json about a vision token's id.
    """

    def __init__(
        self,
        folder: Path,
        *,
        default_instruction: str = DEFAULT_INSTRUCTION,
        max_tokens: int = 8192,
        token_layout: str = "unnested",
    ) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json.", "Download the checkpoint's tokenizer.json too."
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        # tokenizers raises a bare Exception for whatever it can not read.
        except Exception as error:
            raise ModelError(f"{path} can not be read: {error}.", "Download it again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # What users write stays text; the special tokens of the layout are placed by id.
        self._tokenizer.encode_special_tokens = True
        self._folder = folder
        self.default_instruction = default_instruction
        self.max_tokens = max_tokens
        self.nested = token_layout == "nested"
        self.special = {name: self._token_id(name) for name in _SPECIAL}
        self.special_tokens = tuple(
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.special
        )
        self._check_config(Path(folder))
        plain = self._tokenizer.encode("hi", add_special_tokens=False).ids
        whole = self._tokenizer.encode("hi", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        self._prefix, self._suffix = whole[:at], whole[at + len(plain) :]
        self._short_ids = functools.lru_cache(maxsize=4096)(self._text_ids)
        self._user_turn = np.array([self.special["<|im_start|>"], *self._ids(USER_TURN)])

    def _token_id(self, name: str) -> int:
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ModelError(
                f"The tokenizer has no token {name}.", "Use a Qwen3-VL-Embedding or -Reranker one."
            )
        return int(token)

    def _check_config(self, folder: Path) -> None:
        path = folder / "config.json"
        if not path.is_file():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, name in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
        ):
            stated = config.get(key, self.special[name])
            if stated != self.special[name]:
                raise ModelError(
                    f"config.json has {key} {stated}, tokenizer.json has {self.special[name]} for "
                    f"{name}.",
                    "Take both files from the same checkpoint.",
                )

    def require_endoftext(self) -> None:
        """Check that the tokenizer ends every prompt with ``<|endoftext|>``.

        The embedding is read at that token, so without it every vector would be another one.

        Raises:
            ModelError: If it does not.
        """
        if self._suffix[-1:] != [self.special["<|endoftext|>"]]:
            raise ModelError(
                f"The tokenizer of {self._folder} does not append <|endoftext|>, where an "
                "embedding is read.",
                "Use the tokenizer.json of a Qwen3-VL-Embedding checkpoint (not of an Instruct or "
                "Reranker one).",
            )

    def vocabulary_id(self, word: str) -> int:
        """Return the id of a word that is one token.

        Raises:
            ModelError: If the vocabulary lacks it.
        """
        return self._token_id(word)

    def count(
        self,
        *,
        texts: tuple[str, ...] = (),
        instruction: str | None = None,
        plans: Sequence[PartPlan] = (),
    ) -> int:
        """Return the tokens of the whole prompt, not truncated, from plans alone."""
        videos, images = split_plans(plans)
        return self._measure(texts, images, videos, instruction)[0]

    def count_uncuttable(
        self, *, instruction: str | None = None, plans: Sequence[PartPlan] = ()
    ) -> int:
        """Return the tokens that must fit the context: all up to the last pad, and the end.

        Texts stand behind images and videos, so a prompt that is too long only by its texts is cut
        and not refused; one with more uncuttable tokens than the context can not be embedded.
        """
        videos, images = split_plans(plans)
        return self._measure((), images, videos, instruction)[1] + len(self._suffix)

    def _measure(
        self,
        texts: Sequence[str],
        images: Sequence[VisionShape],
        videos: Sequence[VisionShape],
        instruction: str | None,
    ) -> tuple[int, int]:
        """Return the prompt's tokens, and those before the end of its last pad."""
        total, last_pad = len(self._prefix), 0
        for piece in merged(self._pieces(texts, images, videos, instruction)):
            if isinstance(piece, str):
                total += len(self._ids(piece))
            elif len(piece) == 3:
                total += piece[1] * piece[2]
                last_pad = total
            else:
                total += 1
        return total + len(self._suffix), last_pad

    def encode(self, unit: EmbedInput) -> PromptIds:
        """Return the ids of an embedding prompt.

        Source of the cut: the tokenizer's right truncation as the official embedder asks for it,
        which keeps only the appended ``<|endoftext|>`` and so loses the assistant header.

        Raises:
            EmbedFailedError: If the cut would fall inside vision tokens, or a text is not valid
                Unicode.
        """
        pieces = self._pieces(
            unit.texts,
            [*map(shape_of, unit.images)],
            [*map(shape_of, unit.videos)],
            unit.instruction,
        )
        ids, spans = self._assemble(pieces, unit.uri)
        whole = len(ids) + len(self._suffix)
        if whole > self.max_tokens:
            keep = self.max_tokens - len(self._suffix)
            if spans and spans[-1].end > keep:
                raise EmbedFailedError(
                    unit.uri,
                    f"needs {whole} tokens, {spans[-1].end} of them up to the end of its last "
                    f"image or video; the context is {self.max_tokens}",
                )
            ids = ids[:keep]
        return PromptIds(np.array(ids + self._suffix, np.int64), tuple(spans), whole)

    def num_instruction_tokens(self, prompt: PromptIds) -> int:
        """Return how many first tokens an embedding prompt has of its instruction alone.

        They end with the user turn's header, so no token of the unit is among them; prompts of one
        instruction agree in them. Always less than the whole prompt.

        Returns:
            0 if the tokenizer joins the unit's first characters to the header (a text that begins
            with a line break), or if the cut left no more than the header.
        """
        turns = np.flatnonzero(prompt.ids == self.special["<|im_start|>"])
        if len(turns) < 2:
            return 0
        end = int(turns[1]) + len(self._user_turn)
        whole = np.array_equal(prompt.ids[turns[1] : end], self._user_turn)
        return end if whole and end < len(prompt.ids) else 0

    def encode_pair(self, instruction: str, query: EmbedInput, document: EmbedInput) -> PromptIds:
        """Return the ids of a reranking prompt.

        Source: the official reranker. Its instruction is used verbatim; nothing stands between the
        instruction and ``<Query>:``. Its cut keeps every special token, fills up to ``max_tokens``
        with the first other tokens, and re-appends the last 5 ids: ``max_tokens + 5`` in all, more
        only if the special ones alone are more.

        Raises:
            EmbedFailedError: If a text is not valid Unicode.
        """
        pieces = pair_pieces(instruction, query, document, self.nested)
        ids, spans = self._assemble(pieces, document.uri)
        ids += self._suffix
        whole = len(ids)
        if whole > self.max_tokens + RERANK_TAIL_TOKENS:
            ids, spans = self._cut_pair(ids, spans)
        return PromptIds(np.array(ids, np.int64), tuple(spans), whole)

    def _cut_pair(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        head = np.array(ids[:-RERANK_TAIL_TOKENS])
        is_special = np.isin(head, list(self.special.values()))
        room = self.max_tokens - int(is_special.sum())
        kept = is_special | (np.cumsum(~is_special) <= room)
        # How many tokens before a position survive: where its span moves to.
        moved = np.concatenate([[0], np.cumsum(kept)])
        spans = [Span(int(moved[span.start]), span.rows, span.columns) for span in spans]
        return [*head[kept].tolist(), *ids[-RERANK_TAIL_TOKENS:]], spans

    def _pieces(
        self,
        texts: Sequence[str],
        images: Sequence[VisionShape],
        videos: Sequence[VisionShape],
        instruction: str | None,
    ) -> Iterable[Piece]:
        system = embed_instruction(instruction, self.default_instruction)
        return embed_pieces(system, texts, images, videos, self.nested)

    def _assemble(self, pieces: Iterable[Piece], uri: str) -> tuple[list[int], list[Span]]:
        ids = list(self._prefix)
        spans = []
        for piece in merged(pieces):
            if isinstance(piece, str):
                try:
                    ids += self._ids(piece)
                except TypeError:
                    # How tokenizers answers half a surrogate pair.
                    raise EmbedFailedError(uri, "the text is not valid Unicode") from None
            elif len(piece) == 3:
                name, rows, columns = piece
                spans.append(Span(len(ids), rows, columns))
                ids += [self.special[name]] * (rows * columns)
            else:
                ids.append(self.special[piece[0]])
        return ids, spans

    def _ids(self, text: str) -> list[int]:
        # The template's own words and the times recur; users' texts would only fill the cache.
        return self._short_ids(text) if len(text) <= 64 else self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
