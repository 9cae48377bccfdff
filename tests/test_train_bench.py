"""What learning costs: the networks are those that were published, and a failure costs one row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dywspan.bench import networks, train
from dywspan.bench.networks import NETWORKS, REAL, Network, Random
from dywspan.cli import main
from dywspan.core.layout import LAYOUTS
from dywspan.distill.config import LearningConfig
from dywspan.pipelines.rollout import denoisers, generators, rollout

CPU = torch.device("cpu")
_UNET = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16}
_SD = {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": 4}
_SDXL = {
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}
_SANA = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "caption_channels": 16}
_SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
_WAN = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
_FLUX: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
_FLUX |= {"joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)}
SMALLER: dict[str, dict[str, Any]] = {
    "sd15": {**_UNET, **_SD},
    "sdxl": {**_UNET, **_SDXL},
    "sana-0.6b": _SANA,
    "sana-1.6b": _SANA,
    "wan-1.3b": _WAN,
    "flux-dev": _FLUX,
}


def small(name: str) -> Random:
    """The same pipeline and call around the same network, with few and narrow layers and less text."""
    own = NETWORKS[name]
    assert isinstance(own, Random)
    kind, config = own.network
    shapes = {k: (12,) if "pooled" in k else (5,) if "mask" in k else (5, 16) for k in own.embeddings}
    call = {**own.call, "height": 64, "width": 64}
    return replace(own, network=(kind, {**config, **SMALLER[name]}), embeddings=shapes, call=call)


def sampled(network: Network, pipe: Any) -> Tensor:
    inputs = network.inputs(pipe, 2)
    joined = {name: torch.cat([own[name] for own in inputs]) for name in inputs[0]}
    call = {**joined, **network.call, "generator": generators([0, 1]), "num_inference_steps": 3}
    with torch.no_grad():
        return rollout(pipe, pipe.scheduler, **call)[0]


@pytest.mark.parametrize("name", REAL)
def test_the_networks_are_as_large_as_those_that_were_published(name: str) -> None:
    network = NETWORKS[name]
    assert isinstance(network, Random)
    made = network.weights(torch.device("meta"))
    count = sum(p.numel() for p in made.parameters())
    assert count == pytest.approx(network.parameters, rel=0.006)
    assert made.dtype == network.dtype and network.size == (512, 512) == (network.call["height"], network.call["width"])


@pytest.mark.parametrize("name", REAL)
def test_every_pipeline_samples_in_the_dtype_it_has_on_an_accelerator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small(name)
    full = network.weights(CPU)
    monkeypatch.setattr(Random, "dtype_on", lambda self, device: self.dtype)
    pipe = network.build(CPU)
    (made,) = denoisers(pipe).values()
    dtypes = {p.dtype for p in made.parameters()}
    assert network.dtype in dtypes and dtypes <= {network.dtype, torch.float32}
    assert (len(dtypes) == 2) == (name == "wan-1.3b"), "as from_pretrained leaves it"
    assert torch.get_default_dtype() == torch.float32
    # What is computed when a network is made, such as rotary embeddings, has all its digits.
    for (path, own), (_, expected) in zip(made.named_buffers(), full.named_buffers()):
        assert own.dtype == expected.dtype and torch.equal(own, expected), path
    end = sampled(network, pipe)
    assert bool(end.isfinite().all()) and float(end.float().std()) > 0.01
    assert LAYOUTS[network.layout].to_grid(end).shape[2:] == ((2, 2) if "sana" in name else (8, 8))


class TooLarge(Random):
    """As if the device were too small for the weights."""

    def build(self, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Network]:
    own: dict[str, Network] = {"too-large": TooLarge(**vars(small("sd15")))}
    own |= {"sana": small("sana-0.6b"), "flux": small("flux-dev")}
    for module in (networks, train):
        monkeypatch.setattr(module, "NETWORKS", own)
    return own


@pytest.mark.slow
def test_bench_train_measures_every_way_and_goes_on_after_a_failure(
    registry: dict[str, Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learn: Callable[..., None] = train.learn
    attention = torch.backends.cuda.cudnn_sdp_enabled()

    def one_fails(measure: Any, way: train.Way, *others: Any) -> None:
        if way.solver == "SpanLift" and measure.name == "sana":
            raise RuntimeError("no kernel " + "x" * 300)
        learn(measure, way, *others)

    monkeypatch.setattr(train, "learn", one_fails)
    file = tmp_path / "train.json"
    options = ["--networks", *registry, "--batch-size", "2", "--steps", "2", "--updates", "1", "--device", "cpu"]
    assert main(["bench", "train", *options, "--output", str(file)]) == 0
    shown, data = capsys.readouterr().out, json.loads(file.read_text())
    assert data["recipe"] == {"pairs": 256, "held_out": 64, "teacher_steps": 50} and data["batch_size"] == 2
    (first, *rows) = data["rows"]
    assert first["network"] == "too-large" and first["weights_gib"] is first["seconds_per_update"] is None
    assert first["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    ways = [(w.solver, w.optimizer, 2) for w in train.WAYS]
    assert [(r["solver"], r["optimizer"], r["num_inference_steps"]) for r in rows] == 2 * ways
    assert [r["network"] for r in rows] == ["sana"] * 3 + ["flux"] * 3
    for row in rows:
        assert row.keys() == first.keys() and row["weights_gib"] > 0 and row["ms_per_evaluation"] > 0
        assert row["dtype"] == "float32" and row["size"] == "512 x 512"
        assert row["environment"]["torch"] == torch.__version__ and "1 threads" in row["environment"]["device"]
        if (row["network"], row["solver"]) == ("sana", "SpanLift"):
            assert row["failed"].startswith("RuntimeError: no kernel xx") and len(row["failed"]) < 220
            assert row["peak_gib"] is None and row["recipe_minutes"] is None
            continue
        assert row["failed"] is None and row["seconds_per_update"] > 0 and row["peak_gib"] > 0
        way = train.Way(row["solver"], row["optimizer"], row["num_inference_steps"])
        numbers = row["ms_per_evaluation"] / 1e3, row["seconds_per_update"]
        seconds = train.recipe_seconds(train.settings(way, None, 8), way.num_inference_steps, *numbers, 2)
        assert row["recipe_minutes"] == pytest.approx(seconds / 60)
    assert "Tried to allocate" in shown and "estimated from the measured updates" in shown
    assert "environment" not in shown
    assert torch.backends.cuda.cudnn_sdp_enabled() == attention


def test_weights_whose_samples_are_not_finite_are_a_row(
    registry: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_nan(self: Random, device: torch.device) -> Any:
        made = weights(self, device)
        torch.nn.init.constant_(made.proj_out.bias, torch.nan)
        return made

    weights = Random.weights
    monkeypatch.setattr(Random, "weights", with_nan)
    (row,) = train.train(["flux"], batch_size=1, updates=1, device="cpu")
    assert "samples that are not finite" in row["failed"] and row["solver"] is None


def test_a_recipe_is_the_sum_of_its_parts() -> None:
    config = LearningConfig(optimizer="least_squares")  # 30 updates of 8, a check at the start and after every 5
    seconds = train.recipe_seconds(config, 3, per_evaluation=0.5, per_update=7.0, batch_size=4)
    assert seconds == (256 + 64) * 50 * 0.5 + 30 * 7 * 2 + 7 * 64 * 3 * 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"networks": ["sd3"]}, r"networks=\['sd3'\] are not here: there are"),
        ({"device": "gpu"}, "device='gpu' is none of PyTorch's: use cpu, cuda"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"updates": 0}, "updates=0 must be"),
        ({"steps": 0}, "steps=0 must be"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train.train(**options)


def test_cpus_measure_the_small_pipelines_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Measure, "rows", lambda self, bar: [{"network": self.name}])
    assert [row["network"] for row in train.train(device="cpu")] == ["emoji-sd", "emoji-flow"]
    assert [row["network"] for row in train.train(device="meta")] == list(REAL) and len(REAL) == 6
