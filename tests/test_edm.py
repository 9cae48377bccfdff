"""EDM's pixel networks: the paper's formulas in plain numbers, NVIDIA's files read but not run, and learning."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from test_trainer import run_usage
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dywspan
from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.cli import main
from dywspan.distill import DistillConfig, SolverTrainer
from dywspan.edm import EDMPipeline, EDMUNet, convert_edm
from dywspan.pipelines.rollout import blocks, load_pipeline

TINY: dict[str, dict[str, Any]] = {
    "ddpm++": {"model_channels": 8, "channel_mult": [1, 2], "num_class_embeds": None},
    "adm": {"model_channels": 32, "channel_mult": [1, 4], "num_class_embeds": 5},  # two heads
}
COMMON: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "attention_resolutions": [4]}


def tiny(architecture: str, **changes: Any) -> EDMUNet:
    """With random weights everywhere."""
    generator = torch.Generator().manual_seed(0)
    network = EDMUNet(architecture, **{**COMMON, **TINY[architecture], **changes}).eval().requires_grad_(False)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network


def pipeline(architecture: str = "adm", **changes: Any) -> EDMPipeline:
    pipe = EDMPipeline(tiny(architecture, **changes), diffusers.EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def published(network: EDMUNet) -> dict[str, Tensor]:
    """Its weights by the names of NVIDIA's files."""
    size, own = network.config.sample_size, network.config.architecture == "ddpm++"
    head = f"dec.{size}x{size}_aux_" if own else "out_"
    names = {k: re.sub(r"^embedding\.", "", re.sub("^out_", head, k)) for k in network.state_dict()}
    return {names[k]: v for k, v in network.state_dict().items()}


# --------------------------------------------------------------------------------------------- the network, by hand


