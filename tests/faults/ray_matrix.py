"""The crash matrix through the whole Ray job: every place in every mode, and parts of the cluster.

    python -m tests.faults.ray_matrix --seeds 2 --results ray-crash-matrix.jsonl
    python -m tests.faults.ray_matrix --seeds 1 --places mid-embed,raylet

As `tests.faults.matrix`, with `qvl-batch embed` on the shipped checkpoint and a local Ray of its
own in each run; the stores alternate. Beside the places in the code, ``raylet`` kills that process
while blocks are embedded, and ``cluster`` the driver and all of Ray at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml
from PIL import Image

from qvl_batch import crash
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir
from qvl_batch.storage import Storage
from tests.faults import scenario
from tests.faults.first_states import FirstStates, copy_root
from tests.faults.matrix import MAX_RERUNS, Case, Result, read_results, s3_server, table

MODES = ("append", "upsert", "replace")
PROCESSES = ("raylet", "cluster")
# Places that these modes do not pass are other commands'.
NOT_HERE = ("index-build", "index-publish", "compaction", "delete")
PLACES = (*(place for place in crash.PLACES if place not in NOT_HERE), *PROCESSES)
NOTES_A_DAY = 8
TIMEOUT_S = 300


@dataclass(frozen=True)
class Corpus:
    """Notes and pictures of three days, in two states of which the second one lies on disk."""

    folder: Path
    before: list[scenario.Unit]
    after: list[scenario.Unit]


def write_notes(folder: Path, state: str) -> list[scenario.Unit]:
    """Write one state of the bucket; return its units."""
    rng = random.Random(state)
    units = []
    for day in scenario.DAYS:
        (folder / day).mkdir(parents=True, exist_ok=True)
        is_later = state == "after"
        for n in range(is_later, NOTES_A_DAY + is_later):
            note = folder / day / f"{n}.txt"
            if not note.exists() or rng.random() < 0.4:
                note.write_text(f"note {n} of {day}, {state}, a {rng.choice(['red', 'blue'])} one")
            units.append(_unit(note, day))
        picture = folder / day / "picture.png"
        Image.new("RGB", (64, 64), (rng.randrange(256), 80, 80)).save(picture)
        broken = folder / day / "picture-bad"
        broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing that follows")
        units += [_unit(picture, day), _unit(broken, day)]
    return units


def _unit(path: Path, day: str) -> scenario.Unit:
    stat = path.stat()
    return scenario.Unit(str(path), f"{stat.st_size}-{stat.st_mtime_ns}", day)


def write_job(folder: Path, units: list[scenario.Unit], root: str, storage: Storage, mode: str):
    """Write manifest and configuration; return their paths."""
    manifest, config = folder / "manifest.parquet", folder / "config.yaml"
    kinds = ["text" if unit.uri.endswith(".txt") else "image" for unit in units]
    scenario.write_manifest(manifest, units, kinds)
    scenario.write_config(config, manifest, root, storage, mode)
    values = yaml.safe_load(config.read_text())
    values["model"] = {"path": str(embedding_dir()), "check": False}
    values["recipe"] = DEMO_RECIPE
    values["pools"]["units_per_block"] = 4
    values["commit"] |= {"interval_s": 0.2, "fragment_bytes": 2**16}
    # A tenth of the units are bad on purpose.
    values["limits"] = {"max_failure_rate": 1.0}
    config.write_text(yaml.safe_dump(values))
    return manifest, config


class Embedding:
    """`qvl-batch embed` with the local Ray that it starts."""

    def __init__(self, config: Path, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qvl_batch.cli", "embed", str(config)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
        self._family: set[psutil.Process] = set()

    def family(self) -> set[psutil.Process]:
        """Return every process that it has started and that may live on."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))
        return self._family

    def wait(self) -> int:
        """Return its exit code; nothing of its Ray is left then."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            self.family()
            if time.monotonic() > deadline_s:
                self.kill()
                raise TimeoutError(self.output())
            time.sleep(0.2)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL the driver and all of its Ray."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def ended_clearly(self) -> bool:
        """Return whether it said in a line of its own what ended it.

        Where its own node's raylet dies, Ray ends the driver's process with a word of its own.
        """
        said = self.output()
        if "Raylet is terminated" in said:
            return True
        return "\nerror: " in f"\n{said}" and "Traceback" not in said

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def kill_process(run: Embedding, place: str, reached: Path, after: int) -> bool:
    """Kill the raylet, or all, at the nth block to be embedded; return whether it came to that."""
    while reached.read_text().count("mid-embed") < after:
        if run.process.poll() is not None:
            return False
        time.sleep(0.02)
    if place == "cluster":
        run.kill()
        return True
    for process in run.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                process.kill()
    return True


class Starts:
    """The roots that a case begins with: the first state embedded once a store, then copied."""

    def __init__(self, corpus: Corpus, first: FirstStates, folder: Path) -> None:
        self._corpus, self._first, self._folder = corpus, first, folder
        self._made: dict[str, str] = {}

    def embed(self, stores: list[str]) -> None:
        """Embed the first state; its files must be on disk."""
        for store in stores:
            folder = self._folder / f"first-{store}"
            folder.mkdir()
            root, storage = self._first.root(store, folder, [], 0)
            _, config = write_job(folder, self._corpus.before, root, storage, "append")
            run = Embedding(config, folder / "log.txt")
            assert run.wait() == 0, run.output()
            self._made[store] = root

    def root(self, store: str, folder: Path) -> tuple[str, Storage]:
        root, storage = self._first.root(store, folder, [], 0)
        copy_root(self._made[store], root, storage)
        return root, storage


def run_case(case: Case, corpus: Corpus, starts: Starts, folder: Path) -> Result:
    """Kill a run on the second state, run again until it ends well."""
    rng = random.Random(case.name)
    root, storage = starts.root(case.store, folder)
    manifest, config = write_job(folder, corpus.after, root, storage, case.mode)
    token, reached = folder / "token", folder / "reached"
    token.touch()
    reached.touch()
    nth = 1 if case.place in ("after-plan", "lease-renewal") else rng.randint(1, 3)
    asked = f"{case.place}:{nth}:{token}"
    if case.place in PROCESSES:
        asked = f"{crash.COUNT}{reached}"
    run = Embedding(config, folder / "log.txt", **{crash.ENVIRONMENT: asked})
    killed = case.place in PROCESSES and kill_process(run, case.place, reached, nth)
    code = run.wait()
    killed = killed or not token.exists()
    started_s, reruns, problems = time.monotonic(), 0, []
    if code and killed and code != -9 and not run.ended_clearly():
        problems.append(f"ended with {code} and no clear error: {run.output()[-2000:]}")
    while code and reruns < MAX_RERUNS:
        reruns += 1
        run = Embedding(config, folder / "log.txt")
        code = run.wait()
    recover_s = time.monotonic() - started_s
    if code:
        problems.append(f"ended with {code}: {run.output()[-2000:]}")
    found = scenario.outcome(root, storage, manifest, corpus.before, corpus.after, case.mode)
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


def cases(seeds: int, stores: list[str], places: list[str], modes: list[str]) -> Iterator[Case]:
    """Yield every place in every mode that passes it, the stores in turn."""
    for seed in range(seeds):
        for number, place in enumerate(places):
            for mode in modes:
                if mode == "replace" or not place.startswith("replace"):
                    store = stores[(seed + number + MODES.index(mode)) % len(stores)]
                    yield Case(place, mode, store, seed)


@contextlib.contextmanager
def prepared(stores: list[str]) -> Iterator[tuple[Corpus, Starts]]:
    """Write the corpus and embed its first state on each store."""
    with contextlib.ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="qvl-ray-faults-")))
        storage = held.enter_context(s3_server()) if "s3" in stores else None
        first = held.enter_context(FirstStates(storage))
        corpus = Corpus(scratch, write_notes(scratch / "media", "before"), [])
        starts = Starts(corpus, first, scratch)
        starts.embed(stores)
        for day in scenario.DAYS:
            (scratch / "media" / day / "0.txt").unlink()
        corpus.after.extend(write_notes(scratch / "media", "after"))
        yield corpus, starts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--stores", default="local,s3")
    parser.add_argument("--places", default=",".join(PLACES), help="comma-separated")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    parser.add_argument("--results", type=Path, help="JSON lines to go on with")
    asked = parser.parse_args()
    stores = asked.stores.split(",")
    wanted = list(cases(asked.seeds, stores, asked.places.split(","), asked.modes.split(",")))
    found = read_results(asked.results)
    todo = [case for case in wanted if case.name not in found]
    with prepared(sorted({case.store for case in todo})) as (corpus, starts):
        for case in todo:
            folder = Path(tempfile.mkdtemp(prefix="qvl-ray-case-"))
            result = found[case.name] = run_case(case, corpus, starts, folder)
            shutil.rmtree(folder, ignore_errors=True)
            if asked.results is not None:
                with asked.results.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
            print(("" if result.is_right else "WRONG: ") + str(result), flush=True)
    results = [found[case.name] for case in wanted]
    print(table(results))
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
