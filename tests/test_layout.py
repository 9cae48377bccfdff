"""Layouts: every value of a latent finds its place on the grid and the way back, as diffusers packs it."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import available
from torch import Tensor

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.core.layout import LAYOUTS, Dense, Packed, Size, to_grids

sides = st.integers(1, 5)
Axes = dict[str, int]  # sizes of b, c, h, w and t
# Einops' notation for what each layout does with an image of b, c, t, h, w; written once more, by letters.
LETTERS = {
    "image": "bchw",
    "video": "bcthw",
    "video_frames_first": "btchw",
    "video_channels_last": "bthwc",
    "audio": "bcw",
}


def latent(axes: Axes) -> Tensor:
    """(B, T, C, H, W), every value different."""
    shape = [axes[a] for a in "btchw"]
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def laid_out(name: str, images: Tensor) -> Tensor:
    """The sample a pipeline holds, value by value: no reshape to get wrong."""
    b, t, c, h, w = images.shape
    layout = LAYOUTS[name]
    if isinstance(layout, Dense):
        source = images[tuple(slice(None) if a in LETTERS[name] else 0 for a in "btchw")]
        return torch.einsum(f"{''.join(a for a in 'btchw' if a in LETTERS[name])}->{LETTERS[name]}", source)
    assert isinstance(layout, Packed)
    p = layout.patch
    tokens = torch.zeros(b, t * (h // p) * (w // p), c * p * p)
    for k in range(t):
        for i in range(h // p):
            for j in range(w // p):
                patch = images[:, k, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
                tokens[:, (k * (h // p) + i) * (w // p) + j] = patch.flatten(1)
    return tokens


@given(name=st.sampled_from(sorted(LAYOUTS)), b=sides, t=sides, c=sides, h=sides, w=sides, patched=st.booleans())
def test_there_and_back(name: str, b: int, t: int, c: int, h: int, w: int, patched: bool) -> None:
    layout = LAYOUTS[name]
    p = layout.patch if isinstance(layout, Packed) else 1
    moves = layout.frames if isinstance(layout, Packed) else "t" in LETTERS[name]
    h = 1 if name == "audio" else h * p
    axes = {"b": b, "t": t if moves else 1, "c": c, "h": h, "w": w * p}
    images, size = latent(axes), (h, w * p)
    sample = laid_out(name, images)
    grid = layout.to_grid(sample, size)
    assert torch.equal(grid, images.flatten(0, 1))
    assert torch.equal(layout.from_grid(grid, sample, size), sample)
    assert layout.channels(tuple(sample.shape)) == c
    # A sample that is a view of something larger (Kandinsky passes one), and a residual in another memory format.
    view = torch.stack([sample, -sample], -1)[..., 0]
    assert view.numel() == 1 or not view.is_contiguous()
    assert torch.equal(layout.to_grid(view, size), grid)
    assert torch.equal(layout.from_grid(grid.contiguous(memory_format=torch.channels_last), view, size), sample)


@pytest.mark.parametrize("size", [(4, 4), (4, 10), (6, 2), (2, 2)])
def test_packed_is_what_pipelines_pack(size: Size) -> None:
    h, w = size
    images = latent({"b": 2, "t": 1, "c": 3, "h": h, "w": w})[:, 0]
    flux, qwen = diffusers.FluxPipeline, diffusers.QwenImagePipeline
    packed = {
        "FLUX": flux._pack_latents(images, 2, 3, h, w),
        "QwenImage": qwen._pack_latents(images, 2, 3, h, w),
    }
    if available("Flux2Pipeline"):
        flux2 = diffusers.Flux2Pipeline
        packed["Flux2"] = flux2._pack_latents(flux2._patchify_latents(images))
    for name, tokens in packed.items():
        assert torch.equal(LAYOUTS["packed"].to_grid(tokens, size), images), name
        assert torch.equal(LAYOUTS["packed"].from_grid(images, tokens, size), tokens), name
    assert torch.equal(flux._unpack_latents(packed["FLUX"], 8 * h, 8 * w, 8), images)
    assert torch.equal(qwen._unpack_latents(packed["QwenImage"], 8 * h, 8 * w, 8)[:, :, 0], images)


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 1)])
def test_packed_video_is_what_ltx_packs(size: Size) -> None:
    video = latent({"b": 2, "t": 4, "c": 3, "h": size[0], "w": size[1]}).transpose(1, 2)
    tokens = diffusers.LTXPipeline._pack_latents(video, 1, 1)
    grid = LAYOUTS["packed_video"].to_grid(tokens, size)
    assert torch.equal(grid, LAYOUTS["video"].to_grid(video))
    assert torch.equal(LAYOUTS["packed_video"].from_grid(grid, tokens, size), tokens)


def test_a_square_needs_no_size() -> None:
    images = latent({"b": 2, "t": 1, "c": 3, "h": 6, "w": 6})
    tokens = laid_out("packed", images)
    assert torch.equal(LAYOUTS["packed"].to_grid(tokens), images[:, 0])
    assert torch.equal(LAYOUTS["packed"].from_grid(images[:, 0], tokens), tokens)


@pytest.mark.parametrize(
    ("name", "shape", "size", "message"),
    [
        ("packed", (2, 8, 12), None, r"8 tokens are not a square: .*set_latent_size.*dywspan\.bind\(pipe\)"),
        ("packed", (2, 8, 12), (4, 4), "A latent of 4 x 4 does not make 8 tokens of 2 x 2: .*set_latent_size"),
        ("packed", (2, 8, 12), (3, 8), "A latent of 3 x 8 does not make 8 tokens"),
        ("packed", (2, 8, 12), (0, 8), "A latent of 0 x 8 does not make 8 tokens"),
        # Half the true size in both directions (a pipeline whose scale factor means something else): no "4 images".
        ("packed", (2, 16, 12), (4, 4), "A latent of 4 x 4 does not make 16 tokens"),
        # 4 frames of 2 x 2 are no 4 x 4 image.
        ("packed_video", (2, 16, 3), None, "16 tokens are frames of an unknown size: .*set_latent_size"),
        ("packed_video", (2, 16, 3), (3, 2), "A latent of 3 x 2 does not make 16 tokens of 1 x 1"),
        ("packed", (2, 4, 4, 4), None, r"Packed tokens have 3 axes .*\(2, 4, 4, 4\)"),
        ("image", (2, 16, 12), None, r"'bchw' has 4 axes; the sample has shape \(2, 16, 12\)"),
        ("image", (2, 3, 4, 4, 4), None, "'bchw' has 4 axes"),
        ("video", (2, 3, 4, 4), None, "'bcthw' has 5 axes"),
        ("video_frames_first", (2, 3, 4, 4), None, "'btchw' has 5 axes"),
        ("video_channels_last", (2, 3, 4, 4), None, "'bthwc' has 5 axes"),
        ("audio", (2, 3, 4, 4), None, "'bcw' has 3 axes"),
    ],
)
def test_a_wrong_guess_is_an_error(name: str, shape: tuple[int, ...], size: Size | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUTS[name].to_grid(torch.zeros(shape), size)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("packed_video", (1, 9, 128), "A latent of 2 x 3 does not make 9 tokens"),  # the sound of LTX-2
        ("packed_video", (1, 12, 128), "The operator was made for 4 channels; this has 128"),
        ("video_channels_last", (1, 9, 4), "'bthwc' has 5 axes"),  # and that of Kandinsky 6
        ("image", (1, 4, 8), "'bchw' has 4 axes"),
    ],
)
def test_a_sample_of_another_kind_is_told_what_does_fit(name: str, shape: tuple[int, ...], why: str) -> None:
    samples = [torch.zeros(shape)] * 2
    with pytest.raises(
        ValueError, match=rf"Layout '{name}' does not fit this sample of shape {re.escape(str(shape))}: "
    ) as e:
        to_grids(name, samples, 4, (2, 3))
    for part in (why, "sound beside a video", "one of ['audio', 'image'", "DyWeightScheduler.from_config"):
        assert part in str(e.value)


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"image"}))
def test_the_lift_does_not_depend_on_the_layout(name: str) -> None:
    """The same latent, packed or not: the same update, bit for bit, over a whole run."""
    frames, height = 3 if "video" in name else 1, 1 if name == "audio" else 4
    images, size = torch.randn(2, frames, 4, height, 6), (height, 6)
    scheduler = DyWeightScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, solver="ipndm")
    lift = {"alpha": [0.9, 1.1, 1.0], "beta": [0.5, -0.7, 0.3]}
    ends, state = [], None
    for layout in ("image", name):
        lifted = SpanLiftScheduler.from_config(
            scheduler.config, layout=layout, operator={"channels": 4, "order": 2, "width": 8}, lifts={"3": lift}
        ).initialize()
        if state is None:
            torch.nn.init.normal_(lifted.operators["shared"].head.weight, std=0.3)
            state = lifted.operators["shared"].state_dict()
        lifted.operators["shared"].load_state_dict(state)
        lifted.set_latent_size(*size)
        lifted.set_timesteps(3)
        x = images.flatten(0, 1) if layout == "image" else laid_out(name, images)
        start = x
        for t in lifted.timesteps:
            x = lifted.step((3 * x).sin(), t, x).prev_sample
        ends.append(x)
    assert torch.equal(LAYOUTS[name].to_grid(ends[1], size), ends[0])
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        start = scheduler.step((3 * start).sin(), t, start).prev_sample
    assert (start - ends[1]).abs().max() > 0.1  # the lift did something
