"""Every command in README and docs is one: its options exist, its values are taken, what it names is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dywspan.cli import make_parser
from dywspan.distill.config import DistillConfig
from dywspan.evaluate.config import QualityConfig
from dywspan.settings import make_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHED = re.compile(r"(?:\S+=\S+ )*(?:accelerate launch|torchrun)(?: --\S+ [\w.]+)* (?:-m )?(\S+)(.*)")


def commands(document: Path) -> Iterator[str]:
    """Of blocks of shell, fenced or indented, a line each, those that end in a backslash joined."""
    text = re.sub(r"```(?!bash|sh\b)\w+\n.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    fenced = False
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            command = re.sub(r"\s+#.*", "", line.strip())
            if re.match(r"(dywspan|make|python|accelerate|torchrun|ACCELERATE_USE_CPU=\S+ torchrun)\s", command):
                yield command


FOUND = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


def arguments(command: str) -> list[str] | None:
    """Those of the command line's program; None where another one is started."""
    if launched := LAUNCHED.fullmatch(command):
        program, rest = launched.groups()
        names = {"training/distill.py": ["distill"], "dywspan.distill": ["distill"], "dywspan.cli": []}
        assert program in names, f"{program} is not known"
        return [*names[program], *shlex.split(rest.replace("...", ""))]
    return shlex.split(command.replace(" ...", ""))[1:] if command.startswith("dywspan ") else None


def test_there_are_commands() -> None:
    assert len(FOUND) > 40 and {name for name, _ in FOUND} >= {"README.md", "tables.md", "evaluation.md", "training.md"}


@pytest.mark.parametrize(("document", "command"), FOUND, ids=[f"{d}-{i}" for i, (d, _) in enumerate(FOUND)])
def test_it_can_be_typed(document: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = arguments(command)
    if given is None:
        program, *rest = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        else:
            assert (ROOT / rest[0]).exists() or rest[0] in ("-m", "-c"), command
        return
    parsed: dict[str, Any] = vars(make_parser().parse_args(given))
    configs = parsed.get("config")
    for config in configs if isinstance(configs, list) else [configs]:
        if config is not None and Path(config).exists():
            kind = QualityConfig if "evaluate" in parsed["run"].__name__ else DistillConfig
            names = {field for field in kind.__dataclass_fields__} | {"config"}
            settings = {k: v for k, v in parsed.items() if k in names} | {"config": config}
            make_config({"output": "somewhere", **settings}, kind)
