"""The package's modules stand in layers: what may import what, without circles, and none past 400 lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dywspan"
FILES = {
    ".".join(("dywspan", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
UPPER = {"pipelines", "distill", "evaluate", "tuning", "bench", "app"}
# Of each folder, those of the package that it imports nothing of.
FORBIDDEN = {
    "core": {name.split(".")[1] for name in FILES if "." in name} - {"core"},
    "schedulers": {*UPPER, "edm"},
    "edm": UPPER,
    "pipelines": UPPER - {"pipelines"},
    "distill": {"evaluate", "tuning", "bench", "app"},
    "evaluate": {"distill", "tuning", "bench", "app"},
    "tuning": {"bench", "app"},
    "bench": {"app"},
    "app": {"distill", "tuning", "bench"},
}


def imported(name: str) -> Iterator[str]:
    """The modules of the package that a module's source names: everywhere in it, functions and types included."""
    inside = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) + 1 - node.level] if node.level else []
            module = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:  # a module of a package, or something in a module
                inner = f"{module}.{alias.name}"
                yield from (found for found in [inner if inner in FILES else module] if found in FILES)


IMPORTS = {name: {*imported(name)} - {name} for name in FILES}


def test_imports_are_read() -> None:
    assert {"dywspan.core.table", "dywspan.schedulers.apply"} <= IMPORTS["dywspan"]
    assert {"dywspan.bench.tune", "dywspan.evaluate.report"} <= IMPORTS["dywspan.commands.bench"], "in functions too"


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_layer_imports_nothing_of_those_above(folder: str) -> None:
    own = [name for name in FILES if name.split(".")[1:2] == [folder]]
    assert own
    wrong = {(name, other) for name in own for other in IMPORTS[name] if {*other.split(".")[1:2]} & FORBIDDEN[folder]}
    assert not wrong


USERS = [("bench", "dywspan.commands.bench"), ("app", "dywspan.commands.app"), ("commands", "dywspan.cli")]


@pytest.mark.parametrize(("folder", "user"), USERS)
def test_nothing_but_the_command_line_imports_it(folder: str, user: str) -> None:
    inside = f"dywspan.{folder}."
    users = {name for name, others in IMPORTS.items() if any(f"{o}.".startswith(inside) for o in others)}
    assert {name for name in users if not f"{name}.".startswith(inside)} == {user}


def test_imports_go_in_no_circle() -> None:
    try:
        [*TopologicalSorter(IMPORTS).static_order()]
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_module_is_past_400_lines() -> None:
    long = {name for name, path in FILES.items() if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert not long