class ByHand:
    """A network in NumPy, of the names and layouts in NVIDIA's files."""

    def __init__(self, adm: bool, weights: dict[str, Tensor]) -> None:
        self.adm, self.weights = adm, {k: v.double().numpy() for k, v in weights.items()}
        self.scale = 1.0 if adm else 0.5**0.5

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        kernel, (height, width) = self.weights[f"{name}.weight"], x.shape[2:]
        border = kernel.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
        total = np.zeros((len(x), len(kernel), height, width)) + self.weights[f"{name}.bias"][:, None, None]
        for i, j in np.ndindex(*kernel.shape[2:]):
            part = padded[:, :, i : i + height, j : j + width]
            total += np.einsum("oc,bchw->bohw", kernel[:, :, i, j], part)
        return total

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        groups = min(32, x.shape[1] // 4)
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(2, keepdims=True)) / np.sqrt(y.var(2, keepdims=True) + (1e-5 if self.adm else 1e-6))
        factor, shift = (self.weights[f"{name}.{own}"][:, None, None] for own in ("weight", "bias"))
        return y.reshape(x.shape) * factor + shift

    def told(self, noise: float, label: int | None) -> np.ndarray:
        width = self.weights["map_layer0.weight"].shape[1]
        half = width // 2
        rates = [10000 ** -(k / (half if self.adm else half - 1)) for k in range(half)]
        sines, cosines = ([f(noise * rate) for rate in rates] for f in (math.sin, math.cos))
        told = np.array([cosines + sines if self.adm else sines + cosines])
        if label is not None and not self.adm:
            one = np.zeros((1, self.weights["map_label.weight"].shape[1]))
            one[0, label] = one.shape[1] ** 0.5
            told = told + self.linear("map_label", one)
        told = self.linear("map_layer1", silu(self.linear("map_layer0", told)))
        if label is not None and self.adm:
            told = told + self.weights["map_label.weight"][:, label]
        return silu(told)

    def block(self, name: str, x: np.ndarray, told: np.ndarray) -> np.ndarray:
        def resampled(v: np.ndarray) -> np.ndarray:
            if name.endswith("_up"):
                return v.repeat(2, 2).repeat(2, 3)
            if name.endswith("_down"):
                return (v[:, :, ::2, ::2] + v[:, :, 1::2, ::2] + v[:, :, ::2, 1::2] + v[:, :, 1::2, 1::2]) / 4
            return v

        h = self.conv(f"{name}.conv0", resampled(silu(self.norm(f"{name}.norm0", x))))
        parts = self.linear(f"{name}.affine", told)[:, :, None, None]
        if self.adm:
            half = parts.shape[1] // 2
            h = self.norm(f"{name}.norm1", h) * (1 + parts[:, :half]) + parts[:, half:]
        else:
            h = self.norm(f"{name}.norm1", h + parts)
        h = self.conv(f"{name}.conv1", silu(h))
        shortcut = resampled(x)
        if f"{name}.skip.weight" in self.weights:
            shortcut = self.conv(f"{name}.skip", shortcut)
        x = self.scale * (h + shortcut)
        if f"{name}.qkv.weight" in self.weights:
            x = self.scale * (x + self.conv(f"{name}.proj", self.attention(name, x)))
        return x

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        channels = x.shape[1]
        width = 64 if self.adm else channels
        flat, mixed = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).reshape(len(x), 3 * channels, -1), []
        for start in range(0, channels, width):
            own = flat[:, 3 * start : 3 * (start + width)]
            query, key, value = own[:, 0::3], own[:, 1::3], own[:, 2::3]
            scores = np.exp(np.einsum("bcq,bck->bqk", query, key) / width**0.5)
            mixed.append(np.einsum("bqk,bck->bcq", scores / scores.sum(2, keepdims=True), value))
        return np.concatenate(mixed, 1).reshape(x.shape)

    def __call__(self, x: np.ndarray, noise: float, label: int | None) -> np.ndarray:
        told, kept = self.told(noise, label), [self.conv("enc.8x8_conv", x)]
        for name in ("8x8_block0", "4x4_down", "4x4_block0"):
            kept.append(self.block(f"enc.{name}", kept[-1], told))
        x = kept[-1]
        for name in ("4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"):
            x = self.block(f"dec.{name}", np.concatenate([x, kept.pop()], 1) if "block" in name else x, told)
        head = "out" if self.adm else "dec.8x8_aux"
        return self.conv(f"{head}_conv", silu(self.norm(f"{head}_norm", x)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("architecture", "classes"), [("ddpm++", None), ("ddpm++", 5), ("adm", None), ("adm", 5)])
def test_a_forward_pass_is_that_by_hand(architecture: str, classes: int | None) -> None:
    network = tiny(architecture, num_class_embeds=classes)
    x, noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([-1.2, 0.3, 1.1])
    labels = torch.tensor([4, 0, 2]) if classes else None
    output = network.double()(x.double(), noise, labels).sample.numpy()
    hand = ByHand(architecture == "adm", published(network))
    for i in range(3):
        expected = hand(x[i : i + 1].double().numpy(), float(noise[i]), int(labels[i]) if classes else None)
        np.testing.assert_allclose(output[i : i + 1], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def denoised(network: EDMUNet, x: Tensor, sigma: float) -> Tensor:
    """D = c_skip x + c_out F(c_in x; ln(sigma) / 4), EDM table 1, with sigma_data = 0.5."""
    total = sigma**2 + 0.5**2
    output = network(x / total**0.5, math.log(sigma) / 4).sample
    return 0.5**2 / total * x + sigma * 0.5 / total**0.5 * output


def test_a_step_from_noise_to_zero_is_the_denoised_image() -> None:
    pipe, noise = pipeline("ddpm++"), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler, solver="euler", grid={"sigmas": [80.0, 0.0]})
    found = pipe(latents=noise, num_inference_steps=1, output_type="latent").images
    torch.testing.assert_close(found, denoised(pipe.unet, 80 * noise, 80), rtol=1e-4, atol=1e-4)


def test_the_analytical_first_step_asks_no_network() -> None:
    """d_0 = x_0 / sqrt(1 + 80^2), and one evaluation to zero from 10."""
    pipe, noise = pipeline("ddpm++"), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    table = SolverTable(torch.ones(2, 1).double(), torch.ones(2).double(), {"sigmas": [80.0, 10.0, 0.0]}, afs=True)
    pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler).with_tables([table])
    found = pipe(latents=noise, num_inference_steps=1, output_type="latent").images
    x = 80 * noise * (1 + (10 - 80) / (1 + 80**2) ** 0.5)
    torch.testing.assert_close(found, denoised(pipe.unet, x, 10), rtol=1e-4, atol=1e-4)


