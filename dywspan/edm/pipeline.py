"""A pipeline around EDM's pixel networks: noise, the scheduler's steps, images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.check import one_of

_OUTPUTS = ("pil", "np", "pt", "latent")


class EDMPipeline(DiffusionPipeline):
    """Images of an EDM network, by class where it has classes.

        pipe = EDMPipeline.from_pretrained("edm-imagenet64")
        pipe(class_labels=[207, 360], num_inference_steps=18).images

    The scheduler preconditions the network and makes the steps: diffusers' ``EDMEulerScheduler`` and
    ``EDMDPMSolverMultistepScheduler``, or one of dywspan's.

    Args:
        unet: an :class:`EDMUNet`, or a UNet2DModel of diffusers trained as F.
        scheduler: one that is preconditioned as in EDM.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int = 18,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: number of images; as many as there are labels or generators where it is left out, or 1.
            class_labels: one for each image, or one for all, of a network that has classes.
            num_inference_steps: of the scheduler.
            generator: one for all images, or one for each.
            latents: (B, C, H, W) unit noise to start from.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": as the
                scheduler leaves it, in [-1, 1].
            return_dict: an ``ImagePipelineOutput`` rather than a tuple.

        Raises:
            ValueError: labels that the network does not have, or as many as no batch, or an unknown output_type.
        """
        one_of("output_type", output_type, _OUTPUTS)
        config, device, dtype = self.unet.config, self._execution_device, self.unet.dtype
        labels = None if class_labels is None else torch.as_tensor(class_labels).reshape(-1)
        counts = [len(v) for v in (latents, labels, generator) if isinstance(v, Tensor | list)]
        count = batch_size or max(counts, default=1)
        if labels is not None:
            classes = config.num_class_embeds or 0
            if len(labels) not in (1, count):
                raise ValueError(f"{len(labels)} class_labels for {count} images: give one for each, or one for all.")
            if bool(((labels < 0) | (labels >= classes)).any()):
                known = f"from 0 to {classes - 1}" if classes else "left out: this network has no classes"
                raise ValueError(f"class_labels={labels.tolist()} must be {known}.")
            labels = labels.expand(count).to(device)
        elif config.num_class_embeds:
            raise ValueError(f"class_labels are missing: give each image one, from 0 to {config.num_class_embeds - 1}.")
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {count} images need {shape}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        told = {} if labels is None else {"class_labels": labels}
        bar: Any = self.progress_bar
        for t in bar(self.scheduler.timesteps):
            output = self.unet(self.scheduler.scale_model_input(x, t), t, **told, return_dict=False)[0]
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        images: Any = x
        if output_type != "latent":
            images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)


EDMPipeline.__module__ = "dywspan.edm"
