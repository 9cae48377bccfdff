"""The score networks of galaxygrad as a diffusers model and pipeline; the package's files are read without jax.

M. Sampson trained them on galaxies of surveys of the sky: priors for telling overlapping galaxies apart. The package
states no licence, so it is installed by its users, and nothing of it is here:

    pip install --no-deps galaxygrad==0.2.1

Its network is the score of x_t, where t runs from 10 to 0:

    x_t = exp(-t / 2) x_0 + sigma e,   sigma^2 = 1 - exp(-t),   score = -e / sigma

To diffusers that is a network of epsilon on 1,000 constant betas, 1 - exp(-0.01), with t = (timestep + 1) / 100.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import relu

INSTALL = "pip install --no-deps galaxygrad==0.2.1"
PER_UNIT = 100  # timesteps of a unit of t
UNIT = 0.1  # of log(flux + 1), the network's pixels are multiples
FILES = {  # of the surveys' networks, by name
    "hsc32": "eqx_hsc_ScoreNet32.eqx",
    "hsc64": "eqx_hsc_ScoreNet64.eqx",
    "ztf32": "eqx_ZTF_ScoreNet32.eqx",
    "ztf64": "eqx_ZTF_ScoreNet64.eqx",
}


# ------------------------------------------------------------------------------------------------------- the network


class Mixer(nn.Module):
    """y + W_2 relu(W_1 norm(y) + b_1) + b_2, on the last axis of y; the norm is over all of y, (rows, columns)."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([rows, columns])
        self.first, self.second = nn.Linear(columns, width), nn.Linear(width, columns)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.second(relu(self.first(self.norm(y))))


class ScoreNetwork(ModelMixin, ConfigMixin):
    """An MLP mixer over patches that is told the time by a channel of its own; its output is epsilon.

        epsilon(x, timestep) = -sqrt(1 - exp(-t)) score(x, t),   t = (timestep + 1) / 100

    Args:
        sample_size: of a side of the image, in pixels.
        in_channels: of the image.
        hidden: numbers that a patch is made to.
        patch: of a side of a patch, in pixels.
        width, hidden_width: of the layers that mix patches, and the numbers of each.
        depth: pairs of these.
        end: largest t.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 1,
        hidden: int = 64,
        patch: int = 4,
        width: int = 512,
        hidden_width: int = 512,
        depth: int = 4,
        end: float = 10.0,
    ) -> None:
        super().__init__()
        patches = (sample_size // patch) ** 2
        self.conv_in = nn.Conv2d(in_channels + 1, hidden, patch, stride=patch)
        mixers = [
            nn.ModuleList([Mixer(hidden, patches, width), Mixer(patches, hidden, hidden_width)]) for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(mixers)
        self.norm = nn.LayerNorm([hidden, patches])
        self.conv_out = nn.ConvTranspose2d(hidden, in_channels, patch, stride=patch)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W) of x of the same shape, at t of shape (B,) or (), from 0 to ``end``."""
        time = (t.to(x) / self.config["end"]).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        y = self.conv_in(torch.cat([x, time], 1))
        side, y = y.shape[2:], y.flatten(2)
        for mixers in self.blocks:
            patches, hidden = cast(nn.ModuleList, mixers)
            y = hidden(patches(y).transpose(1, 2)).transpose(1, 2)
        return self.conv_out(self.norm(y).unflatten(2, side))

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> UNet2DOutput | tuple:
        """epsilon; timesteps need not be whole."""
        t = (torch.as_tensor(timestep, device=sample.device).double() + 1) / PER_UNIT
        sigma = (-torch.expm1(-t)).clamp(min=0).sqrt().to(sample.dtype).reshape(-1, 1, 1, 1)
        epsilon = -sigma * self.score(sample, t)
        return UNet2DOutput(sample=epsilon) if return_dict else (epsilon,)


# -------------------------------------------------------------------------------------------------- the package's files