ADM = {"architecture": "adm", "sample_size": 64, "model_channels": 192, "channel_mult": (1, 2, 3, 4)}
ADM |= {"layers_per_block": 3, "attention_resolutions": (32, 16, 8), "num_class_embeds": 1000}


@pytest.mark.parametrize(
    ("settings", "millions", "billions"),
    [(ADM, 295.899267, 109.665), ({"sample_size": 32}, 55.7, None)],
    ids=["adm", "ddpm++"],
)
def test_sizes_are_the_published_ones(settings: dict[str, Any], millions: float, billions: float | None) -> None:
    """Multiply-adds count those of resampling as convolutions: four for each pixel of the smaller image."""
    with torch.device("meta"):
        network = EDMUNet(**settings)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.05 if billions is None else 1e-7)
        if billions is None:
            return
        resampling = []

        def look(block: Any, given: Any, output: Tensor) -> None:
            small = output if block.change == "down" else given[0]
            resampling.append(2 * 4 * (given[0].shape[1] * small[0, 0].numel() if block.change else 0))

        for block in (m for m in network.modules() if hasattr(m, "change")):
            block.register_forward_hook(look)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 64, 64), torch.zeros(()), torch.zeros(1, dtype=torch.long))
    assert round((counter.get_total_flops() / 2 + sum(resampling)) / 1e9, 3) == billions


def test_a_networks_layers_are_found() -> None:
    """Those that may be recomputed or sharded one by one."""
    network = tiny("adm")
    assert blocks(network) == [*network.enc.children(), *network.dec.children()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "ncsn++"}, "none of ddpm\\+\\+, adm"),
        ({"sample_size": 9}, "sample_size=9 must be a multiple of 4"),
        ({"model_channels": 10}, "model_channels=10 of 4"),
        ({"layers_per_block": 0}, "layers_per_block=0 must be"),
        ({"channel_mult": (1,) * 9}, "channel_mult's length=9"),
        ({"architecture": "adm", "model_channels": 32, "channel_mult": (1, 1)}, "must be multiples of 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        EDMUNet(**changes)


# ------------------------------------------------------------------------------------------------ files as NVIDIA's


class EasyDict(dict):
    """Pickled by its class name."""


class Persistent(nn.Module):
    """Pickled as a call of a function, with its class's name, source code that must never run, and its attributes."""

    def __init__(self, class_name: str, source: str, tensors: dict[str, Tensor], **attributes: Any) -> None:
        super().__init__()
        self.class_name, self.source = class_name, source
        self.__dict__.update(attributes)
        for part in dict.fromkeys(name.partition(".")[0] for name in tensors):
            inner = {n.partition(".")[2]: v for n, v in tensors.items() if n.partition(".")[0] == part}
            if "" not in inner:
                layers = ("enc", "dec")
                self.add_module(
                    part, _dictionary(source, inner) if part in layers else Persistent("Any", source, inner)
                )
            elif part == "resample_filter":
                self.register_buffer(part, inner[""])
            else:
                self.register_parameter(part, nn.Parameter(inner[""].clone()))

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("class_name", "source")}
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=self.class_name, state=state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def _layer(source: str, tensors: dict[str, Tensor]) -> Persistent:
    return Persistent("Any", source, tensors)


