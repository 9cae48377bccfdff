"""Image-to-image with learned solvers: every solver at the same number of evaluations, against fifty of them.

A learned solver starts anywhere on its way: the pipeline noises its input to the level where it starts, as ever.

    python examples/img2img.py SOLVERS --output docs/results/img2img.json

The inputs are the pipeline's own images of some prompts, and become what other prompts say. ``strength`` is how much of
the way from noise is gone again: N steps of the whole way are N * strength evaluations.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from tqdm.auto import tqdm

from dywspan import bind
from dywspan.evaluate.baselines import Solver, find_solvers
from dywspan.evaluate.metrics import METRICS
from dywspan.evaluate.report import table, write_results
from dywspan.evaluate.statistics import Sample, numbers

REFERENCE = "iPNDM(2M)"
CLASSICAL = ("DDIM", "Euler", "DPM-Solver++(2M)", "UniPC", REFERENCE)
CALLS = ("3/10", "3/6", "3/5", "3/4", "6/20", "6/12", "6/10", "6/8", "9/10")


@torch.no_grad()
def endpoints(pipe: Any, solver: Solver, steps: int, batches: list, **call: float) -> torch.Tensor:
    """(n, 4, h, w) latents of ``solver`` with ``steps`` steps of the whole way."""
    own, found = pipe.scheduler, []
    pipe.scheduler = solver.makers[0](pipe, steps)
    try:
        for first, prompts, images in batches:
            noise = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
            given = {"prompt": prompts, "image": images, "generator": noise, "output_type": "latent"}
            found.append(pipe(**given, num_inference_steps=steps, **call).images)
    finally:
        pipe.scheduler = own  # of whose settings the next solver is made
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("solvers", nargs="+", help="directories or Hub ids of learned solvers")
    parser.add_argument("--model", default="examples/emoji-sd")
    parser.add_argument("--prompts", default="examples/prompts/emoji-held-out.txt")
    parser.add_argument("--calls", nargs="+", default=CALLS, help="strengths: evaluations / steps of the whole way")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--output", default="img2img.json")
    args = parser.parse_args()

    text: Any = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe = bind(StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False))
    for each in (text, pipe):
        each.set_progress_bar_config(disable=True)
    with open(args.prompts, encoding="utf-8") as file:
        prompts = [line.strip() for line in file][: 2 * args.samples]
    before, after = prompts[: args.samples], prompts[args.samples :]
    batches = []
    for first in tqdm(range(0, args.samples, args.batch_size), "inputs"):
        own = slice(first, first + args.batch_size)
        noise = [torch.Generator().manual_seed(10**6 + first + i) for i in range(len(before[own]))]
        images = text(before[own], generator=noise, guidance_scale=args.guidance_scale, num_inference_steps=25).images
        batches.append((first, after[own], images))

    rows, metrics, pixels = [], (METRICS["latent_rmse"](), METRICS["latent_mse"]()), torch.empty(0)
    for nfe, steps in tqdm([map(int, call.split("/")) for call in args.calls], "strengths"):
        call = {"strength": nfe / steps, "guidance_scale": args.guidance_scale}
        finer = -(-50 // nfe)  # the same strength in at least fifty evaluations
        (exact,) = find_solvers([REFERENCE])
        target = endpoints(pipe, exact, finer * steps, batches, **call)
        for solver in find_solvers([*CLASSICAL, *args.solvers]):
            found = Sample(pixels, latents=endpoints(pipe, solver, steps, batches, **call), reference_latents=target)
            values = {metric.name: metric.rows(found) for metric in metrics}
            row = {"solver": solver.name, "variant": f"strength {nfe / steps:g}", "nfe": nfe}
            rows.append(row | numbers(metrics, values))
    facts = {"settings": vars(args), "metrics": {metric.name: {"lower_is_better": True} for metric in metrics}}
    print(table(write_results(args.output, rows, command=" ".join(["python", *sys.argv]), **facts)))


if __name__ == "__main__":
    main()
