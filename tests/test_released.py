"""Artefacts of every version load for ever, without a warning, to the same numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import dywspan
from dywspan.artifact import release

ARTEFACTS = Path(__file__).parent / "artefacts"
EXPECTED = {
    f"{file.parent.name}/{name}": expected
    for file in sorted(ARTEFACTS.glob("*/expected.json"))
    for name, expected in json.loads(file.read_text(encoding="utf-8")).items()
}


def test_there_are_artefacts_of_this_version() -> None:
    assert (ARTEFACTS / ".".join(map(str, release(dywspan.__version__)))).is_dir()


@pytest.mark.parametrize("name", EXPECTED)
def test_it_still_ends_where_it_did(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = dywspan.load(ARTEFACTS / name)
    scheduler.set_timesteps(EXPECTED[name]["steps"])
    x = torch.linspace(-2, 2, 256, dtype=torch.float64).reshape(1, 4, 8, 8).sin() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given, phase = scheduler.scale_model_input(x, t), t.to(x.dtype) / 400
        output = 0.6 * torch.tanh(1.3 * given + torch.sin(phase)) + 0.3 * torch.cos(2 * phase) * given
        x = scheduler.step(output, t, x, return_dict=False)[0]
    end = [float(v) for v in (x.mean(), x.std(), x[0, 0, 0, 0], x[0, 3, 7, 7])]
    assert end == pytest.approx(EXPECTED[name]["end"], abs=1e-5)
