"""examples/nowcasting: the rain, the scores of its forecasts, and a pipeline of them that learns a solver."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _nowcasting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "nowcasting"))
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    yield


def script(name: str) -> Any:
    return importlib.import_module(name)


def test_rain_moves_with_the_wind_and_forgets_its_past() -> None:
    rain = script("rain")
    x = rain.sequences(48, 1)
    assert x.shape == (48, rain.KNOWN + rain.FUTURE, rain.SIZE, rain.SIZE) and x.min() >= 0 and x.max() < 1
    assert torch.equal(x, rain.sequences(48, 1)) and not torch.equal(x, rain.sequences(48, 2))
    change = [(x[:, t] - x[:, 0]).square().mean() for t in range(1, x.shape[1])]
    assert all(a < b for a, b in pairwise(change[:5])), "the further, the less it is known"
    assert change[0] < 0.5 * (x[:, 0] - x[:, 0].roll(1, 0)).square().mean(), "another frame is nearer than another rain"

    def shifted(own: torch.Tensor) -> float:
        """The error of the best of all shifts by up to 3 pixels."""
        inner = own[1, 3:-3, 3:-3]
        moved = [own[0].roll((dy, dx), (0, 1))[3:-3, 3:-3] for dy in range(-3, 4) for dx in range(-3, 4)]
        return min(float((m - inner).square().mean()) for m in moved)

    still = [float((own[1] - own[0])[3:-3, 3:-3].square().mean()) for own in x]
    assert sum(map(shifted, x)) < 0.8 * sum(still)


def test_scores_count_what_was_said_and_seen() -> None:
    score = script("scores")
    seen = torch.zeros(1, 1, 4, 4)
    seen[..., 0, :2] = 1
    said = torch.zeros(1, 1, 4, 4)
    said[..., 0, 1:3] = 1
    found = score.counts(said, seen)
    assert found.shape == (1, 6, 4) and found[0].tolist() == [[1, 1, 1, 13]] * 6
    assert score.csi(found) == pytest.approx(1 / 3)
    assert score.hss(found) == pytest.approx(2 * (1 * 13 - 1) / ((1 + 1) * (1 + 13) * 2))
    assert score.csi(score.counts(said, seen, pool=4)) == 1, "near counts in pools"
    perfect = score.counts(seen, seen)
    assert score.hss(perfect) == score.csi(perfect) == 1
    with pytest.raises(ValueError, match="must be multiples of pool=3"):
        score.counts(said, seen, pool=3)
    with pytest.raises(ValueError, match="must both be"):
        score.counts(said, seen[0])


def test_differences_are_paired() -> None:
    score, rain = script("scores"), script("rain")
    seen = rain.sequences(24, 3, frames=2)
    noise = 0.3 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    found = score.compared((seen + noise / 2).clamp(0, 1), (seen + noise).clamp(0, 1), seen, draws=60)
    for name, own in found.items():
        assert own["low"] <= own["difference"] <= own["high"], name
    assert found["csi"]["low"] > 0, "the less noise, the better"


@pytest.mark.weekly
@pytest.mark.slow
def test_a_table_and_spanlift_are_learned_by_three_supervisions_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, study = script("pretrain_rain"), script("nowcasting")
    few = ["--autoencoder-updates=3", "--updates=3", "--sequences=8", "--batch-size=4"]
    train.main([*few, f"--output={tmp_path}", "--checkpoint-every=3", "--pictures-every=3"])
    for name in ("autoencoder", "network"):
        (line,) = map(json.loads, (tmp_path / name / "progress.jsonl").read_text().splitlines())
        assert line["held_out"] > 0
    assert [*(tmp_path / "network").glob("*.png")]
    monkeypatch.setattr(study, "TEACHER", 6)
    monkeypatch.setattr(study, "STEPS", 2)
    options = {"pairs": 4, "held_out": 2, "updates": 2, "batch_size": 2, "lr": 1e-3, "width": 8}
    study.learn(argparse.Namespace(folder=tmp_path, **options))
    output, image = tmp_path / "nowcasting.json", tmp_path / "nowcasting.png"
    study.measure(argparse.Namespace(folder=tmp_path, samples=3, output=output, picture=image))
    rows = {row["solver"]: row for row in json.loads(output.read_text())["rows"]}
    lifts = [f"SpanLift ({name}), 2" for name in study.SUPERVISIONS]
    assert [*rows] == ["DDIM, 6", "DDIM, 2", "DyWeight, 2", *lifts] and image.exists()
    assert all({"csi", "csi_4", "csi_16", "hss", "feature_distance"} <= row.keys() for row in rows.values())
    assert rows[lifts[0]]["paired"]["csi"].keys() == {"difference", "low", "high"}


def test_the_pipelines_ddim_is_diffusers() -> None:
    forecast, rain = script("forecast"), script("rain")
    torch.manual_seed(0)
    pipe = forecast.NowcastPipeline(forecast.autoencoder(), forecast.ForecastNetwork(), forecast.scheduler())
    pipe.set_progress_bar_config(disable=True)
    known, study = rain.sequences(2, 0)[:, : rain.KNOWN], script("nowcasting")
    ends = []
    for own in (pipe.scheduler, study.DyWeightScheduler.from_config(pipe.scheduler, solver=study.DDIM)):
        pipe.scheduler = own
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        ends.append(pipe(known, 4, seeds, output_type="latent").frames)
    assert ends[0].shape == (2, rain.FUTURE, 8, 8, 4)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)
