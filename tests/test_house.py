"""Imports point down: the floors of docs/architecture.md, held by reading every file's imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import coatnet

HOUSE = Path(coatnet.__file__).parent
FLOORS = (  # top to bottom; a room imports from lower floors or from itself
    ("cli",),
    ("studies",),
    ("bench",),
    ("training", "serving"),
    ("evaluation", "deploy", "plan"),
    ("classifier",),
    ("fast",),
    ("model",),
    ("data", "recipes", "family_table", "weights"),
    ("zoo", "layout", "typed"),
    ("config",),
    ("record", "ranks", "native"),
    ("files", "heartbeat"),
    ("errors",),
)
HEIGHT = {room: len(FLOORS) - number for number, floor in enumerate(FLOORS) for room in floor}
TOP = {"__init__", "__main__"}  # the package's own face sees every room


def room_of(file: Path) -> str:
    """Return the part of the house a file is in: its folder, or its own name at the root."""
    first = file.relative_to(HOUSE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield the full name of each module that is imported, or of what is taken from it, with its line.

    `inside` is the package that the file is in, from which relative imports count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    inside = ("coatnet", *file.relative_to(HOUSE).parts[:-1])
    yield from imports(ast.parse(file.read_text(encoding="utf-8")), inside)


def complaint(room: str, name: str) -> str | None:
    """Return what is wrong with an import of ours into a room, if anything."""
    parts = name.split(".")
    if parts[0] != "coatnet" or room in TOP or len(parts) == 1:
        return None
    target = parts[1]
    if target.startswith("__") or target == room:
        return None
    if target in {room_of(file) for file in FILES} - set(HEIGHT):
        return f"imports {target}, which is on no floor"
    if target not in HEIGHT:
        return f"takes {target} from the package's face, which sees every room"
    if HEIGHT[target] > HEIGHT[room]:
        return f"imports {target}, which is above {room}"
    if HEIGHT[target] == HEIGHT[room]:
        return f"imports {target}, which is beside {room} on one floor"
    return None


FILES = sorted(HOUSE.rglob("*.py"))


def test_there_is_a_house():
    assert {"errors", "config", "zoo", "model"} <= {room_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_imports_point_down(file: Path):
    room = room_of(file)
    assert room in HEIGHT or room in TOP, f"{room} is on no floor: give it one in FLOORS and in docs/architecture.md"
    found = [f"line {line} {bad}" for name, line in imports_of(file) if (bad := complaint(room, name))]
    assert not found, f"{file.relative_to(HOUSE)}: " + "; ".join(found)


def test_only_ranks_talks_to_other_processes():
    found = [
        f"{file.relative_to(HOUSE)}:{line}"
        for file in FILES
        for name, line in imports_of(file)
        if name.startswith("torch.distributed") and room_of(file) != "ranks"
    ]
    assert not found, f"torch.distributed is imported in {found}; only ranks.py may"


def test_no_file_of_odds_and_ends():
    found = [file.name for file in FILES if file.stem in ("util", "utils", "helpers", "misc", "common")]
    assert not found, f"{found}: name a file after the one thing it holds"


@pytest.mark.parametrize(
    ("room", "source", "bad"),
    [
        ("model", "from coatnet.training.loop import train", "imports training, which is above model"),
        ("serving", "import coatnet.training", "imports training, which is beside serving on one floor"),
        ("serving", "def f():\n    from coatnet import training", "imports training, which is beside serving"),
        ("data", "from ..model import network", "imports model, which is above data"),
        ("data", "from . import decode", None),
        ("zoo", "from coatnet.config import ModelConfig", None),
        ("zoo", "from coatnet.layout import count", "imports layout, which is beside zoo on one floor"),
        ("model", "from coatnet import create_model", "takes create_model from the package's face"),
        ("model", "from coatnet import __version__", None),
        ("__init__", "from coatnet.cli import main", None),
        ("model", "import torch", None),
    ],
)
def test_it_sees_an_import_that_points_up(room: str, source: str, bad: str | None):
    ((name, _),) = imports(ast.parse(source), ("coatnet", room))
    found = complaint(room, name)
    assert found is None if bad is None else found is not None and bad in found, found
