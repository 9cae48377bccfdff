"""Score networks of another framework's files: read without executing anything, the same function, and learned for."""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import dywspan
from dywspan import DyWeightScheduler
from dywspan.cli import main
from dywspan.distill import DistillConfig, SolverTrainer
from dywspan.evaluate.baselines import BASELINES, Solver, make_cell
from dywspan.evaluate.report import read_results
from dywspan.evaluate.rivals import SELECT
from dywspan.pipelines.rollout import load_pipeline

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "galaxies"
sys.path.insert(0, str(EXAMPLE))
import galaxies  # noqa: E402
import score_network  # noqa: E402

PATCH, SIDE, HIDDEN, WIDTH, HIDDEN_WIDTH, DEPTH = 4, 3, 5, 7, 6, 2  # no two sizes alike


def arrays(seed: int = 0) -> list[numpy.ndarray]:
    """Such a network's, with random numbers, in the order of the package's files."""
    patches, draw = SIDE**2, numpy.random.default_rng(seed)
    mixers = [(WIDTH, patches), (WIDTH,), (patches, WIDTH), (patches,)]
    mixers += [(HIDDEN_WIDTH, HIDDEN), (HIDDEN_WIDTH,), (HIDDEN, HIDDEN_WIDTH), (HIDDEN,)]
    block = [*mixers, *[(HIDDEN, patches)] * 2, *[(patches, HIDDEN)] * 2]
    ends = [(HIDDEN, 2, PATCH, PATCH), (HIDDEN, 1, 1), (1, HIDDEN, PATCH, PATCH), (1, 1, 1)]
    shapes = [*ends, *block * DEPTH, *[(HIDDEN, patches)] * 2]
    return [draw.normal(0, 0.4, shape).astype("float32") for shape in shapes] + [numpy.array(10.0)]


def written(path: Path, what: list[Any]) -> Path:
    with path.open("wb") as file:
        for array in what:
            numpy.save(file, array, allow_pickle=True)
    return path


def by_hand(what: list[numpy.ndarray], image: numpy.ndarray, t: float) -> numpy.ndarray:
    """The score by the equations alone: (C, H, W), float64."""
    values = iter([own.astype("float64") for own in what])
    take = lambda: next(values)  # noqa: E731

    def normal(y: numpy.ndarray, weight: numpy.ndarray, bias: numpy.ndarray) -> numpy.ndarray:
        return (y - y.mean()) / numpy.sqrt(y.var() + 1e-5) * weight + bias

    into, into_bias, out, out_bias = take(), take(), take(), take()
    x = numpy.concatenate([image, numpy.full_like(image[:1], t / 10)])
    cut = x.reshape(2, SIDE, PATCH, SIDE, PATCH)
    y = numpy.einsum("hcab,ciajb->hij", into, cut) + into_bias
    y = y.reshape(HIDDEN, -1)
    for _ in range(DEPTH):
        a, b, c, d, e, f, g, h = (take() for _ in range(8))
        first, second = (take(), take()), (take(), take())
        y = y + numpy.maximum(normal(y, *first) @ a.T + b, 0) @ c.T + d
        y = (y.T + numpy.maximum(normal(y.T, *second) @ e.T + f, 0) @ g.T + h).T
    y = normal(y, take(), take()).reshape(HIDDEN, SIDE, SIDE)
    # A patch of the image is the sum of kernels that are turned by 180 degrees.
    return numpy.einsum("chab,hij->ciajb", out[:, :, ::-1, ::-1], y).reshape(1, *image.shape[1:]) + out_bias


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "network.eqx", arrays())


def test_a_file_is_the_network_that_its_equations_say(file: Path) -> None:
    network, draw = score_network.read(file).double(), numpy.random.default_rng(1)
    images, times = draw.normal(size=(3, 1, 12, 12)), (0.0, 0.7, 9.9)
    with torch.no_grad():
        found = network.score(torch.tensor(images), torch.tensor(times))
    for image, t, own in zip(images, times, found):
        numpy.testing.assert_allclose(own.numpy(), by_hand(arrays(), image, t), rtol=1e-6, atol=1e-9)


