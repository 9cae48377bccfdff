"""Learn solvers for a diffusion model without a network: the exact denoiser of scikit-learn's 8 x 8 digits.

    D(x; sigma) = sum_k y_k softmax_k(-|x - y_k|^2 / (2 sigma^2)),   y the 1,797 images

It is smooth, exact and fast, so this is the place to see what learning a solver does, from how few pairs (15 minutes
on two cores, 6 with --seeds 0):

    pip install scikit-learn
    python examples/digits.py
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMPipeline, EDMEulerScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from dywspan import DyWeightScheduler
from dywspan.distill.config import LearningConfig
from dywspan.distill.progress import endpoint_error
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.teacher import Teacher
from dywspan.text import markdown


class ExactDenoiser(ModelMixin, ConfigMixin):
    """F of an EDM network whose D is the mean of the data, of deviation sigma_data, given the noisy sample."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, sigma_data: float = 0.5) -> None:
        from sklearn.datasets import load_digits

        super().__init__()
        digits: Any = load_digits()
        images = torch.tensor(digits.data)
        self.register_buffer("images", (images - images.mean()) * (sigma_data / images.std()))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        """The network's output at c_noise = log(sigma) / 4, from c_in x."""
        sigma, data = torch.exp(4 * timestep.double()), self.config["sigma_data"]
        total = sigma**2 + data**2
        x = sample.flatten(1) * total.sqrt()
        # |x - y|^2 without |x|^2, which no k changes
        logits = (x @ self.images.T - self.images.square().sum(1) / 2) / sigma**2
        denoised = logits.softmax(1) @ self.images
        output = (denoised - x * data**2 / total) * total.sqrt() / (sigma * data)
        return UNet2DOutput(sample=output.view_as(sample))


STABLE_DIFFUSION = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def levels(n: int) -> dict[str, Any]:
    """Stable Diffusion's noise levels at n times, evenly from the last to the first, and 0."""
    prediction = DyWeightScheduler.from_config(STABLE_DIFFUSION.config).host.prediction
    return {"sigmas": [*prediction.sigma(torch.linspace(999, 0, n)).tolist(), 0.0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256], help="of each least-squares fit")
    parser.add_argument("--updates", type=int, default=60, help="of least squares, half of the pairs each")
    parser.add_argument("--gradients", type=int, default=10_000, help="pairs that Adam goes through once, 16 at a time")
    parser.add_argument(
        "--starts", nargs="+", default=["ipndm", "adams", "euler"], help="the best of what is found from these"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="and with the pairs in these orders")
    parser.add_argument("--select", type=int, default=1024, help="pairs that say which of all these was best, and when")
    parser.add_argument("--held-out", type=int, default=1024, help="pairs that the errors are of")
    args = parser.parse_args()

    network, scheduler = cast(Any, ExactDenoiser()), cast(Any, EDMEulerScheduler())
    pipe = DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    own = DyWeightScheduler.from_config(pipe.scheduler.config)
    teacher = Teacher(DyWeightScheduler.from_config(own.config, solver="heun", grid=levels(50)), 50)
    train, select, held_out = (
        make_pairs(pipe, teacher, [{}] * count, range(first, first + count), call={}, batch_size=256)
        for count, first in ((max(args.gradients, *args.pairs), 10**6), (args.select, 2 * 10**6), (args.held_out, 0))
    )

    def learned(n: int, count: int, **settings: Any) -> DyWeightScheduler:
        """The best of what is found from every start with every seed."""
        tables = []
        for init, seed in product(args.starts, args.seeds):
            config = LearningConfig(order=3, init=init, seed=seed, recompute=False, **settings)
            task = Task(pipe, teacher, [Term(n, {}, train[:count], select)], config, grid=levels(n))
            tables.append(distill(task).tables[n])
        return own.with_tables([min(tables, key=lambda table: table.provenance["held_out_error"]["after"])])

    rows = []
    for n in args.steps:
        solvers = {
            "iPNDM(3M)": DyWeightScheduler.from_config(own.config, solver="ipndm", solver_order=3, grid=levels(n)),
            f"Adam, {args.gradients:,} pairs": learned(
                n, args.gradients, optimizer="adam", updates=args.gradients // 16, batch_size=16, evaluate_every=25
            ),
        }
        for count in args.pairs:
            solvers[f"least squares, {count} pairs"] = learned(
                n, count, optimizer="least_squares", updates=args.updates, batch_size=count // 2
            )
        errors = {k: endpoint_error(pipe, v, n, held_out, {}, batch_size=256) for k, v in solvers.items()}
        rows.append({"steps": n, **errors})
    print(markdown(rows))


if __name__ == "__main__":
    main()
