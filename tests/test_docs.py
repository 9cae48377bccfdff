"""What the documents say is what was measured, and what they point to exists."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.evaluate.report import read_results, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def grids(results: dict[str, Any], **which: Any) -> list[str]:
    blocks = table(results, **which).split("\n\n")
    return [blocks[i + 1] for i, block in enumerate(blocks) if block.startswith("**")]


@pytest.mark.parametrize(("model", "samples"), [("emoji-sd", "1,024"), ("emoji-flow", "64")])
def test_the_documents_tables_are_the_recorded_measurement(model: str, samples: str) -> None:
    results = read_results(RESULTS / f"quality-{model}.json")
    document = (ROOT / "docs/emoji.md").read_text()
    assert f"{samples} held-out prompts" in document
    assert results["settings"]["samples"] == int(samples.replace(",", ""))
    assert {row["nfe"] for row in results["rows"]} >= {*range(2, 10)}
    assert len(found := grids(results)) == 3 and all(grid in document for grid in found)
    transfer = read_results(RESULTS / f"quality-{model}-transfer.json")
    assert len(found := grids(transfer)) == 5 and all(grid in document for grid in found)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("continuous", ["latent_rmse"]),
        ("continuous-flow", ["latent_rmse"]),
        ("img2img", ["latent_rmse"]),
        ("quality-emoji-sd-guidance", ["latent_rmse"]),
        ("quality-emoji-sd-fewest", ["latent_mse", "feature_distance"]),
    ],
)
def test_other_tables_are_recorded_measurements_too(name: str, metrics: list[str]) -> None:
    """What the text says of them is for people: `dywspan bench table NEW --against OLD` shows what to write anew."""
    found = grids(read_results(RESULTS / f"{name}.json"), metrics=metrics)
    document = (ROOT / "docs" / "emoji.md").read_text()
    assert found and all(grid in document for grid in found)


def test_the_readmes_table_is_the_recorded_measurement() -> None:
    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    (grid,) = grids(read_results(RESULTS / "timelift-emoji-flow.json"), metrics=["latent_mse"], intervals=False)
    recorded = {name: numbers for name, *numbers in map(cells, grid.splitlines())}
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and "0.0" in line]
    assert len(lines) == 5
    for name, *numbers in map(cells, lines):
        assert recorded[name.removesuffix(", the best classical")] == numbers


def test_least_squares_reaches_what_gradients_do_with_an_eighth_of_the_evaluations() -> None:
    rows = read_results(RESULTS / "distill-cost.json")["rows"]
    cost = {(row["optimizer"], row["num_inference_steps"]): row for row in rows}
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
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
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert "is 1.01 times that at 3 on the embedded pipeline" in text
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


@pytest.mark.parametrize(("model", "counts"), [("emoji-sd", [3, 4, 5, 7]), ("emoji-flow", [3, 4, 5])])
def test_both_shipped_artefacts_share_their_tables(model: str, counts: list[int]) -> None:
    base = DyWeightScheduler.from_pretrained(ROOT / "examples" / f"{model}-solvers")
    lifted = SpanLiftScheduler.from_pretrained(ROOT / "examples" / f"{model}-spanlift")
    assert [*base.tables] == [*range(2, 10)] and [*lifted.lifts] == counts and {*lifted.tables} >= {*counts}
    assert all((lifted.tables[n].weights == base.tables[n].weights).all() for n in lifted.tables)
