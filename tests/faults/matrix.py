"""The crash matrix: kill at every named place, run again, count what is lost or doubled.

    python -m tests.faults.matrix --seeds 20 --results crash-matrix.jsonl
    python -m tests.faults.matrix --seeds 2 --stores local --places before-commit,after-commit

Each case is a fresh root (local disk, or a bucket of an S3 server on loopback) that holds the first
state of a bucket, a run on the second state that is killed with SIGKILL, and runs until one ends
with exit code 0. What a clean run passes was counted before: every place of every mode, and how
often. The table has a row a place and a mode; results are appended, so that a matrix that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qvl_batch import crash
from qvl_batch.storage import Storage, is_local
from tests.conftest import serve
from tests.faults import forked, scenario
from tests.faults.first_states import VARIANTS, FirstStates

# Passed by Ray's workers only, see `tests.faults.ray_matrix`.
ON_RAY_ONLY = frozenset({"mid-decode", "mid-embed"})
MAX_RERUNS = 3
MANIFEST = "manifest.parquet"
# A renewal comes after 0.8 s: the run must not be over by then.
PACE_S = 0.15


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


@dataclass(frozen=True)
class Setting:
    """One case made ready: the first state stands, a run on the second may begin.

    Args:
        before, after: The units of both states.
        config: Of the second run.
    """

    folder: Path
    root: str
    storage: Storage
    mode: str
    before: list[scenario.Unit]
    after: list[scenario.Unit]
    config: Path

    @classmethod
    def of(
        cls, mode: str, is_new: bool, variant: int, store: str, folder: Path, first: FirstStates
    ) -> Setting:
        states = scenario.units(variant)
        is_embed = mode in ("append", "upsert", "late-upsert", "replace")
        after = states["after" if is_embed else "before"]
        if mode in ("prune", "delete"):
            after = sorted(set(states["before"]) & set(states["after"]), key=lambda u: u.uri)
        steps = [] if is_new else ["before"]
        if mode == "late-upsert":
            steps.append("after")
        root, storage = first.root(store, folder, steps, variant)
        config = folder / "config.yaml"
        scenario.write_manifest(folder / MANIFEST, after)
        as_embed = mode.removeprefix("late-") if is_embed else "append"
        scenario.write_config(config, folder / MANIFEST, root, storage, as_embed)
        before = [] if is_new else states["before"]
        return cls(folder, root, storage, mode, before, after, config)

    def start(self, pace_s: float = 0.0, **environment: str) -> forked.Started:
        """Start what the mode is about."""
        log = self.folder / "log.txt"
        if self.mode in ("index", "compact"):
            return forked.start(self.mode, self.root, self.storage, log=log, **environment)
        if self.mode == "prune":
            return forked.start("prune", str(self.config), log=log, **environment)
        if self.mode == "delete":
            gone = sorted({u.uri for u in self.before} - {u.uri for u in self.after})
            return forked.start("delete", self.root, self.storage, gone, log=log, **environment)
        return forked.start("embed", str(self.config), pace_s, log=log, **environment)

    def outcome(self) -> scenario.Outcome:
        manifest = self.folder / MANIFEST
        return scenario.outcome(
            self.root, self.storage, manifest, self.before, self.after, self.mode
        )

    @contextlib.contextmanager
    def watched(self, problems: list[str]) -> Iterator[None]:
        """Poll the tables meanwhile: only ever old or new, and never old after new."""
        if self.mode != "replace":
            yield
            return
        found = self.folder / "seen.txt"
        found.touch()
        tables = [scenario.table_of(day) for day in scenario.DAYS]
        pause_s = 0.03 if is_local(self.root) else 0.1
        reader = forked.start(
            "watch",
            *(self.root, self.storage, tables, str(found), pause_s),
            log=self.folder / "reader.txt",
        )
        try:
            yield
        finally:
            ended = reader.process.exitcode is not None
            reader.process.kill()
            reader.process.join()
        if ended:
            problems.append(f"the reader ended: {reader.output()}")
        problems += self._misseen(found.read_text())

    def _misseen(self, text: str) -> list[str]:
        old = scenario.expected_units(self.before, [], "append")
        new = scenario.expected_units(self.before, self.after, "replace")
        allowed = {
            scenario.table_of(day): [",".join(sorted(old[day])), ",".join(sorted(new[day]))]
            for day in scenario.DAYS
        }
        problems = []
        # The last line may have been cut off by the kill.
        for line in text.splitlines(keepends=True):
            table, _, seen = line.rstrip("\n").partition(" ")
            if not line.endswith("\n"):
                continue
            if seen not in allowed[table]:
                problems.append(f"a reader saw neither old nor new in {table}: {seen[:200]}")
            elif seen == allowed[table][1]:
                allowed[table] = [seen, seen]
        return problems


class Passages:
    """How often a clean run of a mode passes each place, on new tables and on tables with rows."""

    def __init__(self, first: FirstStates) -> None:
        self._first = first
        self._known: dict[tuple[str, bool], Mapping[str, int]] = {}

    def of(self, mode: str, is_new: bool) -> Mapping[str, int]:
        if (mode, is_new) not in self._known:
            with tempfile.TemporaryDirectory(prefix="qvl-faults-") as scratch:
                setting = Setting.of(mode, is_new, 0, "local", Path(scratch), self._first)
                counts = Path(scratch) / "counts"
                counts.touch()
                run = setting.start(PACE_S, **{crash.ENVIRONMENT: f"{crash.COUNT}{counts}"})
                assert run.wait() == 0, run.output()
                found = collections.Counter(counts.read_text().splitlines())
            self._known[mode, is_new] = found
        return self._known[mode, is_new]

    def places(self, mode: str) -> list[str]:
        """Return what a mode passes, in the order of a run."""
        found = {place for is_new in starts(mode) for place in self.of(mode, is_new)}
        return [place for place in crash.PLACES if place in found]


def starts(mode: str) -> tuple[bool, ...]:
    """Return whether a mode begins with new tables, with rows in them, or with either."""
    return (False, True) if mode in ("append", "upsert", "replace") else (False,)


def cases(
    passages: Passages, seeds: int, stores: list[str], places: list[str], modes: list[str]
) -> Iterator[Case]:
    """Yield every place in every mode that passes it."""
    passed = {mode: passages.places(mode) for mode in modes}
    for seed in range(seeds):
        for place in places:
            for mode in modes:
                for store in stores:
                    if place in passed[mode]:
                        yield Case(place, mode, store, seed)


def run_case(case: Case, passages: Passages, folder: Path, first: FirstStates) -> Result:
    """Make the first state, kill a run on the second, run again until it ends well."""
    rng = random.Random(case.name)
    # Creating the tables is a thing to be killed in, too.
    possible = [new for new in starts(case.mode) if passages.of(case.mode, new)[case.place]]
    is_new = rng.choice(possible)
    variant = rng.randrange(VARIANTS)
    setting = Setting.of(case.mode, is_new, variant, case.store, folder, first)
    nth = rng.randint(1, passages.of(case.mode, is_new)[case.place])
    pace_s = 0.0
    if case.place == "lease-renewal":
        nth, pace_s = 1, PACE_S
    token = folder / "token"
    token.touch()
    problems: list[str] = []
    with setting.watched(problems):
        asked = {crash.ENVIRONMENT: f"{case.place}:{nth}:{token}"}
        run = setting.start(pace_s, **asked)
        code = run.wait()
        assert code in (0, -9), run.output()
        started_s, reruns, killed = time.monotonic(), 0, code == -9
        while code and reruns < MAX_RERUNS:
            reruns += 1
            run = setting.start()
            code = run.wait()
        recover_s = time.monotonic() - started_s
    if code:
        problems.append(f"ended with {code}: {run.output()[-2000:]}")
    found = setting.outcome()
    return Result(
        case,
        killed,
        reruns,
        round(recover_s, 2),
        found.lost,
        found.duplicated,
        found.foreign,
        (*found.problems, *problems),
    )


@contextlib.contextmanager
def s3_server() -> Iterator[Storage]:
    """Run an S3 server on loopback for as long as the matrix lasts."""
    secrets = {"AWS_ACCESS_KEY_ID": "faults", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
    os.environ |= secrets | {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    server = Path(__file__).parents[1] / "s3" / "serve_counted.py"
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(server)]
        with serve(command, Path(logs) / "log", timeout_s=90) as endpoint:
            yield Storage(endpoint_url=endpoint, region="us-east-1")


def run_matrix(
    wanted: list[Case], passages: Passages, results: Path | None, first: FirstStates
) -> list[Result]:
    """Run the cases that the results do not hold yet; return all of them."""
    found = read_results(results)
    for case in wanted:
        if case.name in found:
            continue
        with tempfile.TemporaryDirectory(prefix="qvl-faults-") as scratch:
            found[case.name] = run_case(case, passages, Path(scratch), first)
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(asdict(found[case.name])) + "\n")
        if not found[case.name].is_right:
            print(f"WRONG: {found[case.name]}", flush=True)
    return [found[case.name] for case in wanted]


def read_results(path: Path | None) -> dict[str, Result]:
    """Return what an earlier run of the matrix found, by the cases' names."""
    found: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        values = json.loads(line)
        case = Case(**values.pop("case"))
        found[case.name] = Result(case, **values | {"problems": tuple(values["problems"])})
    return found


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table, a row a place and a mode."""
    lines = [
        "| place | mode | runs | killed | lost | duplicated | other problems | s to recover: "
        "median, max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.place, result.case.mode), []).append(result)
    for (place, mode), group in sorted(groups.items(), key=lambda item: _order(*item[0])):
        other = sum(r.foreign + len(r.problems) + (r.reruns > 1) for r in group)
        took = sorted(r.recover_s for r in group if r.killed) or [0.0]
        lines.append(
            f"| {place} | {mode} | {len(group)} | {sum(r.killed for r in group)} "
            f"| {sum(r.lost for r in group)} | {sum(r.duplicated for r in group)} | {other} "
            f"| {took[len(took) // 2]:.1f}, {took[-1]:.1f} |"
        )
    total = (len(results), *(sum(getattr(r, n) for r in results) for n in _SUMMED))
    lines.append("| all | | {} | {} | {} | {} | | |".format(*total))
    return "\n".join(lines)


_SUMMED = ("killed", "lost", "duplicated")


def _order(place: str, mode: str) -> tuple[int, int]:
    places, modes = list(crash.PLACES), list(scenario.MODES)
    return (
        places.index(place) if place in places else len(places),
        modes.index(mode) if mode in modes else len(modes),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--stores", default="local,s3")
    parser.add_argument("--places", default=",".join(crash.PLACES), help="comma-separated")
    parser.add_argument("--modes", default=",".join(scenario.MODES), help="comma-separated")
    parser.add_argument("--results", type=Path, help="JSON lines to go on with")
    asked = parser.parse_args()
    chosen = asked.stores.split(","), asked.places.split(","), asked.modes.split(",")
    with contextlib.ExitStack() as held:
        storage = held.enter_context(s3_server()) if "s3" in chosen[0] else None
        first = held.enter_context(FirstStates(storage))
        passages = Passages(first)
        wanted = list(cases(passages, asked.seeds, *chosen))
        results = run_matrix(wanted, passages, asked.results, first)
    print(table(results))
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
