"""What a clone holds: only what it should, and commands that say the same everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "README.md",
    "infra",
    "pipelines",
    "pyproject.toml",
    "qvl_batch",
    "requirements.lock",
    "tests",
}

# Written so that no pattern matches its own text here.
FORBIDDEN = {
    # The home of the user in Ray's own images is the same everywhere.
    "a path of one machine": r"/wor[k]/\w|/tmp/de[v]\b|/roo[t]/\w|/hom[e]/(?!ray\b)\w|/User[s]/\w"
    r"|\.pyen[v]\b",
    "a host of a package registry": r"pypi\.or[g]|pythonhosted\.or[g]|download\.pytorch\.or[g]"
    r"|registry\.npmjs\.or[g]|deb\.debian\.or[g]|crates\.i[o]\b|anaconda\.or[g]",
    "an option that names a package registry": r"--(extra-)?index-ur[l]|--find-link[s]"
    r"|--trusted-hos[t]|PIP_(EXTRA_)?INDEX_UR[L]|PIP_FIND_LINK[S]",
}


def tracked_files() -> list[str]:
    # A clone may belong to another user than the one who runs the tests.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return listing.decode().rstrip("\0").split("\0")


def forbidden_in(text: str) -> list[str]:
    """Return ``LINE: what: the match`` for everything that no tracked file may hold."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {what}: {match.group()}"
        for what, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]


def first_commands_of_readme() -> list[str]:
    block = re.search(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    return block[1].splitlines()


def requirements(*extras: str) -> list[Requirement]:
    """Return what the package and these extras need; an extra may name others of ours."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            ours = requirement.name == PROJECT["name"]
            found += requirements(*requirement.extras) if ours else [requirement]
    return found


def pins() -> dict[str, Version]:
    """Return name -> version of the lock file, which holds nothing but ``name==version``."""
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert pin is not None, f"not a plain pin: {line!r}"
            found[canonicalize_name(pin[1])] = Version(pin[2])
    return found


def test_top_level_holds_only_what_the_design_names():
    assert {name.split("/")[0] for name in tracked_files()} <= TOP_LEVEL


def test_no_tracked_file_names_a_machine_or_a_registry():
    found = []
    for name in tracked_files():
        path = ROOT / name
        # A deleted file is tracked until it is committed; bytes that are no text hold no path.
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content[:8192]:
            text = content.decode("utf-8", errors="replace")
            found += [f"{name}:{line}" for line in forbidden_in(text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "cd /wor{}k/clone",
        "x = '/hom{}e/someone'",
        "pip install --index-ur{}l x",
        "https://pypi.or{}g",
    ],
)
def test_a_forbidden_word_is_found(text):
    assert forbidden_in("first line\n" + text.format("")) != []
    assert forbidden_in("s3://bucket/homework/1 /tmp/developer") == []


def test_license_is_apache_2():
    title = " ".join((ROOT / "LICENSE").read_text().split()[:7])
    assert title == "Apache License Version 2.0, January 2004 http://www.apache.org/licenses/"
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]


def test_readme_starts_with_the_two_commands():
    assert first_commands_of_readme() == [
        "pip install -e . && qvl-batch demo",
        "pip install -e '.[test]' && pytest",
    ]


def test_ci_ends_with_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == first_commands_of_readme()[1]
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_requirement_has_a_pin_within_its_bounds():
    locked = pins()
    assert "duckdb" in {requirement.name for requirement in requirements("test")}
    outside = {
        str(requirement): locked.get(canonicalize_name(requirement.name))
        for requirement in requirements("test")
        if canonicalize_name(requirement.name) not in locked
        or locked[canonicalize_name(requirement.name)] not in requirement.specifier
    }
    assert outside == {}
