"""What the documents say is what was measured, and what they point to exists.

``DYWSPAN_WRITE_DOCS=1 pytest tests/test_docs.py`` writes what stands between ``<!-- table: ... -->``, ``<!-- zoo -->``
or ``<!-- peers: SUBJECT -->`` and ``<!-- end -->``. A table's mark names a file of docs/results and a metric, and where
they are said numbers of evaluations, one ``variant=``, some ``rows=``, and ``short`` for no intervals.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.evaluate.report import by_variant, read_results, table
from dywspan.text import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- (table: [^>]*?|peers: [^>]*?|zoo) -->\n\n)(.*?)(\n?<!-- end -->)", re.S)


def grids(results: dict[str, Any], **which: Any) -> list[str]:
    blocks = table(results, **which).split("\n\n")
    return [blocks[i + 1] for i, block in enumerate(blocks) if block.startswith("**")]


def measured(said: str) -> str:
    """The table that a mark asks for; one for each variant of the call, below its name."""
    name, metric, *options = said.split()
    named = {key: value.replace("_", " ") for key, _, value in (option.partition("=") for option in options)}
    steps = [int(option) for option in options if option.isdigit()] or None
    found = []
    for variant, part in by_variant(read_results(RESULTS / f"{name}.json")).items():
        if named.get("variant", variant) != variant:
            continue
        (grid,) = grids(part, metrics=[metric], steps=steps, intervals="short" not in named)
        head, line, *rows = grid.splitlines()
        if kept := named.get("rows"):
            rows = [row for solver in kept.split(";") for row in rows if row.split("|")[1].strip() == solver]
            assert len(rows) == len(kept.split(";"))
        title = f"{variant}:\n\n" if variant and "variant" not in named else ""
        found.append(title + "\n".join([head, line, *rows]))
    return "\n\n".join(found)


def compared(subject: str) -> str:
    """Learned solvers on one subject, once they are measured."""
    file = RESULTS / "peers.json"
    rows = read_results(file)["rows"] if file.exists() else []
    if not any(row["subject"] == subject for row in rows):
        return "Not measured yet."
    return runpy.run_path(str(ROOT / "examples" / "peers" / "report.py"))["tables"](rows, subject)


FILL = {"table": measured, "peers": compared, "zoo": lambda said: zoo()}  # by a mark's first word

# What an artefact's configuration may hold, the last thing that was learned first.
KINDS = {
    "continuous_lift": "continuous SpanLift",
    "continuous": "continuous",
    "time_lifts": "TimeLift",
    "lifts": "SpanLift",
    "tables": "table",
}


def zoo() -> str:
    """A line for each solver in examples/, from its configuration."""
    rows = []
    for file in sorted((ROOT / "examples").rglob("scheduler_config.json")):
        config, folder = json.loads(file.read_text()), file.parent.relative_to(ROOT)
        if "dywspan_version" not in config:
            continue
        part = next(part for part in KINDS if config.get(part))
        kind = KINDS[part]
        if config.get("lifts") and part == "time_lifts":
            part, kind = "lifts", "SpanLift on TimeLift"
        own = config[part] if part in ("time_lifts", "lifts", "tables") else {"": config[part]}
        learned = [numbers["provenance"] for numbers in own.values()]
        errors = {n: p["held_out_error"] for n, p in zip(own, learned)}
        errors = errors.get("", errors)
        scales = [c.get("guidance_scale") for c in (learned[0].get("variants") or {"": learned[0]["call"]}).values()]
        row = {
            "solver": f"[{folder.relative_to('examples')}](../{folder})",
            "for": Path(learned[0]["base_model"]).name,
            "kind": kind,
            "steps": "any" if "" in own else said(sorted(map(int, own))),
            "guidance": ", ".join(f"{scale:g}" for scale in dict.fromkeys(scales) if scale is not None),
            "learned by": "; ".join(
                dict.fromkeys(f"{p['learning']['optimizer']}, {p['pairs']['train']} pairs" for p in learned)
            ),
            "loss": ", ".join(dict.fromkeys(p["loss"].removeprefix("latent_") for p in learned)),
        }
        ends = {n: "{before:.3g} to {after:.3g}".format_map(errors[n]) if n in errors else "" for n in ("3", "5")}
        rows.append(row | {f"error, {n} steps": shown for n, shown in ends.items()})
    return markdown(rows)


def said(steps: list[int]) -> str:
    """Numbers of steps in order, those without a gap by their ends."""
    whole = len(steps) > 2 and steps == [*range(steps[0], steps[-1] + 1)]
    return f"{steps[0]} to {steps[-1]}" if whole else ", ".join(map(str, steps))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if MARKED.search(d.read_text())], ids=lambda p: p.name)
def test_tables_are_the_recorded_measurements(document: Path) -> None:
    """What the text says of them is for people: `dywspan bench table NEW --against OLD` shows what to write anew."""

    def fill(match: re.Match[str]) -> str:
        kind, _, said = match[2].partition(": ")
        return f"{match[1]}{FILL[kind](said)}\n\n<!-- end -->"

    text = document.read_text(encoding="utf-8")
    if os.environ.get("DYWSPAN_WRITE_DOCS") == "1":
        document.write_text(text := MARKED.sub(fill, text), encoding="utf-8")
    assert text == MARKED.sub(fill, text), "Run: DYWSPAN_WRITE_DOCS=1 pytest tests/test_docs.py"


def test_every_evaluation_is_in_the_tables() -> None:
    said = {match[2].split()[1] for match in MARKED.finditer((ROOT / "docs" / "tables.md").read_text())}
    recorded = {f.stem for f in RESULTS.glob("*.json") if "metrics" in json.loads(f.read_text())}
    assert said == recorded - {"timelift"}, "that is in timelift.md"


def test_every_snippet_is_python_of_this_package() -> None:
    """It compiles, and every name that it takes from dywspan is there."""
    taken = set()
    for document in DOCUMENTS:
        for snippet in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S):
            for node in ast.walk(ast.parse(snippet, document.name)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dywspan":
                    taken |= {(node.module or "", alias.name) for alias in node.names}
                elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dywspan":
                    taken.add(("dywspan", node.attr))
    assert len(taken) > 15
    assert not {f"{module}.{name}" for module, name in taken if name not in defined(module)}


def defined(module: str) -> set[str]:
    """The names that a module's source defines, or lists in ``__all__``; its own modules. Nothing is imported."""
    path = ROOT.joinpath(*module.split("."))
    names = {file.stem for file in path.glob("*.py")}
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in names and isinstance(node.value, ast.List):
                names |= {e.value for e in node.value.elts if isinstance(e, ast.Constant)}
    return names


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    """What stands in quotes in bold, between its dots, is said somewhere in the sources."""
    constants = []
    for file in (ROOT / "dywspan").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in parts))
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [q for line in re.findall(r"^### (.*)$", text, re.M) for q in re.findall(r'"(.+?)"', line)]
    assert len(quoted) > 20
    others = {"has no attribute DyWeightScheduler", "CUDNN_STATUS", "mha_graph.execute"}  # diffusers' and cuDNN's
    pieces = {piece.strip(" .") for q in quoted if q not in others for piece in re.split(r"\.\.\.|\d+", q)} - {""}
    assert not {piece for piece in pieces if not any(piece in constant for constant in constants)}


