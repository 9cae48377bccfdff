"""Solvers are compared sample by sample: what two of them share cancels, and what cannot be told apart is not bold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_quality import SETTINGS, measured, whole  # noqa: F401  (a fixture)

from dywspan.evaluate.metrics import METRICS
from dywspan.evaluate.paired import difference, kept_of, read_samples, with_pairs
from dywspan.evaluate.report import read_results, table
from dywspan.evaluate.statistics import Metric, interval, mean

ERROR = Metric("error", lambda sample: sample.images)
SCORE = Metric("score", lambda sample: sample.images, lower_is_better=False)


def apart(metric: Metric, own: torch.Tensor, other: torch.Tensor, **options: Any) -> dict[str, Any]:
    return difference(metric, own, other, mean(own) - mean(other), **options)


def test_what_two_solvers_share_cancels() -> None:
    hard = torch.rand(64).exp()  # some samples are hard for everyone
    own, other = hard, hard + 0.02 + 0.01 * torch.rand(64)
    bounds = [interval(ERROR, rows[:, None]) for rows in (own, other)]
    assert bounds[0][1] > bounds[1][0], "their own intervals overlap"
    found = apart(ERROR, own, other)
    assert found["low"] < found["difference"] < found["high"] < -0.02 and found["wins"] == 1
    assert found["difference"] == pytest.approx(float((own - other).mean()), rel=1e-5)
    assert apart(ERROR, other, own)["wins"] == 0 and apart(SCORE, other, own)["wins"] == 1


def test_ties_count_by_half_and_the_median_is_of_the_differences() -> None:
    found = apart(ERROR, torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([2.0, 2.0, 5.0, 1.0]))
    assert found["wins"] == (2 + 0.5) / 4 and found["median"] == -1.0


@pytest.mark.parametrize("by_influence", [False, True])
def test_the_interval_covers_as_often_as_it_says(by_influence: bool) -> None:
    metric = Metric("m", lambda s: s.images, influence=lambda rows: rows[:, 0]) if by_influence else ERROR
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        shared = 5 * torch.rand(50, generator=generator)
        own, other = (shared + torch.randn(50, generator=generator) + shift for shift in (0.0, 0.3))
        found = apart(metric, own, other, resamples=200)
        covered += found["low"] <= -0.3 <= found["high"]
        assert ("wins" in found) is not by_influence
    assert 0.90 <= covered / 300 <= 0.985


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="error has 3 and 4 samples: compare the same ones"):
        apart(ERROR, torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="at least 2"):
        apart(ERROR, torch.rand(1), torch.rand(1))


def test_a_frechet_distance_is_compared_by_its_influences() -> None:
    rows = {"m": torch.rand(20, 3)}
    metric = Metric("m", lambda s: s.images, lambda r: float(r.sum()), influence=lambda r: r.sum(1))
    assert torch.equal(kept_of([metric], rows)["m"], rows["m"].sum(1))


COLUMN = {"alone": 1.0, "level": 1.0, "far": 2.0}  # "level" wins some and loses some


def rows_of(*learned: str) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    noise, generator = torch.rand(50), torch.Generator().manual_seed(3)
    kept, rows = [], []
    for variant in ("small", "large"):
        for nfe in (2, 3):
            for name, level in COLUMN.items():
                jitter = 0.1 * torch.randn(50, generator=generator) * (name == "level")
                values = {"error": noise + level + jitter + nfe}
                row = {"variant": variant, "solver": name, "learned": name in learned, "nfe": nfe}
                error = mean(values["error"])
                rows.append(row | {"error": error, "interval": {"error": [error - 0.1, error + 0.1]}})
                kept.append(values)
    return rows, kept


def test_the_rival_is_the_best_other_of_the_same_call_and_evaluations() -> None:
    rows, kept = rows_of("alone", "level")
    for row in with_pairs(rows, kept, [ERROR]):
        others = [r for r in rows if (r["variant"], r["nfe"]) == (row["variant"], row["nfe"])]
        best = min((r for r in others if r["solver"] != row["solver"]), key=lambda r: r["error"])
        found = row["paired"]["error"]
        assert found["against"] == best["solver"]
        assert found["difference"] == pytest.approx(row["error"] - best["error"])
        if row["learned"]:
            assert row["paired_classical"]["error"]["against"] == "far"
            assert row["paired_classical"]["error"]["high"] < 0
        else:
            assert "paired_classical" not in row


def test_only_what_is_better_by_more_than_chance_is_bold() -> None:
    rows, kept = rows_of()
    results = {"rows": with_pairs(rows, kept, [ERROR]), "metrics": {"error": {"lower_is_better": True}}, "settings": {}}
    lines = [line.split("|") for line in table(results).splitlines() if "|" in line]
    cells = {line[1].strip(): line[2].strip() for line in lines}
    for name in ("alone", "level"):
        assert cells[name].startswith("*") and not cells[name].startswith("**")
    assert "*" not in cells["far"]
    alone = [(row, own) for row, own in zip(rows, kept) if row["solver"] != "level"]
    results["rows"] = with_pairs(*zip(*alone), [ERROR])  # type: ignore[arg-type]
    assert "| **" in table(results)


def test_an_evaluation_keeps_what_every_statistic_can_be_made_of(whole: Path) -> None:  # noqa: F811
    rows, names = measured(whole), SETTINGS["metrics"]
    metrics = [METRICS["latent_mse"](), Metric("feature_distance", lambda s: s.images)]
    kept = read_samples(whole / "results.json", rows, names)
    for row, own in zip(rows, kept):
        assert {*own} == {*names} and all(len(values) == SETTINGS["samples"] for values in own.values())
        for name in names:
            assert row[name] == pytest.approx(mean(own[name]), rel=1e-6)
            assert row["median"][name] == pytest.approx(float(own[name].median()), rel=1e-6)
        assert ("paired_classical" in row) == row["learned"]
    bare = [{k: v for k, v in row.items() if not k.startswith("paired")} for row in rows]
    assert with_pairs(bare, kept, metrics) == rows
    assert read_results(whole / "results.json")["rows"] == rows
