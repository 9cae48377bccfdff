"""Learn solvers for a diffusion model without a network: the exact denoiser of scikit-learn's 8 x 8 digits.

    D(x; sigma) = sum_k y_k softmax_k(-|x - y_k|^2 / (2 sigma^2)),   y the 1,797 images

It is smooth, exact and fast, so this is the place to see what learning a solver does, and by which optimiser:

    pip install scikit-learn
    python examples/digits.py
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import DDPMPipeline, EDMEulerScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from dywspan import DyWeightScheduler
from dywspan.core.prediction import EDM
from dywspan.distill.config import LearningConfig
from dywspan.distill.pairs import Teacher, make_pairs
from dywspan.distill.train import distill


class ExactDenoiser(ModelMixin, ConfigMixin):
    """F of an EDM network whose D is the mean of the data given the noisy sample."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, sigma_data: float = 0.5) -> None:
        from sklearn.datasets import load_digits

        super().__init__()
        self.register_buffer("images", torch.tensor(load_digits().data / 8 - 1))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        """The network's output at c_noise = log(sigma) / 4, from c_in x."""
        sigma, data = torch.exp(4 * timestep.double()), self.config.sigma_data
        total = sigma**2 + data**2
        x = sample.flatten(1) * total.sqrt()
        # |x - y|^2 without |x|^2, which no k changes
        logits = (x @ self.images.T - self.images.square().sum(1) / 2) / sigma**2
        denoised = logits.softmax(1) @ self.images
        output = (denoised - x * data**2 / total) * total.sqrt() / (sigma * data)
        return UNet2DOutput(sample=output.view_as(sample))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256], help="of each least-squares fit")
    parser.add_argument("--updates", type=int, default=25, help="of least squares, all pairs each")
    parser.add_argument("--held-out", type=int, default=1024)
    args = parser.parse_args()

    pipe = DDPMPipeline(ExactDenoiser(), EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(DyWeightScheduler.from_config(pipe.scheduler.config).host.prediction, EDM)
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="heun"), 50)
    pairs = {
        name: make_pairs(pipe, teacher, [{}] * count, range(first, first + count), call={}, batch_size=256)
        for name, count, first in (("train", max(args.pairs), 10**6), ("held_out", args.held_out, 0))
    }
    for n in args.steps:
        for count in args.pairs:
            started = time.perf_counter()
            config = LearningConfig(optimizer="least_squares", updates=args.updates, order=3, batch_size=count)
            table = distill(pipe, teacher, pairs["train"][:count], pairs["held_out"], n, call={}, config=config)
            error, seconds = table.provenance["held_out_error"], time.perf_counter() - started
            line = f"iPNDM(3M) {error['before']:.4f}, learned {error['after']:.4f}, {seconds:.0f} s"
            print(f"{n} steps, {count} pairs: {line}")


if __name__ == "__main__":
    main()