def test_to_diffusers_its_output_is_the_noise_of_1000_constant_betas(file: Path) -> None:
    network, scheduler = score_network.read(file).double(), score_network.scheduler()
    prediction = DyWeightScheduler.from_config(scheduler).host.prediction
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    for timestep in (0.0, 49.5, 999.0):  # of diffusers
        t = (timestep + 1) / 100
        assert float(prediction.sigma(torch.tensor([timestep]))) == pytest.approx(math.sqrt(math.expm1(t)), rel=1e-5)
        with torch.no_grad():
            score = network.score(x, torch.tensor(t))
            epsilon = network(x, torch.tensor(timestep)).sample
        torch.testing.assert_close(epsilon, -math.sqrt(1 - math.exp(-t)) * score)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a file executed code",)


def test_what_is_no_such_network_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    code = numpy.empty((), object)
    code[()] = Code()
    path = written(tmp_path / "code.eqx", [*arrays()[:3], code])
    with pytest.raises(ValueError, match="allow_pickle=False"):
        score_network.read(path)
    with pytest.raises(ValueError, match="holds 30 arrays of another network"):
        score_network.read(written(path, arrays()[1:]))
    turned = arrays()
    turned[4] = turned[4][:, :4]
    with pytest.raises(ValueError, match="and such a network has"):
        score_network.read(written(path, turned))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps galaxygrad==0\.2\.1"):
        score_network.find("hsc64")


def test_pictures_are_black_without_light_and_show_faint_beside_bright() -> None:
    light = torch.tensor([-0.01, 0.0, 0.02, 3.0, 9.0])
    levels = numpy.asarray(score_network.stretched(torch.log1p(light).reshape(1, 1, -1) / 0.1))[0].tolist()
    assert levels[:2] == [0, 0] and levels[3:] == [255, 255]
    assert levels[2] == round(255 * math.asinh(1) / math.asinh(150))


# ------------------------------------------------------------------------------------------------------- the pipeline


