"""``SolverTrainer``: any pipeline object is learned from, within its memory, and given back as it was."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from test_distill import EMOJI
from torch import Tensor, nn

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.distill import DistillConfig, SolverTrainer, pictures
from dywspan.pipelines.rollout import load_pipeline

FLOW = EMOJI.parent / "emoji-flow"
PROMPTS = ["a cat", "a red apple", "a house", "a tree", "the sun", "a boat", "a fish", "a star"]
SMALL: dict[str, Any] = {"steps": [2], "pairs": 4, "held_out": 4, "teacher_steps": 8, "batch_size": 4, "pictures": 0}


def own_pipeline() -> Any:
    """Built in Python, around a network whose class no name leads to."""

    class Network(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, in_channels: int = 3, sample_size: int = 8) -> None:
            super().__init__()
            first, last = nn.Conv2d(in_channels + 1, 16, 3, padding=1), nn.Conv2d(16, in_channels, 3, padding=1)
            self.layers = nn.Sequential(first, nn.SiLU(), last)

        def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
            time = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1, 1, 1) / 1000
            x = torch.cat([sample, time.expand(len(sample), 1, *sample.shape[2:])], 1)
            output = self.layers(x)
            return diffusers.models.unets.unet_2d.UNet2DOutput(output) if return_dict else (output,)

    torch.manual_seed(0)
    network: Any = Network()
    scheduler: Any = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return diffusers.DDPMPipeline(network, scheduler)


def test_a_pipeline_of_a_class_of_ones_own_learns_tables_and_operators(tmp_path: Path) -> None:
    pipe = own_pipeline()
    kind, scheduler, bars = type(pipe), pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    many: dict[str, Any] = {**SMALL, "pairs": 64, "batch_size": 32}  # few tell nothing of others
    config = DistillConfig(output=str(tmp_path / "tables"), optimizer="least_squares", init="euler", updates=4, **many)
    tables = SolverTrainer(pipe, config).train()
    error = tables.tables[2].provenance["held_out_error"]
    assert error["after"] < 0.95 * error["before"]
    lift = {"solver": "spanlift", "base": str(tmp_path / "tables"), "operator": {"width": 16}, "lr": 1e-2}
    config = DistillConfig(output=str(tmp_path / "lift"), updates=40, evaluate_every=5, **many, **lift)
    lifted = SolverTrainer(pipe, config).train()
    error = lifted.lifts[2].provenance["held_out_error"]
    assert error["after"] < 0.95 * error["before"]
    assert (type(pipe), pipe.scheduler) == (kind, scheduler)
    assert dict(getattr(pipe, "_progress_bar_config", {})) == bars
    for name, solver in (("tables", DyWeightScheduler), ("lift", SpanLiftScheduler)):
        pipe.scheduler = solver.from_pretrained(tmp_path / name)
        assert len(pipe(num_inference_steps=2, output_type="np").images) == 1
    assert "Few-step solvers for" in (tmp_path / "tables" / "README.md").read_text(encoding="utf-8")


def modular_flow() -> Any:
    """emoji-flow as ``FluxModularPipeline``."""
    pipe = diffusers.ModularPipeline.from_pretrained(str(FLOW))
    pipe.load_components(torch_dtype=torch.float32)
    return pipe


def test_a_modular_pipeline_learns_what_its_like_learns(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": "least_squares", "updates": 2, "prompts": PROMPTS, "layout": "packed"}
    call = {"height": 64, "width": 64, "max_sequence_length": 28}
    found = []
    for name, pipe in {"standard": load_pipeline(str(FLOW), device="cpu"), "modular": modular_flow()}.items():
        config = DistillConfig(output=str(tmp_path / name), call=call, **SMALL, **settings)
        found.append(SolverTrainer(pipe, config).train().tables[2])
    one, other = found
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.time_scale, one.time_scale, rtol=1e-3, atol=1e-3)
    errors = [table.provenance["held_out_error"]["after"] for table in found]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.slow
def test_a_modular_pipeline_learns_the_operator_that_its_like_learns(tmp_path: Path) -> None:
    call = {"height": 64, "width": 64, "max_sequence_length": 28}
    settings: dict[str, Any] = {"solver": "spanlift", "base": "ipndm", "prompts": PROMPTS, "layout": "packed"}
    settings |= {"operator": {"width": 16}, "updates": 4, "evaluate_every": 1, "lr": 1e-2}
    found = []
    for name, pipe in {"standard": load_pipeline(str(FLOW), device="cpu"), "modular": modular_flow()}.items():
        config = DistillConfig(output=str(tmp_path / name), call=call, **{**SMALL, "pictures": 1}, **settings)
        found.append(SolverTrainer(pipe, config).train())
        assert (tmp_path / name / "samples-2.png").exists()
    one, other = found
    error = one.lifts[2].provenance["held_out_error"]
    assert error["after"] < error["before"]
    assert other.lifts[2].provenance["held_out_error"]["after"] == pytest.approx(error["after"], rel=1e-3)
    weights = ({k: v for o in s.operators.values() for k, v in o.state_dict().items()} for s in found)
    for (_, a), (_, b) in zip(*(sorted(w.items()) for w in weights)):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3)


@contextmanager
def little_memory(pipe: Any, most: int) -> Iterator[list[int]]:
    """The network takes no more than so many samples; what it was asked for is noted."""
    asked: list[int] = []

    def look(module: nn.Module, args: Any) -> None:
        asked.append(len(args[0]))
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")

    handle = pipe.unet.register_forward_pre_hook(look)
    yield asked
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "least_squares"])
def test_a_batch_that_does_not_fit_is_made_smaller_with_the_same_numbers(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the teacher, of updates, of held-out checks and of pictures."""
    settings: dict[str, Any] = {**SMALL, "prompts": PROMPTS, "call": {"guidance_scale": 1.0}, "pictures": 3}
    settings |= {"optimizer": optimizer, "updates": 2, "evaluate_every": 1}
    pipe, found = load_pipeline(str(EMOJI), device="cpu"), []
    for most in (16, 3):
        with little_memory(pipe, most) as asked:
            scheduler = SolverTrainer(pipe, DistillConfig(output=str(tmp_path / str(most)), **settings)).train()
        found.append(scheduler.tables[2])
        assert max(asked) == (4 if most == 16 else max(4, most))
    torch.testing.assert_close(found[1].weights, found[0].weights, rtol=1e-3, atol=1e-4)
    errors = [table.provenance["held_out_error"]["after"] for table in found]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    said = capsys.readouterr().out
    assert "Out of memory with 4 teacher samples at a time: going on with 2." in said
    with little_memory(pipe, 0), pytest.raises(torch.OutOfMemoryError, match=r"teacher_batch_size.*height, width"):
        settings["pictures"] = 0
        SolverTrainer(pipe, DistillConfig(output=str(tmp_path / "none"), **settings)).train()


