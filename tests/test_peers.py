"""Other learned solvers as constrained tables: each map is the method that it stands for, and all learn alike."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dywspan.core.bases import BASES
from dywspan.core.grid import make_grid
from dywspan.core.prediction import EDM, Epsilon, Flow, Prediction
from dywspan.core.step import rollout
from dywspan.core.table import SolverTable

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "peers"))
maps: Any = importlib.import_module("maps")
methods: Any = importlib.import_module("methods")

VP = Epsilon(torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64))
NETWORKS: dict[str, tuple[Prediction, dict[str, Any]]] = {
    "vp": (VP, {"name": "discrete", "sigma_min": 0.0, "sigma_max": 10.0}),
    "edm": (EDM(), {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0}),
    "flow": (Flow(), {"name": "flow", "shift": 3.0}),
}
PEERS = [name for name, method in methods.METHODS.items() if isinstance(method, methods.Peer)]


def slope(x: Tensor, t: Any) -> Tensor:
    """dx/dt of a small nonlinear ODE, without a singularity at 0."""
    return torch.sin(x) * torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) + torch.cos(torch.as_tensor(t))


def ground(kind: str, stages: Sequence[int], base: str = "dpmpp", order: int = 3) -> Any:
    prediction, grid = NETWORKS[kind]
    levels = make_grid(grid, len(stages), prediction)

    def rows(t: Tensor) -> Tensor:
        return BASES[base](t, prediction.signal(t), 2)

    weights = torch.nn.functional.pad(rows(levels), (0, max(0, order - rows(levels).shape[1])))
    return maps.Ground(levels, prediction, rows, weights, stages)


def ends(table: SolverTable, prediction: Prediction) -> Tensor:
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    return rollout(table.schedule(prediction), lambda x, sigma, tau: slope(x, tau), x)


def start(name: str, kind: str, evaluations: int, base: str = "dpmpp") -> Any:
    peer = methods.METHODS[name]
    return methods.PeerStudent(None, peer, ground(kind, peer.stages(evaluations), base))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("base", ["dpmpp", "unipc", "ipndm", "cab"])
@pytest.mark.parametrize("name", ["LD3-like", "S4S-like", "S4S-Alt-like", "DLMS-like", "DC-Solver-like", "BezierFlow-like"])
def test_a_multistep_peer_starts_as_its_base(name: str, base: str, kind: str) -> None:
    student = start(name, kind, 5, base)
    table, own = student.table(), student.ground
    assert torch.allclose(table.nominal(own.prediction), own.levels, rtol=1e-12, atol=1e-14)
    width = min(table.weights.shape[1], own.weights.shape[1])
    assert torch.allclose(table.weights[:, :width], own.weights[:, :width], rtol=1e-8, atol=1e-10)
    assert not table.weights[:, width:].abs().gt(1e-10).any()
    assert torch.equal(table.time_scale, torch.ones(5, dtype=torch.float64))
    known = SolverTable(own.base(own.levels), torch.ones(5), {"sigmas": own.levels.tolist()})
    assert torch.allclose(ends(table, own.prediction), ends(known, own.prediction), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("evaluations", [3, 5, 7])
@pytest.mark.parametrize("name", PEERS)
def test_every_number_of_a_peer_has_a_gradient_and_any_values_make_a_solver(
    name: str, evaluations: int, kind: str
) -> None:
    student = start(name, kind, evaluations)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn_like(value))
    table = student.table()
    assert len(table.weights) == evaluations == table.num_inference_steps
    gradients = torch.autograd.grad(ends(table, student.ground.prediction).square().sum(), student.parameters())
    assert all(bool((g != 0).all()) for g in gradients), dict(zip(student.theta, gradients))
    plain = methods.plain(table, {})
    assert torch.allclose(ends(plain, student.ground.prediction), ends(table, student.ground.prediction), atol=1e-12)
    with torch.no_grad():
        for number, _ in [n for n in student.numbers() if n[0] is student.theta.get("levels", student.parameters()[0])]:
            number.mul_(0).add_(1e3 * torch.randn_like(number).sign())
    if "weights" not in student.theta and "ratios" not in student.theta:
        levels = maps.falling(1e3 * torch.randn(evaluations - 1, dtype=torch.float64), torch.linspace(1, 0, evaluations + 1).double())
        assert bool((levels.diff() < 0).all())
