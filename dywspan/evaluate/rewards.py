"""How well an image fits its prompt, and how much people would like it: CLIP score, ImageReward, HPS v2.1."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from ..pipelines.weights import weights_for
from .statistics import Metric, Sample

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SIDE = 224  # pixels
HEAD = 64  # channels of an attention head, in all of BLIP


def clip_score(pipe: Any = None, model: str = "ViT-L-14-quickgelu", weights: str | Path = "openai") -> Metric:
    """100 max(cos(f(image), g(prompt)), 0), CLIP's embeddings f and g; then the mean over images.

    Source: Hessel et al. 2021, eq. (1), with the usual 100 for their 2.5, and without their "A photo depicts". Scores
    of different models differ by several points: compare only those of one.

    Args:
        model: of ``open_clip.list_models()``. OpenAI's weights are for those named "-quickgelu".
        weights: of open_clip's tags for the model, or a local file in open_clip's layout.

    Raises:
        ValueError: open_clip has no such model, or no such weights for it.
        OSError: the weights are neither cached nor to be had.
        ModuleNotFoundError: open_clip is not installed.
    """
    package, network, preprocess = _open_clip("clip_score", model, weights)
    tokens = package.get_tokenizer(model)

    @torch.no_grad()
    def rows(sample: Sample) -> Tensor:
        device, prompts = sample.images.device, sample.need("prompts", "clip_score")
        pixels = torch.stack([preprocess(image) for image in _pil(sample.images)])
        return 100 * _cosine(network.to(device), pixels.to(device), tokens(list(prompts)).to(device)).clamp(min=0)

    facts = {"network": f"{model} ({_identity(weights)})", "scale": "100"}
    return Metric("clip_score", rows, lower_is_better=False, facts=facts, needs=("prompts",))


def hps(pipe: Any = None, weights: str | Path | None = None, model: str = "ViT-H-14") -> Metric:
    """Human preference score v2.1: cos(f(image), g(prompt)) of a CLIP that was trained on people's choices.

    Source: Wu et al. 2023, and the package ``hpsv2``: the longer side is resized to 224, the shorter padded with black.
    Two deviations: float32 for its mixed precision; and resizing is antialiased, which there began with torchvision
    0.17.

    Args:
        weights: the file ``HPS_v2.1_compressed.pt``; None for the Hub's, in xswu/HPSv2.
        model: its architecture.

    Raises:
        OSError: the weights are neither cached nor to be had.
        ModuleNotFoundError: open_clip is not installed.
    """
    file = _file("hps", weights, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    package, network, _ = _open_clip("hps", model, file)
    tokens = package.get_tokenizer(model)

    @torch.no_grad()
    def rows(sample: Sample) -> Tensor:
        device, prompts = sample.images.device, sample.need("prompts", "hps")
        return _cosine(network.to(device), _padded(sample.images), tokens(list(prompts)).to(device))

    facts = {"network": f"HPS v2.1 ({_identity(file)})"}
    return Metric("hps", rows, lower_is_better=False, facts=facts, needs=("prompts",))


def image_reward(pipe: Any = None, weights: str | Path | None = None, vocabulary: str | Path | None = None) -> Metric:
    """ImageReward: a BLIP that reads the prompt with the image, and a linear head trained on people's choices.

    Source: Xu et al. 2023, and the package ``image-reward`` 1.5, whose pinned dependencies no longer install: its
    published weights are read into transformers' BLIP.

    Args:
        weights: the file ``ImageReward.pt``; None for the Hub's, in THUDM/ImageReward.
        vocabulary: BERT's file ``vocab.txt``; None for the Hub's, in google-bert/bert-base-uncased.

    Raises:
        ValueError: the file holds something else.
        OSError: the weights are neither cached nor to be had.
        ModuleNotFoundError: transformers is not installed.
    """
    package = _package("image_reward", "transformers")
    file = _file("image_reward", weights, "THUDM/ImageReward", "ImageReward.pt")
    # By name, some releases of transformers read an absent tokenizer as an empty one.
    words = _file("image_reward", vocabulary, "google-bert/bert-base-uncased", "vocab.txt")
    read = package.BertTokenizer(str(words), do_lower_case=True)
    read.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    try:
        network = reward_network(torch.load(file, map_location="cpu", weights_only=True))
    except (KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"weights={str(file)!r} are not those of ImageReward.pt: {_first_line(error)}") from error

    @torch.no_grad()
    def rows(sample: Sample) -> Tensor:
        device, prompts = sample.images.device, list(sample.need("prompts", "image_reward"))
        text = read(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(device)
        return network.to(device)(_cropped(sample.images), text.input_ids, text.attention_mask)

    facts = {"network": f"ImageReward 1.0 ({_identity(file)})"}
    return Metric("image_reward", rows, lower_is_better=False, facts=facts, needs=("prompts",))


def _identity(weights: str | Path) -> str:
    """A tag, or the name and contents of a file: another one of that name makes other numbers."""
    if not (file := Path(weights)).is_file():
        return str(weights)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return f"{file.name}, sha256 {digest.hexdigest()[:12]}"


# -------------------------------------------------------------------------------------------------------- ImageReward


class RewardNetwork(nn.Module):
    """(pixels (B, 3, S, S), ids (B, T), mask (B, T)) -> rewards (B, 1), standardised as published."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        return (self.head(text.last_hidden_state[:, 0]) - self.MEAN) / self.STD