def _dictionary(source: str, tensors: dict[str, Tensor]) -> nn.ModuleDict:
    return nn.ModuleDict(Persistent("Any", source, tensors).named_children())


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What running anything of a file would make."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@contextlib.contextmanager
def modules_of_theirs() -> Iterator[None]:
    """There while a file is written, gone when it is read."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("called")

    own = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib.util", "dnnlib")}
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    own["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    own["dnnlib.util"].EasyDict, EasyDict.__module__ = EasyDict, "dnnlib.util"  # type: ignore[attr-defined]
    sys.modules.update(own)
    try:
        yield
    finally:
        EasyDict.__module__ = __name__
        for name in own:
            del sys.modules[name]


FILTER = torch.full((1, 1, 2, 2), 0.25)
Change = Callable[[dict[str, Any]], Any]


def file_of(
    network: EDMUNet,
    folder: Path,
    marker: Path,
    change: Change = lambda given: None,
    last: Callable[[nn.Module], None] = lambda ema: None,
) -> Path:
    """A network as a published file holds it; ``change`` gets what it is made of, and ``last`` the whole."""
    config, source = network.config, f"import os; os.mkdir({str(marker)!r})"
    tensors = published(network)
    for name in [n for n in tensors if re.search(r"_(up|down)\.conv0\.weight", n)]:
        tensors[name.replace("weight", "resample_filter")] = FILTER
    if config.architecture == "ddpm++":
        tensors["map_augment.weight"] = torch.ones(config.model_channels, 9)
    arguments = {"img_resolution": config.sample_size, "in_channels": 3, "out_channels": 3}
    arguments |= {"label_dim": config.num_class_embeds or 0, "model_channels": config.model_channels}
    arguments |= {"channel_mult": list(config.channel_mult), "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.13}
    inner = {"ddpm++": "SongUNet", "adm": "DhariwalUNet"}[config.architecture]
    given: dict[str, Any] = {"outer": "EDMPrecond", "inner": inner, "arguments": arguments, "tensors": tensors}
    given |= {"file": {"loss_fn": None, "dataset_kwargs": EasyDict(path="somewhere")}, "sigma_data": 0.5}
    change(given)
    model = Persistent(
        given["inner"], source, given["tensors"], _init_args=(), _init_kwargs=EasyDict(given["arguments"])
    )
    ema = Persistent(given["outer"], source, {}, img_resolution=8, sigma_data=given["sigma_data"], use_fp16=False)
    ema._modules["model"] = model
    last(ema)
    with modules_of_theirs():
        (folder / "network.pkl").write_bytes(pickle.dumps({"ema": ema, **given["file"]}))
    return folder / "network.pkl"


@pytest.mark.parametrize("architecture", TINY)
def test_a_published_file_becomes_the_network(
    architecture: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny(architecture)
    evil = lambda given: given["file"].update(augment_pipe=Evil(marker))  # noqa: E731
    file = file_of(network, tmp_path, marker, evil)
    assert main(["convert-edm", str(file), "--output", str(tmp_path / "new" / "pipe")]) == 0
    assert f"EDMPipeline, {architecture}, " in capsys.readouterr().out
    files = {str(f.relative_to(tmp_path / "new")) for f in (tmp_path / "new").rglob("*") if f.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    own = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights)
    assert files == {f"pipe/{name}" for name in own}
    pipe = load_pipeline(str(tmp_path / "new" / "pipe"), device="cpu")
    assert isinstance(pipe, EDMPipeline) and not pipe.unet.training
    same = ("architecture", *COMMON, *TINY["adm"])
    assert {k: pipe.unet.config[k] for k in same} == {k: network.config[k] for k in same}
    assert pipe.unet.config.dropout == 0.13
    own_scheduler = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "prediction_type": "epsilon"}
    assert dict(pipe.scheduler.config).items() >= own_scheduler.items()
    found = pipe.unet.state_dict()
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        convert_edm(file, tmp_path / "new" / "pipe")


def put(where: str, key: str, value: Any) -> Change:
    return lambda given: given[where].update({key: value})


def swap(key: str, value: Any) -> Change:
    return lambda given: given.update({key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap("outer", "VPPrecond"), "asked through VPPrecond; only EDMPrecond"),
        (swap("inner", "Other"), "its network is Other, none of SongUNet, DhariwalUNet"),
        (put("arguments", "embedding_type", "fourier"), "no DDPM\\+\\+ and no ADM: embedding_type='fourier'"),
        (put("arguments", "encoder_type", "residual"), "encoder_type='residual'"),
        (put("arguments", "num_blocks", 2), "tensors are not those of its arguments: dec.4x4_block"),
        (put("arguments", "model_channels", 10**9), "model_channels=1000000000 must be"),
        (put("arguments", "channel_mult", "wide"), "channel_mult='w' must be"),
        (put("tensors", "enc.4x4_down.conv0.resample_filter", FILTER / 2), "does not resample by means of 2 x 2"),
        (
            put("tensors", "map_layer0.weight", torch.ones(3, 3)),
            "1 tensors are not those .*: embedding.map_layer0.weight",
        ),
        (put("tensors", "map_more.weight", torch.ones(3)), "1 tensors are not those"),
        (put("file", "ema", None), "holds no EDM network"),
        (put("tensors", "x" * 200, torch.ones(3)), "holds no EDM network .*names that no layer has"),
        (swap("sigma_data", "half"), "sigma_data='half' must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_network_is_refused(change: Change, said: str, tmp_path: Path, marker: Path) -> None:
    with pytest.raises(ValueError, match=said):
        convert_edm(file_of(tiny("ddpm++"), tmp_path, marker, change), tmp_path / "pipe")
    assert {f.name for f in tmp_path.iterdir()} == {"network.pkl"}, "nothing is written"


@pytest.mark.parametrize(
    "write",
    [
        lambda file, marker: pickle.dumps(Evil(marker)),
        lambda file, marker: pickle.dumps({"ema": Evil(marker)}),
        lambda file, marker: file.read_bytes()[:-1000],
        lambda file, marker: b"no pickle",
        lambda file, marker: pickle.dumps({"loss": 3}),
    ],
    ids=["evil", "evil network", "cut", "text", "no network"],
)
def test_a_damaged_or_malicious_file_does_nothing(write: Any, tmp_path: Path, marker: Path) -> None:
    file = file_of(tiny("ddpm++"), tmp_path, marker)
    file.write_bytes(write(file, marker))
    with pytest.raises(ValueError, match=r"network\.pkl"):
        convert_edm(file, tmp_path / "pipe")


@pytest.mark.parametrize("place", ["arguments", "tensors"])
def test_what_a_network_is_made_of_runs_nothing(place: str, tmp_path: Path, marker: Path) -> None:
    """Calls hidden where an argument or a parameter is expected."""
    network = tiny("ddpm++")
    file = file_of(network, tmp_path, marker, put("arguments", "num_blocks", Evil(marker)))
    if place == "tensors":
        with modules_of_theirs():
            model = Persistent("SongUNet", "", {}, _init_args=(), _init_kwargs={})
            model._parameters["weight"] = Evil(marker)  # type: ignore[assignment]
            ema = Persistent("EDMPrecond", "", {}, sigma_data=0.5)
            ema._modules["model"] = model
            file.write_bytes(pickle.dumps({"ema": ema}))
    with pytest.raises(ValueError, match=r"num_blocks|layers_per_block|weight is no tensor"):
        convert_edm(file, tmp_path / "pipe")


@pytest.mark.parametrize("loops", [False, True])
def test_layers_that_are_named_again_and_again_end(loops: bool, tmp_path: Path, marker: Path) -> None:
    model = Persistent("SongUNet", "", {}, _init_args=(), _init_kwargs={})
    inner = model
    for _ in range(40):  # 2^40 paths
        child = Persistent("Any", "", {})
        inner._modules.update(a=child, b=child)
        inner = child
    if loops:  # as an object of no class of theirs
        first = nn.ModuleDict()
        first._modules["again"] = first
        model._modules = OrderedDict(first=first)  # type: ignore[assignment]
    ema = Persistent("EDMPrecond", "", {}, sigma_data=0.5)
    ema._modules["model"] = model
    with modules_of_theirs():
        (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": ema}))
    with pytest.raises(ValueError, match="more layers, or layers deeper"):
        convert_edm(tmp_path / "network.pkl", tmp_path / "pipe")


class Shared:
    """A tensor, the storage of which others name too."""

    def __init__(self, storage: Any, shape: torch.Size) -> None:
        self.storage, self.shape = storage, tuple(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


def test_one_memory_for_many_tensors_is_refused(tmp_path: Path, marker: Path) -> None:
    """Written out, they would be larger than the file by as much as it likes."""

    def share(ema: nn.Module) -> None:
        memory: Any = torch.zeros(25_000).untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32, _internal=True)
        for module in ema.modules():
            own: Any = {k: Shared(storage, v.shape) for k, v in module._parameters.items() if v is not None}
            module._parameters.update(own)

    file = file_of(tiny("ddpm++"), tmp_path, marker, last=share)
    assert file.stat().st_size < 2 * 10**5
    with pytest.raises(ValueError, match="share memory"):
        convert_edm(file, tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------ sampling and learning

GRID = {"name": "polynomial", "rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0}
LABELS = [{"class_labels": k % 5} for k in range(12)]


def test_images_of_each_kind_and_labels_that_count() -> None:
    pipe = pipeline()
    latent, pt, array = (
        pipe(class_labels=[1, 2], num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt", "np")
    )
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    (image,) = pipe(class_labels=3, num_inference_steps=2, return_dict=False)[0]
    assert image.size == (8, 8)
    own = [torch.Generator().manual_seed(k) for k in (5, 5)]
    same = pipe(class_labels=[1, 2], num_inference_steps=2, generator=own, output_type="latent").images
    assert not torch.equal(same[0], same[1]), "the class alone differs"
    assert len(pipe(batch_size=3, class_labels=1, num_inference_steps=1).images) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"class_labels": [1, 2, 3], "batch_size": 2}, "3 class_labels for 2 images"),
        ({"class_labels": 5}, r"class_labels=\[5\] must be from 0 to 4"),
        ({}, "class_labels are missing: give each image one, from 0 to 4"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type='jpg'"),
        ({"class_labels": 1, "latents": torch.zeros(1, 3, 4, 4)}, r"latents have shape \(1, 3, 4, 4\)"),
    ],
)
def test_calls_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline()(**given)


def test_a_network_without_classes_takes_no_labels() -> None:
    with pytest.raises(ValueError, match="left out: this network has no classes"):
        pipeline("ddpm++")(class_labels=1)
    with pytest.raises(ValueError, match="leave class_labels out"):
        pipeline("ddpm++").unet(torch.zeros(1, 3, 8, 8), 0.0, torch.tensor([1]))


@pytest.mark.slow
def test_a_table_and_a_lift_are_learned_for_classes_with_afs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the papers' pixel experiments: polynomial grids, a teacher that ends by denoising, AFS."""
    pipeline("ddpm++", num_class_embeds=5).save_pretrained(tmp_path / "model")
    pipe, told = load_pipeline(str(tmp_path / "model"), device="cpu"), []
    pipe.unet.register_forward_pre_hook(lambda module, args: told.append(args[1].item()))
    shared: dict[str, Any] = {"model": str(tmp_path / "model"), "prompts": LABELS, "steps": [2], "order": 3}
    shared |= {"teacher": "ipndm", "teacher_steps": 8, "teacher_order": 3, "teacher_grid": GRID, "pairs": 8}
    shared |= {"held_out": 4, "batch_size": 4, "pictures": 1, "loss": "mse"}
    config = DistillConfig(
        output=str(tmp_path / "table"), grid=GRID, afs=True, optimizer="least_squares", updates=1, **shared
    )
    table = SolverTrainer(pipe, config).train().tables[2]
    first, *_, last = told[:9]
    assert (first, last) == pytest.approx((math.log(80) / 4, math.log(0.002) / 4)), "8 steps, and one that denoises"
    own = {"solver": "spanlift", "base": str(tmp_path / "table"), "operator": {"width": 8}, "updates": 6, "lr": 1e-3}
    lifting = DistillConfig(output=str(tmp_path / "lift"), evaluate_every=1, **own, **shared)
    lift = SolverTrainer(pipe, lifting).train().lifts[2]
    for learned in (table, lift):
        error = learned.provenance["held_out_error"]
        assert error["after"] < error["before"]
    assert len(table.weights) == 3 and table.afs, "two evaluations, three steps"
    for folder, kind in (("table", DyWeightScheduler), ("lift", SpanLiftScheduler)):
        pipe.scheduler = kind.from_pretrained(tmp_path / folder)
        told.clear()
        assert len(pipe(class_labels=[0, 4], num_inference_steps=2).images) == 2 and len(told) == 2
    card = (tmp_path / "table" / "README.md").read_text(encoding="utf-8")
    assert "from dywspan.edm import EDMPipeline" in card
    assert len(run_usage(card, tmp_path / "table", monkeypatch)["result"].images) == 1


@pytest.mark.weekly
@pytest.mark.slow
def test_tuning() -> None:
    pipe = pipeline("ddpm++")
    scheduler = dywspan.tune(pipe, steps=2, pairs=8, held_out=4, evaluations=600)
    assert pipe.scheduler is scheduler and scheduler.tables[2].convention == "edm"
    assert pipe(num_inference_steps=2, output_type="pt").images.isfinite().all()
