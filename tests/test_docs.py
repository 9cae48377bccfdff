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
QUALITY = ROOT / "docs" / "results" / "quality-emoji-sd.json"
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def grids(results: dict[str, Any], **which: Any) -> list[str]:
    blocks = table(results, **which).split("\n\n")
    return [blocks[i + 1] for i, block in enumerate(blocks) if block.startswith("**")]


def test_the_documents_tables_are_the_recorded_measurement() -> None:
    results, text = read_results(QUALITY), (ROOT / "README.md").read_text()
    assert results["settings"]["samples"] >= 1000
    assert {row["nfe"] for row in results["rows"]} == {*range(2, 11)}
    shown = grids(results, metrics=["latent_mse", "feature_distance"], intervals=False)
    assert len(shown) == 2 and all(grid in text for grid in shown)
    document = (ROOT / "docs" / "emoji.md").read_text()
    assert len(found := grids(results)) == 3 and all(grid in document for grid in found)
    guidance = read_results(QUALITY.with_stem(f"{QUALITY.stem}-guidance"))
    assert len(found := grids(guidance)) == 3 and all(grid in document for grid in found)


def test_one_function_is_before_every_classical_solver_at_few_steps() -> None:
    results = read_results(QUALITY.with_name("continuous.json"))
    (grid,) = grids(results, metrics=["latent_rmse"])
    assert grid in (ROOT / "docs" / "emoji.md").read_text()
    by_count: dict[int, dict[str, float]] = {}
    for row in results["rows"]:
        by_count.setdefault(row["nfe"], {})[row["solver"]] = row["latent_rmse"]
        assert row.get("held_out") == (row["nfe"] not in (2, 3, 4, 5, 6, 8, 12) if "any" in row["solver"] else None)
    for n, errors in by_count.items():
        own, table = (errors.pop(f"DyWeight, emoji-sd-{name}", None) for name in ("any-steps", "solvers"))
        assert own is not None and len(errors) == 9 and (own < min(errors.values())) == (n <= 12)
        assert table is None or 0.97 < own / table < (1.18 if 5 <= n <= 8 else 1.03)


def test_learned_solvers_come_first() -> None:
    """SpanLift before DyWeight before the best of all others, by both distances and by PSNR."""
    rows = read_results(QUALITY)["rows"]
    for n in range(3, 10):
        for metric, sign in (("latent_mse", 1), ("feature_distance", 1), ("psnr", -1)):
            by_solver = {r["solver"]: sign * r[metric] for r in rows if r["nfe"] == n}
            spanlift, dyweight = by_solver.pop("SpanLift (learned)", None), by_solver.pop("DyWeight (learned)")
            assert len(by_solver) >= 13 and dyweight < min(by_solver.values())
            assert (spanlift is not None) == (n in (3, 4, 5, 7)) and (spanlift is None or spanlift < dyweight)


def test_the_readmes_overhead_is_the_recorded_measurement() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "overhead.json").read_text())["rows"]
    shares = {n: max(r["percent_of_denoiser"] or 0 for r in rows if n in r["scheduler"]) for n in ("DyWeight", "Span")}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"step takes at most {shares['DyWeight']:.4f} % and a SpanLift step {shares['Span']:.2f} %" in text
    assert f"{shares['Span']:.2f} % of Stable Diffusion 1.5's UNet" in (ROOT / "docs" / "spanlift.md").read_text()
    ours = [r for r in rows if r["scheduler"].startswith("DyWeight")]
    ratios = [r["ratio_to_dpmpp2m"] for r in ours]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time of diffusers' DPM-Solver++(2M)" in text
    assert sorted({r["num_inference_steps"] for r in ours}) == [3, 10, 50] and len(ours) == 2 * 3 * 3
    for r in ours:
        assert r["syncs"] == 0 and r["state_bytes"] == int(r["scheduler"][-1]) * 4 * math.prod(r["shape"])


def test_memory_of_learning_is_flat_in_the_number_of_steps_as_the_docs_say() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "memory.json").read_text())["rows"]
    flat = [r["ratio_to_3_steps"] for r in rows if r["recompute"] and r["num_inference_steps"] == 9]
    assert len(flat) == 4 and max(flat) < 1.015
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert "is 1.01 times that at 3 on the embedded pipeline" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_the_readmes_example_of_an_artefact_is_the_shipped_one() -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", text, re.S)
    shown = json.loads("{" + block + "}")["tables"]["3"]
    shipped = DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-solvers").tables[3]
    for i, row in enumerate(shown["weights"]):
        assert row == [round(float(w), 4) for w in shipped.weights[i, : len(row)]]
    assert shown["time_scale"] == [round(float(s), 4) for s in shipped.time_scale]


def test_both_shipped_artefacts_share_their_tables() -> None:
    base = DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-solvers")
    lifted = SpanLiftScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-spanlift")
    assert [*base.tables] == [*range(2, 10)] and [*lifted.lifts] == [*lifted.tables] == [3, 4, 5, 7]
    assert all((lifted.tables[n].weights == base.tables[n].weights).all() for n in lifted.tables)
