"""F of EDM's pixel models, D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): DDPM++ and ADM in one class.

The preconditioning around F is the scheduler's part, see :class:`dywspan.core.prediction.EDM`. Parameters are named
as in the published files, so that their weights load.

Source: EDM (Karras et al. 2022, arXiv 2206.00364), table 1 and appendix F; DDPM++ of Song et al. 2021 and ADM of
Dhariwal and Nichol 2021 as they are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, one_hot, scaled_dot_product_attention, silu

from ..core.check import one_of, whole


@dataclass(frozen=True)
class Architecture:
    """What tells one architecture from the other.

    Attributes:
        skip_scale: of the sum of each residual branch and its shortcut.
        eps: of the group norms.
        scales: the time scales a block's features too; otherwise it only shifts them.
        head_width: channels of an attention head; None: one head.
        projects: a block that changes the resolution has a 1 x 1 convolution in its shortcut, whatever its widths.
        attends_last: going up, only the last block of a level attends.
        flipped: the time's sines come before its cosines, and its last frequency is 1/10000.
        label_last: the class joins what the layers of the embedding made of the time, not the time itself.
    """

    skip_scale: float
    eps: float
    scales: bool
    head_width: int | None
    projects: bool
    attends_last: bool
    flipped: bool
    label_last: bool


ARCHITECTURES: Mapping[str, Architecture] = {
    "ddpm++": Architecture(
        skip_scale=math.sqrt(0.5), eps=1e-6, scales=False, head_width=None, projects=True, attends_last=True,
        flipped=True, label_last=False,
    ),
    "adm": Architecture(
        skip_scale=1.0, eps=1e-5, scales=True, head_width=64, projects=False, attends_last=False,
        flipped=False, label_last=True,
    ),
}  # fmt: skip


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=eps)


def _silent(layer: Any) -> Any:
    """A layer that answers 0 until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class EDMEmbedding(nn.Module):
    """What all blocks are told: (B, 4 C) of the noise level and the class.

        p = (sin, cos)(c_noise f_k), f_k = 10000^(-k / (C/2 - 1)), emb = silu(L1 silu(L0 (p + L y sqrt(n))))   DDPM++
        p = (cos, sin)(c_noise f_k), f_k = 10000^(-k / (C/2)),     emb = silu(L1 silu(L0 p) + L y)             ADM

    Args:
        width: C.
        classes: n; 0: no class. y is one-hot.
    """

    def __init__(self, architecture: Architecture, width: int, classes: int) -> None:
        super().__init__()
        self.width, self.flipped, self.label_last = width, architecture.flipped, architecture.label_last
        self.map_layer0 = nn.Linear(width, 4 * width)
        self.map_layer1 = nn.Linear(4 * width, 4 * width)
        if classes:
            self.map_label = nn.Linear(classes, 4 * width if self.label_last else width, bias=not self.label_last)

    def forward(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """(B,) noise levels c_noise, (B, n) classes."""
        half, dtype = self.width // 2, self.map_layer0.weight.dtype
        steps = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - self.flipped)
        angles = noise.float()[:, None] * 10000**-steps
        waves = (angles.sin(), angles.cos()) if self.flipped else (angles.cos(), angles.sin())
        told = torch.cat(waves, 1).to(dtype)
        if label is not None and not self.label_last:
            told = told + self.map_label(label.to(dtype) * math.sqrt(label.shape[1]))
        told = self.map_layer1(silu(self.map_layer0(told)))
        if label is not None and self.label_last:
            return silu(told + self.map_label(label.to(dtype)))
        return silu(told)


class EDMBlock(nn.Module):
    """A residual block, and attention behind it.

        h = conv0(R silu(norm0 x));  h = conv1(silu(modulated norm1));  y = s (h + skip(R x));  z = s (y + attention(y))

    R changes the resolution: means of 2 x 2 pixels, or each pixel 2 x 2 times. The modulated norm is norm1(h + b) in
    DDPM++ and norm1(h) (1 + a) + b in ADM; a and b are of the embedding.

    Args:
        change: "down", "up" or "".
    """

    def __init__(
        self, own: Architecture, inputs: int, outputs: int, told: int, change: str, attends: bool, rate: float
    ) -> None:
        super().__init__()
        self.own, self.change, self.dropout = own, change, nn.Dropout(rate)
        self.norm0 = _norm(inputs, own.eps)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(told, outputs * (2 if own.scales else 1))
        self.norm1 = _norm(outputs, own.eps)
        self.conv1 = _silent(nn.Conv2d(outputs, outputs, 3, padding=1))
        projects = inputs != outputs or (change and own.projects)
        self.skip = nn.Conv2d(inputs, outputs, 1) if projects else nn.Identity()
        self.heads = (outputs // own.head_width if own.head_width else 1) if attends else 0
        if attends:
            self.norm2 = _norm(outputs, own.eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = _silent(nn.Conv2d(outputs, outputs, 1))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        own, parts = self.own, self.affine(told)[:, :, None, None]
        h = self.conv0(self._resampled(silu(self.norm0(x))))
        if own.scales:
            scale, shift = parts.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + parts)
        h = self.conv1(self.dropout(silu(h)))
        x = own.skip_scale * (h + self.skip(self._resampled(x)))
        return own.skip_scale * (x + self._attention(x)) if self.heads else x

    def _resampled(self, x: Tensor) -> Tensor:
        if not self.change:
            return x
        return avg_pool2d(x, 2) if self.change == "down" else interpolate(x, scale_factor=2.0, mode="nearest")

    def _attention(self, x: Tensor) -> Tensor:
        """Over pixels. Published projections hold a head's query, key and value of a channel side by side."""
        parts = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4)  # (B, heads, C / heads, 3, H W)
        query, key, value = (p.transpose(2, 3) for p in parts.unbind(3))
        mixed = scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(2, 3).reshape(x.shape))