@pytest.fixture
def folder(file: Path, tmp_path: Path) -> Path:
    """A saved pipeline."""
    from diffusers import DDPMPipeline

    DDPMPipeline(score_network.read(file), score_network.scheduler()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_saved_pipeline_is_tuned_by_the_command_that_is_told_its_class(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("score_network", "galaxies"):
        monkeypatch.delitem(sys.modules, name)
    own = ["--import", str(EXAMPLE / "score_network.py")]
    small = ["--steps", "2", "--pairs", "8", "--held-out", "4", "--evaluations", "300"]
    assert main([*own, "tune", str(folder), *small, "--output", str(tmp_path / "tuned")]) == 0
    pipe = load_pipeline(str(folder))
    assert type(pipe.unet) is sys.modules["score_network"].ScoreNetwork
    applied = dywspan.apply(pipe, str(tmp_path / "tuned"))
    assert pipe(num_inference_steps=2, batch_size=2).images[0].size == (12, 12) and applied.scheduler.tables.keys() == {
        2
    }


@pytest.mark.parametrize("name", ["no_such_module_here", "no/such/file.py"])
def test_a_module_that_is_not_there_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--import", name, "inspect", "nothing"]) == 2
    assert f"--import {name}: no such module" in capsys.readouterr().err


def test_bench_tune_asks_no_text_of_a_network_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def rows(pipe: Any, subject: str, prompts: Any, fresh: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((prompts, fresh))
        return [{"subject": subject, "nfe": 2, "solver": "tuned"}]

    monkeypatch.setattr("dywspan.bench.tune.tuned_rows", rows)
    assert (
        main(["bench", "tune", "--model", str(folder), "--samples", "4", "--output", str(tmp_path / "tune.json")]) == 0
    )
    assert asked == [(None, [{}] * (SELECT[1] + 4))]


def test_time_as_a_channel_has_no_layer_for_timelift(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(folder))
    config = DistillConfig(solver="timelift", steps=[2], pairs=4, held_out=2, base="euler", output=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="its unet has no layer that is told the time and nothing else"):
        SolverTrainer(pipe, config)


@pytest.mark.parametrize(("name", "own"), [("UniPC", True), ("DPM-Solver++(2M)", False)])
def test_a_scheduler_whose_step_is_not_given_what_it_takes_does_not_fit(folder: Path, name: str, own: bool) -> None:
    """The unconditional pipeline gives every step a generator."""
    cell = make_cell(load_pipeline(str(folder)), Solver(name, BASELINES[name]), 3, {}, {})
    assert isinstance(cell.scheduler, DyWeightScheduler) == own


@pytest.mark.slow
def test_the_example_learns_and_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, few = str(folder.parent), ["--pairs", "8", "--held-out", "4", "--updates"]
    results, picture = folder.parent / "galaxies.json", folder.parent / "galaxies.png"
    where = ["--samples", "10", "--solvers", there, "--output", str(results), "--picture", str(picture)]
    commands = {"learn": [*few, "3"], "lift": [*few, "2", "--base", there], "measure": where}
    for command, options in commands.items():
        given = ["--networks", "tiny", "--folder", there, "--steps", "2", *options]
        monkeypatch.setattr(sys, "argv", ["galaxies.py", command, *given])
        galaxies.main()
    rows = read_results(results)["rows"]
    assert [row["solver"] for row in rows[1:]] == ["DyWeight (learned)", "SpanLift (learned)"] and picture.exists()
    found = rows[1]["paired_classical"]["latent_rmse"]
    assert found["difference"] < 0 and found["against"] == rows[0]["solver"]
    assert rows[1]["latent_rmse"] == pytest.approx(rows[0]["latent_rmse"] + found["difference"])


def test_the_recorded_solvers_come_first_as_the_document_says() -> None:
    rows = read_results(ROOT / "docs" / "results" / "galaxies.json")["rows"]
    assert galaxies.summary(rows) in (ROOT / "docs" / "subjects.md").read_text()
    learned = {(row["network"], row["nfe"]): row["paired_classical"]["latent_rmse"] for row in rows if row["learned"]}
    assert learned.keys() >= {*product(["hsc64"], (3, 5, 7)), *product(["ztf64"], (3, 5))}
    assert all(found["high"] < 0 for found in learned.values())


# ----------------------------------------------------------------------------------------------- the package's networks

# Mean, deviation, least and largest, and two pixels, of the package's own forward pass (jax 0.4.35, equinox 0.11.11):
#
#   pip install galaxygrad==0.2.1 jax==0.4.35 jaxlib==0.4.35 equinox==0.11.11 einops diffrax==0.6.2
#   # its files need the name that its code has: ln -s eqx_roman_Scorenet120.eqx eqx_roman_ScoreNet120.eqx, beside it
#   network = galaxygrad.scorenet.HSC_64   # and ZTF_64
#   v = numpy.asarray(network(image(t)[None].astype("float32"), t)).astype("float64")
#   print(v.mean(), v.std(), v.min(), v.max(), v[0, 3, 5], v[0, 40, 21])
OWN_PASS = {
    ("hsc64", 0.02): (1.09319, 6.4438, -12.6898, 13.1795, 5.11457, 9.97839),
    ("hsc64", 1.0): (0.00703315, 1.05271, -1.70091, 1.63015, 0.681935, 1.33723),
    ("hsc64", 9.0): (-0.00788183, 0.705047, -1.08437, 1.00945, 0.427147, 0.826336),
    ("ztf64", 0.02): (0.395841, 6.47613, -20.7922, 44.7462, 3.44525, 8.57908),
    ("ztf64", 1.0): (0.067801, 1.24398, -4.11093, 7.8154, 0.693987, 1.70027),
    ("ztf64", 9.0): (-0.00234462, 0.706926, -1.06659, 1.05894, 0.430692, 0.841039),
}


def image(t: float) -> numpy.ndarray:
    """(64, 64): something like a galaxy, under ripples instead of noise."""
    y, x = numpy.mgrid[:64, :64] / 64
    galaxy = 8 * numpy.exp(-40 * ((x - 0.5) ** 2 + 2 * (y - 0.4) ** 2))
    return numpy.exp(-t / 2) * galaxy + numpy.sin(37 * x + 11 * y + 50 * x * y)


@pytest.mark.skipif(importlib.util.find_spec("galaxygrad") is None, reason=f"needs {score_network.INSTALL}")
@pytest.mark.parametrize(("name", "t"), OWN_PASS)
def test_the_networks_answer_as_in_their_own_framework(name: str, t: float) -> None:
    network = score_network.read(score_network.find(name))
    with torch.no_grad():
        v = network.score(torch.tensor(image(t)[None, None], dtype=torch.float32), torch.tensor(t))[0].double()
    found = [float(own) for own in (v.mean(), v.std(correction=0), v.min(), v.max(), v[0, 3, 5], v[0, 40, 21])]
    assert found == pytest.approx(OWN_PASS[name, t], rel=2e-5, abs=2e-6)
    assert "jax" not in sys.modules and "galaxygrad" not in sys.modules