def test_a_trackers_step_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, steps = own_pipeline(), []
    config = DistillConfig(output=str(tmp_path), optimizer="least_squares", updates=2, **{**SMALL, "steps": [1, 2]})
    trainer = SolverTrainer(pipe, config)

    @contextmanager
    def tracked(self: Any) -> Iterator[Any]:
        yield lambda numbers, update: steps.append(update)

    monkeypatch.setattr(SolverTrainer, "_tracked", tracked)
    trainer.train()
    assert steps == [1, 2, 3, 4] and all(b > a for a, b in itertools.pairwise(steps))


class Tracker:
    """Of Accelerate's kind."""

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self.name, self.images, self.options = name, dict[str, list[tuple[int, Any]]](), list[dict[str, Any]]()

    def log_images(self, values: dict[str, Any], step: int, **options: Any) -> None:
        for name, images in values.items():
            self.images.setdefault(name, []).append((step, images))
        self.options.append(options)


@pytest.mark.slow
def test_pictures_are_there_before_the_pairs_and_follow_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of a run without pictures, bit for bit."""
    settings: dict[str, Any] = {**SMALL, "steps": [2, 3], "optimizer": "least_squares", "init": "euler", "updates": 4}
    settings |= {"evaluate_every": 1, "pairs": 64, "batch_size": 32}
    plain = SolverTrainer(own_pipeline(), DistillConfig(output=str(tmp_path / "plain"), **settings)).train()
    draw, drawn = pictures.draw_samples, list[tuple[str, list[str], bool]]()
    output = tmp_path / "shown"

    def watched(rows: Any, inputs: Any, path: Path) -> Any:
        drawn.append((path.name, [*rows], any((output / "cache").rglob("*.safetensors"))))
        return draw(rows, inputs, path)

    monkeypatch.setattr(pictures, "draw_samples", watched)
    trainer = SolverTrainer(own_pipeline(), DistillConfig(output=str(output), **{**settings, "pictures": 2}))
    trackers = [Tracker("tensorboard"), Tracker("wandb")]
    monkeypatch.setattr(trainer.accelerator, "trackers", trackers)
    shown = trainer.train()
    for n in (2, 3):
        assert torch.equal(shown.tables[n].weights, plain.tables[n].weights)
        first, *between, last = (labels for name, labels, _ in drawn if name == f"samples-{n}.png")
        assert first == ["teacher, 8 steps", f"base, {n} steps"] and last == [*first, f"learned, {n} steps"]
        updates = [int(labels[2].removeprefix("update ").partition(",")[0]) for labels in between]
        assert updates and updates == sorted({*updates}) and updates[-1] <= 4
        for tracker in trackers:
            steps, images = zip(*tracker.images[f"samples/{n}"])
            assert [*steps] == [4 * (n - 2) + update for update in updates], "steps never go back"
            assert images[0].shape[:2] == (1, 44 + 3 * 98) and images[0].shape[3] == 3
    assert not drawn[0][2] and drawn[-1][2], "the first picture comes before the pairs"
    assert [{*map(str, t.options)} for t in trackers] == [{"{'dataformats': 'NHWC'}"}, {"{}"}]


def test_bars_say_what_is_left_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {**SMALL, "steps": [2, 4], "optimizer": "least_squares", "init": "euler", "updates": 3}
    SolverTrainer(own_pipeline(), DistillConfig(output=str(tmp_path), **settings)).train()
    first, last = (part for part in capsys.readouterr().err.split("4 steps (2 of 2)", 1))
    assert re.search(r"2 steps \(1 of 2\).*all=\d\d:\d\d left", first) and "all=" not in last
