"""CLIP score, ImageReward and HPS: equal to other implementations on the same random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_metrics import _part, _sample
from torch import Tensor

from dywspan.evaluate import rewards
from dywspan.evaluate.metrics import METRICS
from dywspan.evaluate.statistics import Metric, Sample

PROMPTS = ["A réd cat on a chair!", "the dog runs over a green house, " * 8, "[ENC] unknown"]


def _images(*sizes: tuple[int, int]) -> list[Tensor]:
    """(1, 3, H, W) on 8-bit levels: coarse patterns with noise, that frozen generators make."""
    drawn = []
    for i, (height, width) in enumerate(sizes):
        random = np.random.RandomState(i)
        coarse = random.randint(0, 206, (8, 8, 3)).repeat(-(-height // 8), 0).repeat(-(-width // 8), 1)
        drawn.append(coarse[:height, :width] + random.randint(0, 50, (height, width, 3)))
    return [torch.from_numpy(levels).movedim(2, 0)[None].float() / 255 for levels in drawn]


# ---------------------------------------------------------------------------------------------------------- ImageReward

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *SPECIAL,
    "a",
    "the",
    "red",
    "cat",
    "on",
    "chair",
    "dog",
    "runs",
    "over",
    "green",
    "house",
    ",",
    "un",
    "##known",
]


def published_weights() -> dict[str, Tensor]:
    """In the layout of ImageReward.pt, with 2 layers of 128 channels each and a frozen generator's numbers."""
    random, width, words = np.random.RandomState(0), 128, len(WORDS) + 2
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        fan = shape[-1] if len(shape) == 2 and "embeddings" not in name else int(np.prod(shape[1:])) or 1
        spread = scale * (fan**-0.5 if len(shape) in (2, 4) and "embeddings" not in name else 0.3)
        state[name] = torch.from_numpy(centre + spread * random.randn(*shape)).float()

    def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> None:
        add(f"{name}.weight", outputs, inputs, scale=scale)
        add(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    small = 0.01  # so that the constant of the first normalisation counts
    add(f"{see}.cls_token", 1, 1, width, scale=small)
    add(f"{see}.pos_embed", 1, 197, width, scale=small)
    add(f"{see}.patch_embed.proj.weight", width, 3, 16, 16, scale=small)
    add(f"{see}.patch_embed.proj.bias", width, scale=small)
    for i in range(2):
        block = f"{see}.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", width, 2 * width)
        linear(f"{block}.mlp.fc2", 2 * width, width)
    norm(f"{see}.norm")
    state[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    add(f"{read}.embeddings.word_embeddings.weight", words, width)
    add(f"{read}.embeddings.position_embeddings.weight", 40, width)
    norm(f"{read}.embeddings.LayerNorm")
    for i in range(2):
        layer = f"{read}.encoder.layer.{i}"
        for kind, scale in (("attention", 1.0), ("crossattention", 0.5)):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{kind}.self.{part}", width, width, scale)
            linear(f"{layer}.{kind}.output.dense", width, width, scale)
            norm(f"{layer}.{kind}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", width, 2 * width)
        linear(f"{layer}.output.dense", 2 * width, width)
        norm(f"{layer}.output.LayerNorm")
    linear("blip.vision_proj", width, 256)  # the published file has both, and nothing reads them
    linear("blip.text_proj", width, 256)
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for number, (inputs, outputs) in sizes.items():
        linear(f"mlp.layers.{number}", inputs, outputs)
    return state


SIZES = ((224, 224), (224, 300), (400, 333), (130, 199))
# By the package image-reward 1.5 with timm 0.6.13 and transformers 4.27.4, from published_weights(): one line an image,
# one number a prompt. At the published size, with random weights, rewards were equal too.
PACKAGE_REWARDS = [
    [0.990367, 1.258237, 1.598674],
    [1.022144, 1.293352, 1.657961],
    [0.990076, 1.260805, 1.648709],
    [0.976745, 1.246218, 1.635399],
]


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Path]:
    """Options of the metric: the file, and a tokenizer of few words."""
    pytest.importorskip("transformers")
    torch.save(published_weights(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"weights": tmp_path / "ImageReward.pt", "vocabulary": tmp_path / "vocab.txt"}


def test_image_reward_is_the_packages(published: dict[str, Path]) -> None:
    metric = METRICS["image_reward"](None, **published)
    got = [metric.rows(Sample(x.expand(3, -1, -1, -1), PROMPTS))[:, 0] for x in _images(*SIZES)]
    torch.testing.assert_close(torch.stack(got), torch.tensor(PACKAGE_REWARDS), rtol=0.0, atol=1e-5)
    _check_metric(metric)


def test_a_file_that_is_not_imagerewards_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    state = published_weights()
    for lost in ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "mlp.layers.4.bias"):
        torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / f"no_{lost}")
    (tmp_path / "text.bias").write_text("none")
    for name in [path.name for path in tmp_path.glob("*.bias")]:
        with pytest.raises(ValueError, match=f"{name}' are not those of ImageReward.pt"):
            METRICS["image_reward"](None, **(published | {"weights": tmp_path / name}))
    with pytest.raises(FileNotFoundError, match=r"is no file: image_reward needs ImageReward\.pt of THUDM/ImageReward"):
        METRICS["image_reward"](None, weights=tmp_path / "none.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["image_reward", "hps"])
def test_weights_execute_nothing(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    options = request.getfixturevalue({"image_reward": "published", "hps": "clip"}[name])
    torch.save({"state_dict": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="are not those of"):
        METRICS[name](
            None, **({k: v for k, v in options.items() if k != "network"} | {"weights": tmp_path / "bomb.pt"})
        )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "package", "needed"),
    [
        ("image_reward", "transformers", r"image_reward needs ImageReward\.pt of THUDM/ImageReward on the Hub"),
        ("hps", "open_clip", r"hps needs HPS_v2\.1_compressed\.pt of xswu/HPSv2 on the Hub"),
        ("clip_score", "open_clip", r"clip_score needs .* of timm/vit_large_patch14_clip_224\.openai on the Hub"),
    ],
)
def test_weights_that_are_not_to_be_had_are_named(name: str, package: str, needed: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(OSError, match=f"{needed}.*hf download"):
        METRICS[name](None)


def test_a_vocabulary_that_is_not_to_be_had_is_named(published: dict[str, Path]) -> None:
    with pytest.raises(OSError, match=r"image_reward needs vocab\.txt of google-bert/bert-base-uncased"):
        METRICS["image_reward"](None, weights=published["weights"])


def _check_metric(metric: Metric) -> None:
    """Rows are each image's own, with its own prompt."""
    sample = _sample(3, 64)
    sample = Sample(sample.images, PROMPTS)
    rows = metric.rows(sample)
    assert rows.shape == (3, 1) and rows.dtype == torch.float32 and float(rows.std()) > 0
    parts = torch.cat([metric.rows(_part(sample, slice(i, i + 1))) for i in range(3)])
    torch.testing.assert_close(rows, parts, rtol=1e-4, atol=1e-5)
    assert not metric.lower_is_better and metric.needs == ("prompts",)
    with pytest.raises(ValueError, match=f"{metric.name} needs prompts"):
        metric.rows(Sample(sample.images))


# --------------------------------------------------------------------------------------------------------------- images


def test_images_are_cropped_as_the_package_does() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.Resize(224, interpolation=mode),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(rewards.MEAN, rewards.STD),
        ]
    )
    for images in _images(*SIZES, (301, 223)):
        (image,) = rewards._pil(images)
        torch.testing.assert_close(rewards._cropped(images)[0], theirs(image), rtol=0.0, atol=1e-6)


