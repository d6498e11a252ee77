"""``qvl-batch doctor``: does this stack give what the official code gives?

Every case of a golden folder is decoded, tokenised and run through our own path and compared with
what the official classes put out. A case ends as

* ``equal``: ids, grids and pixels bit for bit, vectors or scores within float32 noise;
* ``documented difference``: ours differs on purpose, and what differs is in the input: literal
  special tokens in a text (ours: text), or transparency of palette images (depends on the version
  of transformers that made the goldens);
* ``official failed``: the official code gave nothing usable; ours gives a vector or a reason;
* ``different``: anything else. Then the exit code is 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvl_batch.api.certificate import Certificate
from qvl_batch.api.compare import (
    DIFFERENT,
    DOCUMENTED,
    EQUAL,
    MAX_ABS_DIFF,
    MIN_COSINE,
    OFFICIAL_FAILED,
    CaseResult,
    Findings,
    compare_ids,
    compare_vectors,
    compare_visions,
    unit_name,
)
from qvl_batch.api.golden import (
    GoldenCase,
    GoldenUnit,
    read_golden,
    uses_nested_layout,
)
from qvl_batch.errors import InputError, UnitError

if TYPE_CHECKING:
    from rich.table import Table

    from qvl_batch.api.golden_media import GoldenMedia
    from qvl_batch.model.engine import EmbedEngine
    from qvl_batch.model.prompt import PromptTokenizer
    from qvl_batch.model.rerank import RerankEngine
    from qvl_batch.units import EmbedInput


def run_doctor(model: Path, golden: Path, reranker: Path | None = None) -> list[CaseResult]:
    """Compare our path with a golden folder, in float32, case by case in its order.

    Reranking cases are left out without a reranker.

    Raises:
        InputError: If the golden folder or a checkpoint can not be used.
    """
    from qvl_batch.api.golden_media import GoldenMedia
    from qvl_batch.model.engine import EmbedEngine
    from qvl_batch.model.rerank import RerankEngine

    _, cases = read_golden(golden)
    layout = "nested" if uses_nested_layout(cases) else "unnested"
    embedder = EmbedEngine(model, dtype="float32", token_layout=layout)
    ranker = (
        RerankEngine(reranker, dtype="float32", token_layout=layout)
        if reranker is not None and any(case.is_rerank for case in cases)
        else None
    )
    results = []
    with GoldenMedia(golden, embedder.tokenizer) as media:
        for case in cases:
            if not case.is_rerank:
                results.append(_embedding_case(case, embedder, media))
            elif ranker is not None:
                results.append(_rerank_case(case, ranker, media))
    return results


def certify_golden(model: Path, golden: Path, reranker: Path | None = None) -> Certificate:
    """Return the certificate of a golden folder: `run_doctor` with what it was run on.

    Raises:
        InputError: As `run_doctor`.
    """
    from qvl_batch.model.load import weights_digest

    cases = tuple(run_doctor(model, golden, reranker))
    digest = hashlib.sha256()
    for name in ("golden.json", "golden.npz"):
        if (golden / name).is_file():
            digest.update((golden / name).read_bytes())
    folders = {"embedding": model} | ({"reranker": reranker} if reranker is not None else {})
    return Certificate(
        reference=f"golden folder, sha256 {digest.hexdigest()}",
        checkpoints={role: weights_digest(folder) for role, folder in folders.items()},
        thresholds={"min_cosine": MIN_COSINE, "max_abs_diff": MAX_ABS_DIFF},
        cases=cases,
    )


def _embedding_case(case: GoldenCase, engine: EmbedEngine, media: GoldenMedia) -> CaseResult:
    units, tokenizer = case.units(), engine.tokenizer
    findings = Findings()
    inputs = _decode(units, media, findings, fit=True)
    usable = [i for i, unit in enumerate(inputs) if not isinstance(unit, UnitError)]
    embedded = engine.embed([inputs[i] for i in usable])
    vectors = dict(zip(usable, embedded.columns["vector"], strict=True))
    for place, error in embedded.failures.items():
        inputs[usable[place]] = error
        vectors.pop(usable[place])
    failed = case.official_failure()
    if failed:
        for i in range(len(units)):
            error = inputs[i]
            findings.notes.append(
                f"ours{unit_name(i, units)}: {type(error).__name__}: {error.reason}"
                if isinstance(error, UnitError)
                else f"ours{unit_name(i, units)}: a vector"
                + (f" ({by_text})" if (by_text := _excuse(units[i], tokenizer, media)[0]) else "")
            )
        return findings.result(case.name, failed)
    broken = [(i, unit) for i, unit in enumerate(inputs) if isinstance(unit, UnitError)]
    for i, error in broken:
        findings.wrong.append(
            f"ours{unit_name(i, units)}: {type(error).__name__}: {error.reason}, where the "
            "official code gives a vector"
        )
    if broken:
        return findings.result(case.name)
    excuses = [_excuse(unit, tokenizer, media) for unit in units]
    prompts = [tokenizer.encode(unit).ids for unit in inputs]
    compare_ids(case, prompts, [text for text, _ in excuses], findings)
    compare_visions(
        case.arrays, case.entry, inputs, [bool(image) for _, image in excuses], findings
    )
    compare_vectors(case, vectors, [text or image for text, image in excuses], findings)
    return findings.result(case.name)


def _rerank_case(case: GoldenCase, engine: RerankEngine, media: GoldenMedia) -> CaseResult:
    query_unit, units, instruction = case.pair_units()
    findings = Findings()
    query, *documents = _decode([query_unit, *units], media, findings, fit=False)
    stored = case.arrays.get("scores")
    expected = list(stored if stored is not None else case.entry.get("scores") or [])
    scores: list[Any] = [query] * len(documents)
    if not isinstance(query, UnitError):
        usable = [i for i, unit in enumerate(documents) if not isinstance(unit, UnitError)]
        scores = list(documents)
        found = engine.score(query, [documents[i] for i in usable], instruction=instruction)
        for i, score in zip(usable, found, strict=True):
            scores[i] = score
    failures = []
    details = case.entry.get("docs") or []
    shared = _excuse(query_unit, engine.tokenizer, media)
    for i, score in enumerate(scores):
        failed = case.official_pair_failure(i, len(expected))
        name = unit_name(i, units)
        if failed:
            failures.append(failed)
            findings.notes.append(
                f"ours{name}: {type(score).__name__}: {score.reason}"
                if isinstance(score, UnitError)
                else f"ours{name}: score {score:.6g}"
            )
            continue
        if isinstance(score, UnitError):
            findings.wrong.append(
                f"ours{name}: {type(score).__name__}: {score.reason}, where the official code "
                "gives a score"
            )
            continue
        own = _excuse(units[i], engine.tokenizer, media)
        excuse = shared[0] or own[0] or shared[1] or own[1]
        prompt = engine.tokenizer.encode_pair(
            instruction or engine.instruction, query, documents[i]
        )
        ids = case.arrays.get(f"{i}/input_ids")
        if ids is not None:
            mask = case.arrays.get(f"{i}/attention_mask", np.ones_like(ids)).astype(bool)
            findings.check(
                "ids",
                np.array_equal(prompt.ids, ids[mask]),
                f"token ids{name}",
                shared[0] or own[0],
            )
        arrays = {
            key.removeprefix(f"{i}/"): value
            for key, value in case.arrays.items()
            if key.startswith(f"{i}/")
        }
        entry = details[i] if i < len(details) else {}
        excused = bool(shared[1] or own[1])
        compare_visions(arrays, entry, [query, documents[i]], [excused], findings)
        diff = abs(score - float(expected[i]))
        findings.diffs.append(diff)
        findings.check("scores", diff <= MAX_ABS_DIFF, f"score{name} is off by {diff:.3g}", excuse)
    if not scores:
        findings.notes.append("no documents")
        return findings.result(case.name, case.official_pair_failure(0, 0))
    return findings.result(case.name, "; ".join(dict.fromkeys(failures)))


def _decode(
    units: Sequence[GoldenUnit], media: GoldenMedia, findings: Findings, *, fit: bool
) -> list[EmbedInput | UnitError]:
    inputs: list[EmbedInput | UnitError] = []
    for unit in units:
        try:
            inputs.append(media.input_of(unit, fit=fit))
        except UnitError as error:
            inputs.append(error)
        if media.used_documented_total:
            findings.notes.append("frames fitted to the documented 7,864,320 px in total")
    return inputs


def _excuse(unit: GoldenUnit, tokenizer: PromptTokenizer, media: GoldenMedia) -> tuple[str, str]:
    """Return why ours may differ on purpose: (by its text, by its images), empty if it may not."""
    literal = next(
        (
            token
            for token in tokenizer.special_tokens
            for text in (*unit.texts, unit.instruction or "")
            if token in text
        ),
        "",
    )
    by_text = f"{literal} in the text is text here, a control token there" if literal else ""
    by_image = (
        "palette image with transparency: depends on the transformers version that made the folder"
        if media.has_palette_transparency(unit)
        else ""
    )
    return by_text, by_image


def format_table(results: Sequence[CaseResult]) -> Table:
    """Return the results as a table for the terminal."""
    from rich.table import Table

    table = Table()
    for column in ("case", "status", "ids", "grid", "pixels", "cosine", "max_abs_diff", "reason"):
        table.add_column(column, overflow="fold")
    colours = {EQUAL: "green", DOCUMENTED: "cyan", OFFICIAL_FAILED: "yellow", DIFFERENT: "red"}
    for result in results:
        table.add_row(
            result.case,
            f"[{colours[result.status]}]{result.status}[/]",
            result.ids,
            result.grid,
            result.pixels,
            "-" if result.cosine is None else f"{result.cosine:.7f}",
            "-" if result.max_abs_diff is None else f"{result.max_abs_diff:.2g}",
            _escaped(result.reason),
        )
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def doctor(model: str, golden: str, reranker: str | None, as_json: bool) -> int:
    """Print the comparison of a checkpoint with a golden folder; return the exit code.

    Returns:
        0 if every case is as it should be, 1 if one is ``different``.

    Raises:
        InputError: If a folder is missing or unusable.
    """
    for what, folder in (("model", model), ("reranker", reranker), ("golden", golden)):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"There is no {what} folder {folder}.", f"Check --{what}.")
    certificate = certify_golden(Path(model), Path(golden), Path(reranker) if reranker else None)
    results = certificate.cases
    _, cases = read_golden(Path(golden))
    left_out = len(cases) - len(results)
    counts = {
        status: sum(result.status == status for result in results)
        for status in (EQUAL, DOCUMENTED, OFFICIAL_FAILED, DIFFERENT)
    }
    if as_json:
        # Of the certificate without this line.
        stated = {"sha256": certificate.sha256} | certificate.to_dict()
        print(json.dumps(stated, indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        # A pipe has no width of its own: wide enough that no reason is folded into shreds.
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(format_table(results))
        console.print(", ".join(f"{number} {status}" for status, number in counts.items()))
        console.print(f"certificate {certificate.sha256}", highlight=False)
    if left_out:
        print(f"{left_out} reranking case(s) left out: give --reranker.", file=sys.stderr)
    return 1 if counts[DIFFERENT] or not results else 0