# Parts of names in the published file, and transformers'.
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "attn.proj": "self_attn.projection",
    "attn.qkv": "self_attn.qkv",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def reward_network(state: Mapping[str, Tensor]) -> RewardNetwork:
    """The network of a published file: its keys renamed, its sizes read from its tensors.

    Raises:
        KeyError, RuntimeError, ValueError: a tensor is missing, or has another shape.
    """
    package = _package("image_reward", "transformers")
    vision, text, head = (_under(prefix, state) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."))
    text.pop("embeddings.position_ids", None)  # a buffer of old releases
    _, _, side, _ = vision["patch_embed.proj.weight"].shape
    _, positions, width = vision["pos_embed"].shape
    words, text_width = text["embeddings.word_embeddings.weight"].shape
    network = RewardNetwork(
        package.BlipVisionModel(
            package.BlipVisionConfig(
                hidden_size=width,
                intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]),
                num_hidden_layers=_count(vision, "blocks."),
                num_attention_heads=width // HEAD,
                image_size=round((positions - 1) ** 0.5) * side,
                patch_size=side,
                layer_norm_eps=1e-6,
            )
        ),
        package.BlipTextModel(
            package.BlipTextConfig(
                vocab_size=words,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
                num_hidden_layers=_count(text, "encoder.layer."),
                num_attention_heads=text_width // HEAD,
                max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
                is_decoder=True,  # has cross attention; none of it is causal unless the call says so
            ),
            add_pooling_layer=False,
        ),
        # Without activations between them; dropouts have numbers in the file.
        nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0]) for name, w in head.items() if name.endswith("weight"))),
    )
    for old, new in VISION.items():
        vision = {name.replace(old, new): value for name, value in vision.items()}
    vision = {f"post_layer{name}" if name.startswith("norm.") else name: value for name, value in vision.items()}
    network.vision.load_state_dict(vision)
    network.text.load_state_dict(text)
    network.head.load_state_dict(dict(zip(network.head.state_dict(), head.values(), strict=True)))
    return network.float().eval().requires_grad_(False)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


# ------------------------------------------------------------------------------------------------------------- images


def _pil(images: Tensor) -> list[Image.Image]:
    levels = (images * 255).round().byte().movedim(1, 3).cpu().numpy()
    return [Image.fromarray(image) for image in levels]


def _normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).reshape(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


def _cropped(images: Tensor) -> Tensor:
    """(B, 3, 224, 224): the shorter side resized to 224 as Pillow does, to 8-bit levels, and the middle of the rest."""
    height, width = images.shape[-2:]
    size = int(SIDE * width / min(height, width)), int(SIDE * height / min(height, width))
    left, top = (round((n - SIDE) / 2) for n in size)
    resized = (image.resize(size, Image.Resampling.BICUBIC) for image in _pil(images))
    cropped = np.stack([np.asarray(image.crop((left, top, left + SIDE, top + SIDE))) for image in resized])
    return _normalized(torch.from_numpy(cropped).to(images.device).movedim(3, 1) / 255)


def _padded(images: Tensor) -> Tensor:
    """(B, 3, 224, 224): the longer side resized to 224, not rounded to levels, and black on both sides of the rest."""
    scale = SIDE / max(images.shape[-2:])
    height, width = (round(n * scale) for n in images.shape[-2:])
    resized = interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    return _normalized(pad(resized, (left, SIDE - width - left, top, SIDE - height - top)))


# -------------------------------------------------------------------------------------------------- packages, weights


def _cosine(network: Any, pixels: Tensor, tokens: Tensor) -> Tensor:
    """(B, 1) of a CLIP's embeddings of images and texts."""
    image = network.encode_image(pixels, normalize=True)
    return (image * network.encode_text(tokens, normalize=True)).sum(1, keepdim=True).float()


def _open_clip(metric: str, model: str, weights: str | Path) -> tuple[Any, Any, Any]:
    """open_clip, the frozen model, and its preprocessing of PIL images."""
    package = _package(metric, "open_clip", "open-clip-torch")
    if model not in package.list_models():
        raise ValueError(f"model={model!r} is none of open_clip's: open_clip.list_models() says what there is.")
    if not Path(weights).is_file():
        if weights not in (tags := package.list_pretrained_tags_by_model(model)):
            raise ValueError(f"weights={str(weights)!r} is neither a file nor one of {model}'s: {', '.join(tags)}.")
        source = package.get_pretrained_cfg(model, weights)
        with _to_be_had(metric, source.get("hf_hub", "").rstrip("/"), "open_clip_model.safetensors"):
            package.download_pretrained(source)
    try:
        network, _, preprocess = package.create_model_and_transforms(model, pretrained=str(weights))
    except (RuntimeError, pickle.UnpicklingError) as error:
        why = f"are not those of {model} in open_clip's layout: {_first_line(error)}"
        raise ValueError(f"weights={str(weights)!r} {why}") from error
    return package, network.float().eval().requires_grad_(False), preprocess


def _file(metric: str, weights: str | Path | None, repo: str, name: str) -> Path:
    """A file of the Hub, or the local one."""
    if weights is None:
        with _to_be_had(metric, repo, name):
            return Path(hf_hub_download(repo, name))
    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights={str(weights)!r} is no file: {metric} needs {name} of {repo} on the Hub.")
    return Path(weights)


@contextmanager
def _to_be_had(metric: str, repo: str, name: str) -> Iterator[None]:
    """A file from the cache, or from a Hub that answers at once."""
    try:
        with weights_for(metric, repo=repo):
            yield
    except OSError as error:
        raise OSError(
            f"{metric} needs {name} of {repo} on the Hub, which is neither cached nor to be had: run "
            f"`hf download {repo}` once, or say where it lies. ({_first_line(error.__cause__)})"
        ) from error


def _first_line(error: BaseException | None) -> str:
    return str(error).partition("\n")[0]


def _package(metric: str, module: str, name: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{metric} needs the package {name or module!r} ({error}): pip install {name or module}."
        ) from error
