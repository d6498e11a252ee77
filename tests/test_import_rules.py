"""Who may import what (the rooms of the package), checked in every module's syntax tree.

Every import counts, wherever it stands: in a function, under ``TYPE_CHECKING``, relative, or as
``importlib.import_module("literal")``. A string that only names a function, such as
``"qvl_batch.model.resize:resize_frame"``, is an argument and no import: whoever runs the room may
pass one room to another that way.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "qvl_batch"
ROOT = Path(__file__).parent.parent / PACKAGE

ROOMS = {"media", "model", "tables", "jobs", "api", "demo"}
# What starts the program; nothing else may import it.
ENTRIES = {"cli", "__main__"}

# What a user imports on purpose, beside the package itself; nothing else may import it.
DOORS = {"lancedb"}

# Which other rooms a room may enter; the shared modules at the top level enter none.
MAY_ENTER: dict[str, set[str]] = {
    "media": set(),
    "model": set(),
    "tables": set(),
    # Of api only the parity check and its certificate, which a run needs before it writes: `ONLY`.
    "jobs": {"media", "model", "tables", "api"},
    "api": {"media", "model", "tables"},
    "demo": {"media", "model", "tables", "jobs", "api"},
    "cli": ROOMS,
    # A part of cli.
    "cli_upkeep": ROOMS,
    "__main__": {"cli"},
    "lancedb": {"api"},
    # What a notebook holds, imported when it is asked for.
    "__init__": {"api"},
}
# Where a room may enter another by these modules alone.
ONLY = {("jobs", "api"): {"parity", "certificate"}}
# The package's own names that are imported from api when they are asked for.
EXPORTED = {"Embedder", "Reranker", "connect"}

# The only rooms that may import a third-party package; an unnamed package is free.
OWNERS: dict[str, set[str]] = {
    "ray": {"jobs"},
    "torch": {"model", "demo"},
    "transformers": {"model"},
    "tokenizers": {"model"},
    "huggingface_hub": {"model"},
    "safetensors": {"model"},
    "av": {"media", "demo"},
    "PIL": {"media", "demo"},
    "pypdfium2": {"media", "demo"},
    "lance": {"tables"},
    "lancedb": {"tables"},
    # What the official model code needs and this package replaces.
    "torchvision": set(),
    "qwen_vl_utils": set(),
    "decord": set(),
}

HEAVY = {*OWNERS, "pyarrow"}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Args:
        target: Dotted name. ``from a import b`` counts as ``a.b``, since `b` may be a module.
        line: Where it stands.
        at_start: Whether it runs when its module is imported.
    """

    target: str
    line: int
    at_start: bool


