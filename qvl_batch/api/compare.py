"""Ours against theirs: token ids, grids and pixels bit for bit, vectors within float32 noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from qvl_batch.api.golden import GoldenCase
    from qvl_batch.units import EmbedInput, Vision

EQUAL = "equal"
DOCUMENTED = "documented difference"
OFFICIAL_FAILED = "official failed"
DIFFERENT = "different"
MIN_COSINE = 0.99999
MAX_ABS_DIFF = 1e-5


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case ended; ``ids``, ``grid`` and ``pixels`` are equal, different or "-"."""

    case: str
    status: str
    ids: str = "-"
    grid: str = "-"
    pixels: str = "-"
    cosine: float | None = None
    max_abs_diff: float | None = None
    reason: str = ""


@dataclass
class Findings:
    """What comparing one case found, aspect by aspect."""

    checks: dict[str, bool] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    diffs: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, aspect: str, equal: bool, what: str, excuse: str = "") -> None:
        """Note one comparison; ``what`` differs, wrongly unless there is an ``excuse``."""
        self.checks[aspect] = self.checks.get(aspect, True) and equal
        if not equal:
            (self.allowed if excuse else self.wrong).append(excuse or what)

    def result(self, case: str, official_failed: str = "") -> CaseResult:
        """Return how the case ended; ``official_failed`` says how the official code did."""
        notes = list(dict.fromkeys(self.notes))
        if self.wrong:
            status, reasons = DIFFERENT, self.wrong
        elif official_failed:
            status, reasons = OFFICIAL_FAILED, [f"official: {official_failed}", *notes]
        elif self.allowed:
            status, reasons = DOCUMENTED, self.allowed
        elif not self.checks:
            status, reasons = DIFFERENT, ["the folder holds nothing to compare with", *notes]
        else:
            status, reasons = EQUAL, notes
        words = {True: "equal", False: "different", None: "-"}
        return CaseResult(
            case=case,
            status=status,
            ids=words[self.checks.get("ids")],
            grid=words[self.checks.get("grid")],
            pixels=words[self.checks.get("pixels")],
            cosine=min(self.cosines, default=None),
            max_abs_diff=max(self.diffs, default=None),
            reason="; ".join(dict.fromkeys(reasons)),
        )


def unit_name(index: int, units: Sequence[object]) -> str:
    """Return `` [index]`` where there are several units, so that a lone one is not numbered."""
    return f" [{index}]" if len(units) > 1 else ""


def compare_ids(
    case: GoldenCase,
    prompts: Sequence[npt.NDArray[np.int64]],
    excuses: Sequence[str],
    findings: Findings,
) -> None:
    """Compare prompts with the unpadded rows of ``input_ids``; one excuse per unit, or empty."""
    ids = case.arrays.get("input_ids")
    if ids is None:
        return
    mask = case.arrays.get("attention_mask", np.ones_like(ids)).astype(bool)
    for i, prompt in enumerate(prompts):
        name = unit_name(i, prompts)
        theirs = ids[i][mask[i]]
        equal = np.array_equal(prompt, theirs)
        what = f"token ids{name}: {len(prompt)} here, {len(theirs)} there"
        findings.check("ids", equal, what, excuses[i])


def compare_visions(
    arrays: dict[str, npt.NDArray[Any]],
    entry: dict[str, Any],
    inputs: Iterable[EmbedInput],
    excused: Sequence[bool],
    findings: Findings,
) -> None:
    """Compare grids and pixels of all images, and of all videos, of a batch in their order."""
    inputs = list(inputs)
    excuse = "pixels of a palette image with transparency" if any(excused) else ""
    for kind, grids_key, pixels_key in (
        ("images", "image_grid_thw", "pixel_values"),
        ("videos", "video_grid_thw", "pixel_values_videos"),
    ):
        visions = [vision for unit in inputs for vision in getattr(unit, kind)]
        ours = [list(vision.grid) for vision in visions]
        theirs = arrays.get(grids_key)
        theirs = entry.get(grids_key) if theirs is None else theirs.tolist()
        stated = arrays.get(pixels_key)
        summary = (entry.get("inputs") or {}).get(pixels_key)
        if theirs is None and stated is None and not isinstance(summary, dict):
            continue
        if theirs is not None:
            findings.check("grid", ours == theirs, f"{kind}: grids {ours} here, {theirs} there")
        if stated is not None:
            equal = np.array_equal(_pixel_rows(visions), stated)
            findings.check("pixels", equal, f"pixels of the {kind}", excuse)
        elif isinstance(summary, dict) and "sha256" in summary:
            equal = _pixel_sha256(visions) == summary["sha256"]
            findings.check("pixels", equal, f"pixels of the {kind} (sha256)", excuse)


def _rows_of(vision: Vision) -> npt.NDArray[np.float32]:
    from qvl_batch.model.patches import host_patch_rows

    return host_patch_rows(vision.pixels)


def _pixel_rows(visions: Sequence[Vision]) -> npt.NDArray[np.float32]:
    rows = [_rows_of(vision) for vision in visions]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)


def _pixel_sha256(visions: Sequence[Vision]) -> str:
    digest = hashlib.sha256()
    for vision in visions:
        digest.update(_rows_of(vision).tobytes())
    return digest.hexdigest()


def compare_vectors(
    case: GoldenCase,
    vectors: dict[int, npt.NDArray[np.float32]],
    excuses: Sequence[str],
    findings: Findings,
) -> None:
    """Compare our vectors, by unit, with the rows of ``embedding``; one excuse per unit."""
    stored = case.arrays.get("embedding")
    if stored is None:
        return
    for i, ours in vectors.items():
        name = unit_name(i, vectors)
        theirs = stored[i].astype(np.float64)
        if theirs.shape != ours.shape:
            findings.wrong.append(
                f"vector{name}: {len(ours)} dimensions here, {len(theirs)} there: another "
                "checkpoint?"
            )
            continue
        theirs = theirs / max(float(np.linalg.norm(theirs)), 1e-30)
        cosine = float(ours.astype(np.float64) @ theirs) / float(np.linalg.norm(ours))
        diff = float(np.abs(ours - stored[i]).max())
        findings.cosines.append(cosine)
        findings.diffs.append(diff)
        findings.check(
            "vectors",
            cosine >= MIN_COSINE and diff <= MAX_ABS_DIFF,
            f"vector{name}: cosine {cosine:.6f}, off by {diff:.3g}",
            excuses[i],
        )
