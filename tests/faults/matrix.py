"""The crash matrix: kill at every named place, run again, count what is lost or doubled.

    python -m tests.faults.matrix --seeds 20 --results crash-matrix.jsonl
    python -m tests.faults.matrix --seeds 2 --stores local --places before-commit,after-commit

Each case is a fresh root (local disk, or a bucket of an S3 server on loopback) that holds the first
state of a bucket, a run on the second state that is killed with SIGKILL, and runs until one ends
with exit code 0. The table has a row a place and a mode; results are appended, so that a matrix
that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qvl_batch import crash
from qvl_batch.storage import Storage
from tests.faults import scenario

# Places that the plain driver passes; the others are in Ray's workers or in other commands.
ALL_MODES = (
    "lease-acquire",
    "after-plan",
    "create-table",
    "after-fragment-write",
    "before-commit",
    "after-commit",
    "between-partitions",
    "before-failures",
    "catalog-update",
)
REPLACE_ONLY = ("replace-begin", "replace-record", "replace-publish", "replace-close")
MAX_RERUNS = 3


@dataclass(frozen=True)
class Case:
    """One kill: where, in which mode, on which store, with which seed."""

    place: str
    mode: str
    store: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.place}/{self.mode}/{self.store}/{self.seed}"


@dataclass(frozen=True)
class Result:
    """What became of a case. `killed` is False if the run ended before it came to the place."""

    case: Case
    killed: bool
    reruns: int
    recover_s: float
    lost: int
    duplicated: int
    foreign: int
    problems: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        bad = self.lost or self.duplicated or self.foreign or self.problems
        return not bad and self.reruns <= 1


def cases(
    seeds: int, stores: list[str], places: list[str] | None, modes: list[str] | None
) -> Iterator[Case]:
    """Yield every place in every mode that passes it."""
    for seed in range(seeds):
        for place in (*ALL_MODES, *REPLACE_ONLY):
            for mode in scenario.MODES if place in ALL_MODES else ("replace",):
                for store in stores:
                    if (places is None or place in places) and (modes is None or mode in modes):
                        yield Case(place, mode, store, seed)


def run_case(case: Case, folder: Path, storage: Storage, root: str) -> Result:
    """Make the first state, kill a run on the second, run again until it ends well."""
    rng = random.Random(case.name)
    before = scenario.units_before(rng)
    after = scenario.units_after(before, rng)
    manifests = [folder / "before.parquet", folder / "after.parquet"]
    for path, units in zip(manifests, (before, after), strict=True):
        scenario.write_manifest(path, units)
    first, second = folder / "first.yaml", folder / "second.yaml"
    # Half of the time the tables are new: creating them is a thing to be killed in, too.
    is_new = case.place == "create-table" or rng.random() < 0.3
    if is_new:
        before = []
    else:
        scenario.write_config(first, manifests[0], root, storage, "append")
        done = _drive(first)
        assert done.returncode == 0, done.stderr
    scenario.write_config(second, manifests[1], root, storage, case.mode)
    token = folder / f"token-{uuid.uuid4().hex}"
    token.touch()
    nth = rng.randint(1, 3 if case.place in ("after-plan", "replace-close") else 6)
    # A place that is passed once is passed once.
    nth = 1 if case.place == "after-plan" else nth
    killed = _drive(second, {crash.ENVIRONMENT: f"{case.place}:{nth}:{token}"})
    assert killed.returncode in (0, -9), killed.stderr
    started_s = time.monotonic()
    reruns, again = 0, killed
    while again.returncode and reruns < MAX_RERUNS:
        reruns += 1
        again = _drive(second)
    assert again.returncode == 0, f"{case.name}: {again.stderr}"
    recover_s = time.monotonic() - started_s
    found = scenario.outcome(root, storage, manifests[1], before, after, case.mode)
    return Result(
        case,
        killed.returncode == -9,
        reruns,
        round(recover_s, 2),
        found.lost,
        found.duplicated,
        found.foreign,
        found.problems,
    )


def _drive(
    config: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.plain_driver", str(config)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextlib.contextmanager
def s3_server() -> Iterator[Storage]:
    """Run an S3 server on loopback for as long as the matrix lasts."""
    from tests.moto_in_process import moto_server

    secrets = {"AWS_ACCESS_KEY_ID": "faults", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
    os.environ |= secrets | {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    with moto_server() as endpoint:
        yield Storage(endpoint_url=endpoint, region="us-east-1")


def run_matrix(wanted: list[Case], results: Path | None, storage: Storage) -> list[Result]:
    """Run the cases that the results do not hold yet; return all of them."""
    found: dict[str, Result] = {}
    if results is not None and results.exists():
        for line in results.read_text().splitlines():
            values = json.loads(line)
            case = Case(**values.pop("case"))
            found[case.name] = Result(case, **values | {"problems": tuple(values["problems"])})
    for case in wanted:
        if case.name in found:
            continue
        with tempfile.TemporaryDirectory(prefix="qvl-faults-") as scratch:
            root, where = str(Path(scratch) / "vectors"), Storage()
            if case.store == "s3":
                bucket = f"case-{uuid.uuid4().hex}"
                where, root = storage, f"s3://{bucket}/vectors"
                storage.filesystem(root).mkdir(bucket)
            found[case.name] = run_case(case, Path(scratch), where, root)
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(asdict(found[case.name])) + "\n")
        if not found[case.name].is_right:
            print(f"WRONG: {found[case.name]}", flush=True)
    return [found[case.name] for case in wanted]


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table, a row a place and a mode."""
    lines = [
        "| place | mode | runs | killed | lost | duplicated | other problems | s to recover, max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.place, result.case.mode), []).append(result)
    for (place, mode), group in groups.items():
        other = sum(r.foreign + len(r.problems) + (r.reruns > 1) for r in group)
        slowest = max(r.recover_s for r in group)
        lines.append(
            f"| {place} | {mode} | {len(group)} | {sum(r.killed for r in group)} "
            f"| {sum(r.lost for r in group)} | {sum(r.duplicated for r in group)} | {other} "
            f"| {slowest:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--stores", default="local,s3")
    parser.add_argument("--places", help="comma-separated; all of them if not given")
    parser.add_argument("--modes", help="comma-separated; all of them if not given")
    parser.add_argument("--results", type=Path, help="JSON lines to go on with")
    asked = parser.parse_args()
    wanted = list(
        cases(
            asked.seeds,
            asked.stores.split(","),
            asked.places.split(",") if asked.places else None,
            asked.modes.split(",") if asked.modes else None,
        )
    )
    with s3_server() as storage:
        results = run_matrix(wanted, asked.results, storage)
    print(table(results))
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