def find(name: str) -> Path:
    """The file of a network of ``FILES`` in the installed package, which is not imported: that would need jax.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: another version of it is.
    """
    package = importlib.util.find_spec("galaxygrad")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"The networks are those of galaxygrad, which is not installed: {INSTALL}")
    path = Path(package.submodule_search_locations[0]) / FILES[name]
    if not path.exists():
        raise FileNotFoundError(f"The installed galaxygrad has no {path.name}: {INSTALL}")
    return path


def read(path: str | Path) -> ScoreNetwork:
    """A network from equinox's form: numpy arrays, one after the other, and t's end at last.

    Raises:
        ValueError: the arrays are not those of such a network.
    """
    arrays = list(_arrays(Path(path)))
    # Images to patches and back, four pairs of weight and bias a block and two norms; the last norm; the end.
    if (len(arrays) - 7) % 12 or len(arrays) < 19 or arrays[0].ndim != 4 or arrays[-1].ndim:
        raise ValueError(f"{path} holds {len(arrays)} arrays of another network: use one of {sorted(FILES.values())}.")
    hidden, channels, patch, _ = arrays[0].shape
    network = ScoreNetwork(
        sample_size=patch * math.isqrt(arrays[4].shape[1]),
        in_channels=channels - 1,
        hidden=hidden,
        patch=patch,
        width=len(arrays[4]),
        hidden_width=len(arrays[8]),
        depth=(len(arrays) - 7) // 12,
        end=float(arrays[-1]),
    )
    order = [network.conv_in.weight, network.conv_in.bias, network.conv_out.weight, network.conv_out.bias]
    for pair in network.blocks:
        mixers: Any = pair
        order += [p for own in mixers for layer in (own.first, own.second) for p in (layer.weight, layer.bias)]
        order += [p for own in mixers for p in (own.norm.weight, own.norm.bias)]
    order += [network.norm.weight, network.norm.bias]
    values = [torch.from_numpy(array.astype(numpy.float32)) for array in arrays[:-1]]
    values[1], values[3] = values[1].flatten(), values[3].flatten()
    # Equinox's transposed convolution correlates, and has its outputs first.
    values[2] = values[2].transpose(0, 1).flip(2, 3)
    shapes = [[tuple(own.shape) for own in tensors] for tensors in (order, values)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} holds arrays of shapes {shapes[1]}, and such a network has {shapes[0]}.")
    with torch.no_grad():
        for own, value in zip(order, values):
            own.copy_(value)
    return network.eval()


def _arrays(path: Path) -> Iterator[numpy.ndarray]:
    with path.open("rb") as file:
        while file.peek(1):
            yield numpy.load(file, allow_pickle=False)


# ------------------------------------------------------------------------------------------- pipeline, and pictures


def scheduler() -> DDPMScheduler:
    """beta = 1 on t in [0, 10], in 1,000 steps."""
    betas = [-math.expm1(-1 / PER_UNIT)] * 1000
    return DDPMScheduler(1000, trained_betas=betas, clip_sample=False, timestep_spacing="trailing")


def pipeline(name: str) -> DDPMPipeline:
    """diffusers' own unconditional pipeline around a network of ``FILES``."""
    network: Any = read(find(name))
    return DDPMPipeline(network, scheduler())


def flux(x: Tensor) -> Tensor:
    """What the pixels stand for: x = log(flux + 1) / 0.1."""
    return torch.expm1(UNIT * x)


def stretched(x: Tensor, softening: float = 0.02, white: float = 3.0) -> Image.Image:
    """(1, H, W) as astronomers look at a galaxy: asinh(flux / softening), black at 0, white at ``white``.

    Linear for the sky and the faint outskirts, logarithmic for the core.

    Source: Lupton, Gunn and Szalay 1999.
    """
    scale = math.asinh(white / softening)
    level = torch.asinh(flux(x[0]) / softening) / scale
    return Image.fromarray((level.clamp(0, 1) * 255).round().byte().numpy(), "L")