def test_least_squares_reaches_what_gradients_do_with_an_eighth_of_the_evaluations() -> None:
    rows = read_results(RESULTS / "distill-cost.json")["rows"]
    cost = {(row["optimizer"], row["num_inference_steps"]): row for row in rows}
    text = " ".join((ROOT / "docs" / "least-squares.md").read_text().split())
    for n in (3, 5, 7):
        adam, squares = cost["adamw", n], cost["least_squares", n]
        assert squares["held_out_error"] <= adam["held_out_error"] and 8 * squares["evaluations"] < adam["evaluations"]
        for row in (adam, squares):
            assert f"{row['evaluations']:,}" in text and f"{row['held_out_error']:.4f}" in text


def test_the_overhead_is_the_recorded_measurement() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "overhead.json").read_text())["rows"]
    shares = {n: max(r["percent_of_denoiser"] or 0 for r in rows if n in r["scheduler"]) for n in ("DyWeight", "Span")}
    texts = [" ".join((ROOT / path).read_text().split()) for path in ("README.md", "docs/spanlift.md")]
    said = f"step takes at most {shares['DyWeight']:.4f} % and a SpanLift step {shares['Span']:.2f} %"
    assert all(said in text for text in texts)
    assert f"{shares['Span']:.2f} % of Stable Diffusion 1.5's UNet" in (ROOT / "docs" / "spanlift.md").read_text()
    ours = [r for r in rows if r["scheduler"].startswith("DyWeight")]
    ratios = [r["ratio_to_dpmpp2m"] for r in ours]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time of diffusers' DPM-Solver++(2M)" in texts[1]
    assert sorted({r["num_inference_steps"] for r in ours}) == [3, 10, 50] and len(ours) == 2 * 3 * 3
    for r in ours:
        held = min(int(r["scheduler"][-1]), r["num_inference_steps"] - 1)  # the last step lets go
        assert r["syncs"] == 0 and r["state_bytes"] == held * 4 * math.prod(r["shape"])


def test_memory_of_learning_is_flat_in_the_number_of_steps_as_the_docs_say() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "memory.json").read_text())["rows"]
    flat = [r["ratio_to_3_steps"] for r in rows if r["recompute"] and r["num_inference_steps"] == 9]
    assert len(flat) == 4 and max(flat) < 1.015
    text = " ".join((ROOT / "docs" / "how-to" / "memory.md").read_text().split())
    assert "1.01 times what one at 3 steps holds, on the embedded pipeline" in text
    (squares,) = (r for r in rows if r["optimizer"] == "least_squares" and "UNet" in r["pipeline"])
    assert squares["ratio_to_sampling"] < 1.05 and f"{squares['ratio_to_sampling']:.2f} times what sampling" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_the_example_of_an_artefact_is_the_shipped_one() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", text, re.S)
    shown = json.loads("{" + block + "}")["tables"]["3"]
    shipped = DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-solvers").tables[3]
    for i, row in enumerate(shown["weights"]):
        assert row == [round(float(w), 4) for w in shipped.weights[i, : len(row)]]
    assert shown["time_scale"] == [round(float(s), 4) for s in shipped.time_scale]


@pytest.mark.parametrize("model", ["emoji-sd", "emoji-flow"])
def test_both_shipped_artefacts_share_their_tables(model: str) -> None:
    base = DyWeightScheduler.from_pretrained(ROOT / "examples" / f"{model}-solvers")
    lifted = SpanLiftScheduler.from_pretrained(ROOT / "examples" / f"{model}-spanlift")
    assert (
        [*base.tables] == [*range(1, 10)]
        and [*lifted.lifts] == [1, 2, 3, 4, 5, 7]
        and {*lifted.tables} >= {*lifted.lifts}
    )
    assert all((lifted.tables[n].weights == base.tables[n].weights).all() for n in lifted.tables)