def is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def imports_of(tree: ast.AST, package: list[str], at_start: bool = True) -> Iterator[Import]:
    """Yield every import below `tree`, a node of a module that lies in `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_start)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            first = node.args[0] if node.args else None
            if (
                name in ("import_module", "__import__")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                # A relative literal (".x") names this package or one above it.
                dots = len(first.value) - len(first.value.lstrip("."))
                parents = package[: len(package) - dots + 1] if dots else []
                target = ".".join([*parents, first.value.lstrip(".")])
                yield Import(target, node.lineno, at_start)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            yield from imports_of(ast.Module(node.body, []), package, at_start=False)
            yield from imports_of(ast.Module(node.orelse, []), package, at_start)
        else:
            yield from imports_of(node, package, at_start and not later)


def violations(root: Path) -> list[str]:
    """Return one line for each import of the package at `root` that breaks a rule.

    Raises:
        SyntaxError: If a module can not be parsed.
    """
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        place = inside.parts[0].removesuffix(".py")
        package = [PACKAGE, *inside.parts[:-1]]
        for found_import in imports_of(ast.parse(path.read_bytes(), str(path)), package):
            problem = problem_of(place, found_import)
            if problem:
                found.append(f"{inside}:{found_import.line}: {problem}")
    return found


def problem_of(place: str, found: Import) -> str | None:
    """Return what is wrong with an import in `place` (a room or a top-level module), if anything.

    A directory that is not a room is held to the rules of the shared modules.
    """
    top, *rest = found.target.split(".")
    if top != PACKAGE:
        if place in OWNERS.get(top, {place}):
            return None
        return f"{place} imports {top}, which belongs to {sorted(OWNERS[top]) or 'no room'}"
    other = rest[0] if rest else ""
    if other in EXPORTED:
        return f"{place} imports {other} by its public name instead of from api"
    if other not in ROOMS | ENTRIES | DOORS or other == place:
        return None
    if other not in MAY_ENTER.get(place, set()):
        return f"{place} imports {other}"
    only = ONLY.get((place, other))
    if only and not only & set(rest[1:2]):
        return f"{place} imports more of {other} than {', '.join(sorted(only))}"
    if place in {"__init__", *ENTRIES} and other in ROOMS and found.at_start:
        return f"{place} imports {other} when it starts instead of in the command that needs it"
    return None


def test_every_module_keeps_to_its_room():
    assert violations(ROOT) == []


def test_every_directory_of_the_package_is_a_room():
    directories = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert directories == ROOMS


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("media/a.py", "import ray", "media imports ray"),
        ("media/a.py", "import torch.nn.functional as F", "media imports torch"),
        ("media/a.py", "from qvl_batch.model.resize import resize_frame", "media imports model"),
        ("media/a.py", "from qvl_batch import tables", "media imports tables"),
        ("media/deep/a.py", "from ...model import resize", "media imports model"),
        ("media/deep/a.py", "from ... import model", "media imports model"),
        ("media/__init__.py", "from ..model import resize", "media imports model"),
        ("model/a.py", "def f():\n    from PIL import Image", "model imports PIL"),
        ("model/a.py", "import torchvision", "belongs to no room"),
        ("model/a.py", "from qvl_batch.demo import draw", "model imports demo"),
        ("tables/a.py", "if TYPE_CHECKING:\n    import torch", "tables imports torch"),
        ("tables/a.py", "class A:\n    from qvl_batch.media import b", "tables imports media"),
        ("tables/a.py", "importlib.import_module('ray.data')", "tables imports ray"),
        ("tables/a.py", "x = [import_module('qvl_batch.jobs')]", "tables imports jobs"),
        ("tables/a.py", "import_module('..model', __package__)", "tables imports model"),
        ("jobs/a.py", "import lance", "jobs imports lance"),
        ("jobs/a.py", "import qvl_batch.cli", "jobs imports cli"),
        ("api/a.py", "import lancedb.embeddings", "api imports lancedb"),
        ("api/a.py", "lambda: __import__('ray')", "api imports ray"),
        ("api/a.py", "async def f():\n    import qvl_batch.jobs.embed", "api imports jobs"),
        (
            "api/a.py",
            "try:\n    import qvl_batch.demo\nexcept ImportError: ...",
            "api imports demo",
        ),
        ("demo/a.py", "import transformers", "demo imports transformers"),
        ("storage.py", "import pypdfium2", "storage imports pypdfium2"),
        ("storage.py", "def f():\n    from .media import fetch", "storage imports media"),
        ("cli.py", "def main():\n    import ray", "cli imports ray"),
        ("cli.py", "from qvl_batch.jobs import embed", "when it starts"),
        (
            "jobs/a.py",
            "from qvl_batch.api.embedder import Embedder",
            "more of api than",
        ),
        ("jobs/a.py", "from qvl_batch import api", "more of api than"),
        ("jobs/a.py", "from qvl_batch import Embedder", "by its public name"),
        ("media/a.py", "from qvl_batch import Reranker", "by its public name"),
        ("__init__.py", "from qvl_batch.api.embedder import Embedder", "when it starts"),
        ("__init__.py", "def f():\n    import qvl_batch.jobs.embed", "__init__ imports jobs"),
        ("other/a.py", "import qvl_batch.media", "other imports media"),
        ("jobs/a.py", "import qvl_batch.lancedb", "jobs imports lancedb"),
        ("lancedb.py", "from qvl_batch.tables import search", "lancedb imports tables"),
        ("lancedb.py", "import lancedb", "lancedb imports lancedb"),
    ],
)
def test_the_checker_finds(tmp_path, module, source, problem):
    path = tmp_path / PACKAGE / module
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A module."""\nimport json\n{source}\n')

    found = violations(tmp_path / PACKAGE)

    assert len(found) == 1, found
    assert problem in found[0]
    assert found[0].startswith(f"{module}:")


def test_the_checker_allows_what_the_design_allows(tmp_path):
    allowed = {
        "media/a.py": "import av, PIL.Image\nfrom ..storage import Storage\nfrom . import b",
        "model/a.py": "import torch, transformers\nfrom qvl_batch import budget, recipe",
        "tables/a.py": "import lance, lancedb, torchlike\nfrom qvl_batch.tables.b import c",
        "jobs/a.py": "import ray.data\nfrom qvl_batch.media import b\nfrom qvl_batch import model\n"
        "stage(resize='qvl_batch.model.resize:resize_frame', engine='torch')\n"
        "from qvl_batch.api.parity import check_stack",
        "__init__.py": "def __getattr__(name):\n    from qvl_batch.api.embedder import Embedder",
        "api/a.py": "def connect():\n    from qvl_batch.tables import search",
        "demo/a.py": "import torch, PIL\nfrom qvl_batch.jobs import embed",
        "cli.py": "import typer\nif TYPE_CHECKING:\n    from qvl_batch.jobs import b\n"
        "def demo():\n    from qvl_batch import demo, jobs",
        "__main__.py": "from qvl_batch.cli import main",
        "lancedb.py": "from qvl_batch.api.lancedb_plugins import Int8Rescorer",
        "storage.py": "import fsspec\nfrom qvl_batch.errors import StorageError",
    }
    for module, source in allowed.items():
        path = tmp_path / PACKAGE / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    assert violations(tmp_path / PACKAGE) == []


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a new interpreter holds after `statement`."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by(f"import {PACKAGE}")
    assert PACKAGE in loaded
    assert loaded & HEAVY == set()


def test_the_shared_modules_load_nothing_that_a_room_owns():
    apart = {"__init__", *ENTRIES, *DOORS}
    names = [path.stem for path in ROOT.glob("*.py") if path.stem not in apart]
    assert "schema" in names
    loaded = loaded_by("\n".join(f"import {PACKAGE}.{name}" for name in names))
    assert loaded & set(OWNERS) == set()


def test_the_lancedb_plug_ins_load_no_model():
    loaded = loaded_by(f"import {PACKAGE}.lancedb")
    assert "lancedb" in loaded
    assert loaded & {"torch", "transformers", "ray", "av", "PIL"} == set()


def test_starting_the_command_loads_nothing_that_a_room_owns():
    if (ROOT / "cli.py").exists():
        assert loaded_by(f"import {PACKAGE}.cli") & set(OWNERS) == set()


def test_the_look_at_loaded_packages_can_fail():
    assert "pyarrow" in loaded_by(f"import {PACKAGE}.schema")
