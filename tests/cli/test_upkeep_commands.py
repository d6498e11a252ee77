"""verify --deep, prune, delete and gc --give-up as a person calls them."""

from __future__ import annotations

import json
import os
import time

import pytest

from qvl_batch.cli import main
from qvl_batch.errors import StorageError
from qvl_batch.jobs.leasing import refuse_open_replaces
from qvl_batch.tables import fragments, staging
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.tables.store import TableStore
from tests.jobs.upkeep_roots import DAYS, Root, many, table_of, uri_of

FIRST = table_of(DAYS[0])


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(TableStore(str(tmp_path / "root")), tmp_path)


@pytest.fixture
def command(capsys):
    """Run a command; return its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def test_verify_deep_and_the_catalog_made_anew(root, command):
    root.embed({DAYS[0]: many("a")})
    code, out, _ = command("verify", root.store.root, "--deep")
    assert code == 0
    assert f"{FIRST}: 3 of 3 data files compared" in out
    folder = f"{root.store.root}/{FIRST}.lance/data"
    path = f"{folder}/{sorted(os.listdir(folder))[0]}"
    with open(path, "r+b") as file:
        file.seek(40)
        byte = file.read(1)[0]
        file.seek(40)
        file.write(bytes([byte ^ 1]))
    assert command("verify", root.store.root)[0] == 0
    code, out, _ = command("verify", root.store.root, "--deep")
    assert code == 1
    assert "changed file" in out
    code, out, _ = command("verify", root.store.root, "--deep", "--json")
    assert not json.loads(out)["ok"]
    code, out, _ = command("verify", root.store.root, "--rebuild-catalog", "--deep")
    assert "0 of which have a recomputed hash" in out
    assert code == 1


def test_prune_asks_by_exit_code_two(root, command):
    root.embed({DAYS[0]: many("a")})
    config = root.config_file(root.manifest({DAYS[0]: many("a")[5:]}))
    code, out, err = command("prune", config)
    assert (code, out) == (2, "")
    assert "5 of 20" in err
    assert "--yes" in err
    code, out, _ = command("prune", config, "--yes")
    assert code == 0
    assert f"{FIRST}: 5 of 20 units removed" in out
    code, out, _ = command("prune", config)
    assert (code, out) == (0, "Nothing to prune: 1 table(s) hold no unlisted units.\n")


def test_delete_takes_uris_from_a_file_and_names_the_unknown(root, command, tmp_path):
    root.embed({DAYS[0]: many("a")})
    listed = tmp_path / "uris.txt"
    listed.write_text(f"{uri_of('a001')}\n\n{uri_of('nobody')}\n")
    code, out, _ = command(
        "delete", root.store.root, "--uris", listed, "--uri", uri_of("a002"), "--now"
    )
    assert code == 0
    assert f"{FIRST}: 2 rows removed" in out
    assert f"unknown, no row has it: {uri_of('nobody')}" in out
    assert root.holding("about a001") == root.holding("about a002") == []
    code, _, err = command("delete", root.store.root)
    assert code == 2
    assert "--uri" in err
    assert command("delete", root.store.root, "--uris", tmp_path / "absent")[0] == 2


def test_a_replace_is_given_up_as_the_refusal_says(root, command):
    store = root.store
    root.embed({DAYS[0]: many("a")})
    begun = staging.begin(store, FIRST, session="s", digest="d", base_version=1, run_id="killed")
    staged = store.files(FIRST)
    written = _staged_rows(store)
    path = written[0]["files"][0]["path"]
    staging.record(
        store, FIRST, written, ["new"], [], marker="m", run_id="killed", since=begun.version
    )
    with pytest.raises(StorageError) as refused:
        refuse_open_replaces(store, [FIRST])
    said = str(refused.value).split("`")[1].split()
    old = time.time() - 3 * 86_400
    os.utime(f"{store.root}/{FIRST}.lance/{path}", (old, old))
    assert command("gc", store.root, "--older-than", "1d")[0] == 0
    assert staged.contains(path)
    with Leases(lease_place(store.root, store.storage), "at-work") as other:
        other.acquire([FIRST])
        assert command(*said[1:])[0] == 3
    code, out, _ = command(*said[1:], "--older-than", "1d")
    assert code == 0
    assert "is given up" in out
    assert not staged.contains(path)
    refuse_open_replaces(store, [FIRST])
    assert root.names(DAYS[0]) == many("a")
    code, _, err = command(*said[1:])
    assert code == 2
    assert "None is open" in err


def _staged_rows(store: TableStore):
    dataset = store.open(FIRST)
    return fragments.write_to(store, FIRST, dataset.to_table(limit=1).cast(dataset.schema))
