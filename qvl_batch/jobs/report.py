"""The account of a run: counts that add up, as text and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from qvl_batch.api.certificate import Certificate
from qvl_batch.errors import InvariantBrokenError
from qvl_batch.jobs.commit_loop import Counts
from qvl_batch.jobs.plan import Plan
from qvl_batch.media.objects import explained
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage, is_local, join

REPORTS_FOLDER = "_qvl_runs"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run was given and what became of it; every unit is in exactly one count.

    ``num_units = skipped_done + skipped_failed + held_back + embedded + failed + not_reached``
    """

    run_id: str
    recipe_id: str
    num_manifest_rows: int
    num_duplicates: int
    num_units: int
    skipped_done: int
    skipped_failed: int
    held_back: int
    embedded: int
    failed: int
    not_reached: int
    num_rows: int
    num_tokens: int
    num_commits: int
    duration_s: float
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    exit_code: int = 0

    def __post_init__(self) -> None:
        total = (
            self.skipped_done
            + self.skipped_failed
            + self.held_back
            + self.embedded
            + self.failed
            + self.not_reached
        )
        if total != self.num_units or self.not_reached < 0:
            raise InvariantBrokenError(f"The counts do not add up: {dataclasses.asdict(self)}")

    @classmethod
    def of(
        cls, run_id: str, plan: Plan, counts: Counts, recipe: Recipe, duration_s: float
    ) -> RunReport:
        return cls(
            run_id=run_id,
            recipe_id=recipe.recipe_id,
            num_manifest_rows=plan.num_manifest_rows,
            num_duplicates=plan.num_duplicates,
            num_units=plan.num_units,
            skipped_done=plan.num_done,
            skipped_failed=plan.num_failed_before,
            held_back=plan.num_held_back,
            embedded=counts.embedded,
            failed=counts.failed,
            not_reached=plan.todo.num_rows - counts.embedded - counts.failed,
            num_rows=counts.rows,
            num_tokens=counts.tokens,
            num_commits=counts.commits,
            duration_s=round(duration_s, 3),
            failures_by_reason=dict(sorted(counts.failures_by_reason.items())),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"run {self.run_id}: {self.embedded:,} units embedded as {self.num_rows:,} rows "
            f"({self.num_tokens:,} tokens), {self.failed:,} failed, "
            f"{self.skipped_done + self.skipped_failed:,} skipped ({self.skipped_done:,} done "
            f"before, {self.skipped_failed:,} failed before), {self.num_commits} commits, "
            f"{self.duration_s:.1f} s"
        ]
        if self.failures_by_reason:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.failures_by_reason.items())
            lines.append(f"failed: {reasons} (table _qvl_failures)")
        if self.not_reached:
            lines.append(f"{self.not_reached:,} units not reached: run the same command again")
        return "\n".join(lines)


def write_report(report: RunReport, root: str, storage: Storage) -> str:
    """Write ``_qvl_runs/{run_id}.json`` under the root and return its address."""
    return write_text(
        join(root, REPORTS_FOLDER, f"{report.run_id}.json"), report.to_json(), storage
    )


def write_certificate(certificate: Certificate, run_id: str, root: str, storage: Storage) -> str:
    """Write ``_qvl_runs/{run_id}.certificate.json`` under the root and return its address.

    The file's sha256 is the certificate's, which tables made in that run state.
    """
    uri = join(root, REPORTS_FOLDER, f"{run_id}.certificate.json")
    return write_text(uri, certificate.to_json(), storage)


def write_text(uri: str, text: str, storage: Storage) -> str:
    """Write a text and return its address."""
    fs = storage.filesystem(uri)
    path = fs._strip_protocol(uri)
    with explained(uri, storage):
        if is_local(uri):
            fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, text.encode())
    return uri
