"""A run of 1,000 units on a store of which one request in twenty goes wrong."""

from __future__ import annotations

import json
import random
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from qvl_batch.storage import Storage
from tests.conftest import serve
from tests.faults import forked, scenario
from tests.faults.proxy import KINDS

NUM_UNITS = 1000
RATE = 0.05


@dataclass(frozen=True)
class Proxy:
    url: str

    @property
    def storage(self) -> Storage:
        return Storage(endpoint_url=self.url, region="us-east-1")

    def set_rate(self, rate: float) -> dict[str, int]:
        """Change the share of faults; return what was counted until now."""
        with urllib.request.urlopen(f"{self.url}/-/rate/{rate}") as answer:
            return json.load(answer)


@pytest.fixture
def proxy(s3, tmp_path) -> Iterator[Proxy]:
    command = [sys.executable, "-m", "tests.faults.proxy", s3.endpoint_url, "7", "0"]
    with serve(command, tmp_path / "proxy.log", timeout_s=60) as url:
        yield Proxy(url)


def units(count: int) -> list[scenario.Unit]:
    rng = random.Random(count)
    per_day = count // len(scenario.DAYS)
    found = [
        scenario.Unit(f"/media/{day}/{n}{'-bad' if rng.random() < 0.02 else ''}", "v1", day)
        for day in scenario.DAYS
        for n in range(per_day)
    ]
    return found + [
        scenario.Unit(f"/media/more/{n}", "v1", scenario.DAYS[0]) for n in range(count - len(found))
    ]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_one_request_in_twenty_goes_wrong(bucket, proxy, tmp_path, mode) -> None:
    listed = units(NUM_UNITS)
    manifest, config = tmp_path / "manifest.parquet", tmp_path / "config.yaml"
    scenario.write_manifest(manifest, listed)
    took_s = {}
    for rate in (0.0, RATE):
        root = bucket.uri(f"vectors-{rate}")
        scenario.write_config(config, manifest, root, proxy.storage, mode)
        values = yaml.safe_load(config.read_text())
        values["pools"]["units_per_block"] = 64
        config.write_text(yaml.safe_dump(values))
        proxy.set_rate(rate)
        started_s = time.monotonic()
        runs = drive(config, tmp_path / f"log-{rate}.txt")
        took_s[rate] = time.monotonic() - started_s
        counts = proxy.set_rate(0)
        print(f"rate {rate}: {took_s[rate]:.1f} s, {runs} run(s), {counts}")
        if rate:
            assert all(counts.get(kind) for kind in KINDS), counts
        found = scenario.outcome(root, bucket.storage, manifest, [], listed, mode)
        assert found.is_right, found
    print(f"slowed by {took_s[RATE] / took_s[0.0]:.2f}")


def drive(config: Path, log: Path) -> int:
    """Run until one run ends well; return how many there were."""
    for runs in range(1, 4):
        code = forked.start("embed", str(config), log=log).wait(300)
        if code == 0:
            return runs
        said = log.read_text().splitlines()[-1]
        print(f"run {runs} ended with {code}: {said}")
        assert said.startswith("error: "), log.read_text()
    raise AssertionError(log.read_text())