def test_images_are_padded_as_the_package_does() -> None:
    """hpsv2's ``ResizeMaxSize`` after ``ToTensor``."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    mode = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    for images in _images(*SIZES, (301, 223)):
        scale = 224 / max(images.shape[-2:])
        size = [round(n * scale) for n in images.shape[-2:]]
        resized = functional.resize(functional.to_tensor(rewards._pil(images)[0]), size, mode)
        h, w = (224 - n for n in size)
        padded = functional.pad(resized, [w // 2, h // 2, w - w // 2, h - h // 2])
        expected = functional.normalize(padded, rewards.MEAN, rewards.STD)
        torch.testing.assert_close(rewards._padded(images)[0], expected, rtol=0.0, atol=1e-5)


def test_images_already_of_the_right_size_only_change_scale() -> None:
    (images,) = _images((224, 224))
    expected = (images - torch.tensor(rewards.MEAN).reshape(3, 1, 1)) / torch.tensor(rewards.STD).reshape(3, 1, 1)
    for prepare in (rewards._cropped, rewards._padded):
        torch.testing.assert_close(prepare(images), expected, rtol=0.0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture
def clip(tmp_path: Path) -> dict[str, Any]:
    """Options of the metrics: a small CLIP in open_clip's layout; and the same network in transformers'."""
    package, transformers = pytest.importorskip("open_clip"), pytest.importorskip("transformers")
    vision = {"image_size": 224, "patch_size": 56}
    sizes = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, **vision},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "small-clip.json").write_text(json.dumps(sizes))
    package.add_model_config(tmp_path / "small-clip.json")
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    words = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 0}
    network = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"hidden_size": 32, "intermediate_size": 128, **layers, **words},
            vision_config={"hidden_size": 64, "intermediate_size": 256, **layers, **vision},
            projection_dim=24,
        )
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.save({"state_dict": _open_clip_layout(network.state_dict())}, tmp_path / "small.pt")
    return {"model": "small-clip", "weights": tmp_path / "small.pt", "network": network}


def _open_clip_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = value
    for name in [n for n in out if ".self_attn.q_proj." in n]:
        together = torch.cat([out.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        out[name.replace("self_attn.q_proj.", "attn.in_proj_")] = together
    out["visual.proj"] = out.pop("visual_projection.weight").T
    out["text_projection"] = out.pop("text_projection.weight").T
    return {name: value for name, value in out.items() if not name.endswith("position_ids")}


def _expected(network: Any, pixels: Tensor, prompts: list[str]) -> Tensor:
    tokens = pytest.importorskip("open_clip").get_tokenizer("ViT-L-14")(prompts)
    with torch.no_grad():
        output = network(input_ids=tokens, pixel_values=pixels)
    return (output.image_embeds * output.text_embeds).sum(1, keepdim=True)


def test_clip_score_is_that_of_transformers_model(clip: dict[str, Any]) -> None:
    network = clip.pop("network")
    metric = METRICS["clip_score"](None, **clip)
    for images in _images((224, 224), (300, 250)):
        pixels = rewards._cropped(images).expand(3, -1, -1, -1)
        cosine = _expected(network, pixels, PROMPTS)
        got = metric.rows(Sample(images.expand(3, -1, -1, -1), PROMPTS))
        torch.testing.assert_close(got, 100 * cosine.clamp(min=0), rtol=1e-4, atol=1e-3)
    assert re.fullmatch(r"small-clip \(small\.pt, sha256 [0-9a-f]{12}\)", metric.facts["network"])
    _check_metric(metric)


def test_clip_score_of_an_opposite_prompt_is_zero(clip: dict[str, Any]) -> None:
    network = clip.pop("network")
    (images,) = _images((224, 224))
    state = torch.load(clip["weights"], weights_only=True)
    sign = 1 if float(_expected(network, rewards._cropped(images), PROMPTS[:1])) < 0 else -1
    state["state_dict"]["text_projection"] *= sign
    torch.save(state, clip["weights"])
    assert float(METRICS["clip_score"](None, **clip).rows(Sample(images, PROMPTS[:1]))) == 0
    assert float(METRICS["hps"](None, **clip).rows(Sample(images, PROMPTS[:1]))) < 0


def test_hps_is_the_cosine_of_padded_images(clip: dict[str, Any]) -> None:
    network = clip.pop("network")
    metric = METRICS["hps"](None, **clip)
    for images in _images((224, 224), (300, 250)):
        cosine = _expected(network, rewards._padded(images).expand(3, -1, -1, -1), PROMPTS)
        got = metric.rows(Sample(images.expand(3, -1, -1, -1), PROMPTS))
        torch.testing.assert_close(got, cosine, rtol=1e-4, atol=1e-5)
    _check_metric(metric)


def test_wrong_names_and_files_of_a_clip_are_refused(clip: dict[str, Any], tmp_path: Path) -> None:
    del clip["network"]
    score: Callable[..., Metric] = METRICS["clip_score"]
    with pytest.raises(ValueError, match="model='ViT-Z' is none of open_clip's"):
        score(None, model="ViT-Z")
    with pytest.raises(ValueError, match=r"weights='laion3b' is neither a file nor one of ViT-B-32's: .*openai"):
        score(None, model="ViT-B-32", weights="laion3b")
    state = torch.load(clip["weights"], weights_only=True)
    del state["state_dict"]["visual.proj"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"short\.pt' are not those of small-clip"):
        score(None, **(clip | {"weights": tmp_path / "short.pt"}))
