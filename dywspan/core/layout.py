"""Latent layouts: from the sample a scheduler is handed to images (B', C, H, W) a convolution can read, and back.

Frames of a video are images of their own. Packed tokens do not tell their height and width: the square of one image is
inferred, any other grid has to be given as ``size`` = (height, width) of the unpacked latent. A sound is an image of
height 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Size = tuple[int, int]


class Layout(ABC):
    """One way of laying out a latent. ``from_grid(to_grid(x, size), x, size)`` is ``x``, bit for bit."""

    @abstractmethod
    def channels(self, shape: tuple[int, ...]) -> int:
        """C of a sample of this shape."""

    @abstractmethod
    def to_grid(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(B', C, H, W) of a sample.

        Raises:
            ValueError: wrong number of axes, or a size that does not fit the token count.
        """

    @abstractmethod
    def from_grid(self, grid: Tensor, like: Tensor, size: Size | None = None) -> Tensor:
        """Back to the layout of the sample ``like``."""


@dataclass(frozen=True)
class Dense(Layout):
    """A latent with all its axes: ``axes`` names them, of b, c, h, w and t (frames). Without h it is one line."""

    axes: str

    def channels(self, shape: tuple[int, ...]) -> int:
        return shape[self.axes.index("c")]

    def to_grid(self, x: Tensor, size: Size | None = None) -> Tensor:
        if x.ndim != len(self.axes):
            raise ValueError(f"Layout {self.axes!r} has {len(self.axes)} axes; the sample has shape {tuple(x.shape)}.")
        images = x.permute([self.axes.index(a) for a in self._images()])
        if "h" not in self.axes:
            images = images.unsqueeze(-2)
        return images.reshape(-1, *images.shape[-3:])

    def from_grid(self, grid: Tensor, like: Tensor, size: Size | None = None) -> Tensor:
        order = self._images()
        images = grid.reshape([like.shape[self.axes.index(a)] for a in order])
        return images.permute([order.index(a) for a in self.axes])

    def _images(self) -> str:
        return "".join(a for a in "btchw" if a in self.axes)


@dataclass(frozen=True)
class Packed(Layout):
    """Tokens (B, T h w, C p^2) of p x p patches: token = (t * h + i) * w + j, channel = (c * p + dy) * p + dx.

    FLUX, QwenImage and Flux2 have p = 2 and one image (T = 1); LTX has p = 1 and ``frames``, as many as
    ``size`` leaves.
    """

    patch: int
    frames: bool = False

    def channels(self, shape: tuple[int, ...]) -> int:
        return shape[-1] // self.patch**2

    def to_grid(self, x: Tensor, size: Size | None = None) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"Packed tokens have 3 axes (batch, tokens, channels); got shape {tuple(x.shape)}.")
        h, w, p = *self._tokens(x.shape[1], size), self.patch
        images = x.reshape(-1, h, w, self.channels(tuple(x.shape)), p, p)
        return images.permute(0, 3, 1, 4, 2, 5).reshape(len(images), -1, h * p, w * p)

    def from_grid(self, grid: Tensor, like: Tensor, size: Size | None = None) -> Tensor:
        h, w, p = *self._tokens(like.shape[1], size), self.patch
        images = grid.reshape(-1, self.channels(tuple(like.shape)), h, p, w, p)
        return images.permute(0, 2, 4, 1, 3, 5).reshape(like.shape)

    def _tokens(self, count: int, size: Size | None) -> Size:
        p = self.patch
        way_out = "say what they are with scheduler.set_latent_size(height, width) or dywspan.bind(pipe)."
        if size is None:
            side = math.isqrt(count)
            if self.frames or side * side != count:
                what = "are frames of an unknown size" if self.frames else "are not a square"
                raise ValueError(f"{count} tokens {what}: {way_out}")
            return side, side
        h, w = size[0] // p, size[1] // p
        # A single image leaves no rest: more tokens than its size makes are another size, not more images.
        if size[0] % p or size[1] % p or h * w == 0 or (count % (h * w) if self.frames else count != h * w):
            raise ValueError(f"A latent of {size[0]} x {size[1]} does not make {count} tokens of {p} x {p}: {way_out}")
        return h, w


LAYOUTS: dict[str, Layout] = {
    "image": Dense("bchw"),
    "video": Dense("bcthw"),
    "video_frames_first": Dense("btchw"),
    "video_channels_last": Dense("bthwc"),
    "packed": Packed(2),
    "packed_video": Packed(1, frames=True),
    "audio": Dense("bcw"),
}


def to_grids(name: str, values: Sequence[Tensor], channels: int, size: Size | None = None) -> list[Tensor]:
    """The grids of a sample and of what else has its shape, for an operator of so many channels.

    Raises:
        ValueError: the sample is of another layout, or has other channels.
    """
    layout, shape = LAYOUTS[name], tuple(values[0].shape)
    try:
        grids = [layout.to_grid(v, size) for v in values]
        if grids[0].shape[1] != channels:
            raise ValueError(f"The operator was made for {channels} channels; this has {grids[0].shape[1]}.")
    except ValueError as error:
        raise ValueError(
            f"Layout {name!r} does not fit this sample of shape {shape}: {error} A sample of another kind, such as the "
            f"sound beside a video, needs its own layout, one of {sorted(LAYOUTS)}, or no operator: "
            "DyWeightScheduler.from_config(scheduler.config) is the base alone."
        ) from error
    return grids
