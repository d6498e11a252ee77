"""The reranking engine: the probability that a document answers a query."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from qvl_batch.errors import BadVectorError, UnitError
from qvl_batch.model.chat import DEFAULT_RERANK_INSTRUCTION
from qvl_batch.model.forward import PackedModel, PackedPrompt
from qvl_batch.model.load import choose_device, choose_dtype, load_checkpoint, load_head_rows
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.units import EmbedInput


class RerankEngine:
    """Scores query-document pairs as the official reranker does.

    The score is ``sigmoid((W[yes] - W[no]) . h)`` with the two rows of the language-model head and
    the final-norm hidden state at the last token. Pairs are packed; none changes another's score.

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
    ) -> None:
        folder = Path(folder)
        if threads:
            torch.set_num_threads(threads)
        self.instruction = instruction or DEFAULT_RERANK_INSTRUCTION
        self.tokenizer = PromptTokenizer(folder, max_tokens=max_tokens, token_layout=token_layout)
        yes, no = (self.tokenizer.vocabulary_id(word) for word in ("yes", "no"))
        chosen = choose_device(device)
        compute = choose_dtype(dtype, chosen)
        rows = load_head_rows(folder, [yes, no])
        model = load_checkpoint(folder, dtype=compute, device=chosen)
        self._packed = PackedModel(model, batch_tokens=batch_tokens)
        # Subtracted and rounded as the official class does: in the model's dtype.
        rows = rows.to(chosen, compute)
        self._direction = rows[0] - rows[1]

    def score(
        self, query: EmbedInput, documents: list[EmbedInput], *, instruction: str | None = None
    ) -> list[float | UnitError]:
        """Return one score in 0..1 per document, or why there is none."""
        wanted = instruction or self.instruction
        results: list[float | UnitError | None] = [None] * len(documents)
        pairs, places = [], []
        for index, document in enumerate(documents):
            try:
                prompt = self.tokenizer.encode_pair(wanted, query, document)
            except UnitError as error:
                results[index] = error
                continue
            visions = (*query.videos, *query.images, *document.videos, *document.images)
            pairs.append(PackedPrompt(prompt, visions, document.uri))
            places.append(index)
        states, failures = self._packed.last_states(pairs)
        with torch.inference_mode():
            scores = torch.sigmoid((states @ self._direction).float()).tolist()
        for place, score, number in zip(places, scores, range(len(places)), strict=True):
            if number in failures:
                results[place] = failures[number]
            elif score != score:
                results[place] = BadVectorError(documents[place].uri, "the score is NaN")
            else:
                results[place] = score
        return results