class EDMUNet(ModelMixin, ConfigMixin):
    """DDPM++ or ADM: a U-Net of residual blocks that are told the noise level and the class.

    Going down, every level but the first begins with a block that halves the resolution, and has ``layers_per_block``
    more. Going up, every level has one more than that, each of which also gets the output of one block on the way
    down, the last one first. The first block going up attends, whatever its size.

    Source: EDM (Karras et al. 2022), table 1 and appendix F.

    Args:
        architecture: "ddpm++" (CIFAR-10, FFHQ, AFHQv2) or "adm" (ImageNet).
        sample_size: height and width of the images; a multiple of 2^(levels - 1).
        in_channels, out_channels: of the images.
        num_class_embeds: number of classes; None: not conditional.
        model_channels: C, the unit of all widths.
        channel_mult: of each level, its width / C.
        layers_per_block: blocks of a level.
        attention_resolutions: sizes at which blocks attend.
        dropout: probability, in training.

    Raises:
        ValueError: an architecture that is neither, or sizes that are out of range or do not fit.
    """

    _no_split_modules = ["EDMBlock"]  # noqa: RUF012  # as diffusers has it
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        architecture: str = "ddpm++",
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("architecture", architecture, ARCHITECTURES)
        own = ARCHITECTURES[architecture]
        for name, value, low, high in (
            ("sample_size", sample_size, 1, 8192),
            ("model_channels", model_channels, 4, 8192),
            ("layers_per_block", layers_per_block, 1, 64),
            ("channel_mult's length", len(channel_mult), 1, 8),
            *(("channel_mult", m, 1, 64) for m in channel_mult[:8]),
        ):
            whole(name, value, low, high)
        levels = len(channel_mult)
        if sample_size % 2 ** (levels - 1) or model_channels % 4:
            raise ValueError(
                f"sample_size={sample_size} must be a multiple of {2 ** (levels - 1)}, as {levels} levels halve it, "
                f"and model_channels={model_channels} of 4."
            )
        widths, sizes = [model_channels * m for m in channel_mult], [sample_size >> i for i in range(levels)]
        attending = [w for w, s in zip(widths, sizes) if s in (*attention_resolutions, sizes[-1])]
        if own.head_width and any(w % own.head_width for w in attending):
            raise ValueError(f"Widths {attending} must be multiples of {own.head_width}, those of an attention head.")
        self.embedding = EDMEmbedding(own, model_channels, num_class_embeds or 0)

        def block(inputs: int, outputs: int, change: str = "", attends: bool = False) -> EDMBlock:
            return EDMBlock(own, inputs, outputs, 4 * model_channels, change, attends, dropout)

        width = widths[0] if own.label_last else model_channels
        down: dict[str, nn.Module] = {f"{sizes[0]}x{sizes[0]}_conv": nn.Conv2d(in_channels, width, 3, padding=1)}
        kept = [width]
        for size, outputs in zip(sizes, widths):
            if size != sizes[0]:
                down[f"{size}x{size}_down"] = block(width, width, "down")
                kept.append(width)
            for i in range(layers_per_block):
                down[f"{size}x{size}_block{i}"] = block(width, outputs, "", size in attention_resolutions)
                width = outputs
                kept.append(width)
        up: dict[str, nn.Module] = {}
        for size, outputs in zip(reversed(sizes), reversed(widths)):
            if size == sizes[-1]:
                up |= {f"{size}x{size}_in0": block(width, width, "", True), f"{size}x{size}_in1": block(width, width)}
            else:
                up[f"{size}x{size}_up"] = block(width, width, "up")
            for i in range(layers_per_block + 1):
                attends = size in attention_resolutions and (i == layers_per_block or not own.attends_last)
                up[f"{size}x{size}_block{i}"] = block(width + kept.pop(), outputs, "", attends)
                width = outputs
        self.enc, self.dec = nn.ModuleDict(down), nn.ModuleDict(up)
        self.out_norm = _norm(width, own.eps)
        self.out_conv = _silent(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """F(c_in x; c_noise).

        Args:
            sample: (B, C, H, W), c_in x.
            timestep: c_noise = ln(sigma) / 4; one for all, or (B,).
            class_labels: whole numbers, of a network that is conditional; one for all, or (B,).

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: labels of a network that knows none, or no labels of one that does.
        """
        noise = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        told = self.embedding(noise, self._label(class_labels, len(sample)))
        x, kept = sample, []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, told)
            kept.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, kept.pop()], 1) if "_block" in name else x, told)
        output = self.out_conv(silu(self.out_norm(x)))
        return UNet2DOutput(output) if return_dict else (output,)

    def _label(self, labels: Tensor | None, count: int) -> Tensor | None:
        """(B, n), one-hot."""
        classes = self.config["num_class_embeds"]
        if not classes and labels is not None:
            raise ValueError("This network was trained without classes: leave class_labels out.")
        if classes and labels is None:
            raise ValueError(f"This network draws one of {classes} classes: give class_labels, 0 to {classes - 1}.")
        return None if labels is None else one_hot(labels.reshape(-1).expand(count).long(), classes)


EDMUNet.__module__ = "dywspan.edm"  # saved pipelines name it
