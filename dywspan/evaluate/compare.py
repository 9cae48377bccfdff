"""Solvers side by side: endpoint error to a reference, time, and a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..pipelines.decode import decode
from ..pipelines.features import encoder, feature_distance
from ..pipelines.pairs import Pairs
from ..pipelines.rollout import sample


@dataclass(frozen=True)
class Result:
    """One solver at one number of steps.

    Attributes:
        nfe: network evaluations (calls of the guided denoiser).
        latent_mse: mean squared error of the endpoints to the reference's, over all samples.
        feature_distance: of the decoded images to the reference's, see :func:`dywspan.pipelines.features.encoder`.
        seconds_per_image: wall time of the whole pipeline call, decoding included.
        errors: squared error of each sample's endpoint.
        images: decoded images, PIL.
    """

    solver: str
    num_inference_steps: int
    nfe: int
    latent_mse: float
    feature_distance: float
    seconds_per_image: float
    errors: Sequence[float]
    images: Sequence[Image.Image]

    def row(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("errors", "images")}


@torch.no_grad()
def compare(
    pipe: Any,
    solvers: Mapping[str, Any],
    steps: Sequence[int],
    reference: Pairs,
    *,
    call: Mapping[str, Any],
    batch_size: int = 16,
) -> list[Result]:
    """Every solver at every number of steps on the prompts and noise of ``reference``."""
    results, features = [], encoder(pipe)
    layout = "packed" if reference.endpoints.ndim == 3 else "image"
    for n in steps:
        for name, scheduler in tqdm(solvers.items(), desc=f"{n} steps"):
            errors, distances, seconds, images = [], [], 0.0, []
            for start in range(0, len(reference), batch_size):
                part = reference[start : start + batch_size]
                started = time.perf_counter()
                endpoint, output = sample(pipe, scheduler, n, part.inputs, part.seeds, call, decode=True)
                seconds += time.perf_counter() - started
                images += output.images
                target = part.endpoints.to(endpoint.device)
                errors += (endpoint.float() - target).square().flatten(1).mean(1).tolist()
                decoded = (decode(pipe, z, layout) for z in (endpoint.float(), target))
                distances.append(feature_distance(features, *decoded))
            mse, distance = sum(errors) / len(errors), float(torch.cat(distances).mean())
            nfe = len(scheduler.timesteps)
            results.append(Result(name, n, nfe, mse, distance, seconds / len(reference), errors, images))
    return results


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line a solver, one column a number of steps: latent MSE / feature distance / seconds per image."""
    lines: dict[str, dict[str, str]] = {}
    columns = {f"{r['num_inference_steps']} steps": "" for r in rows}
    for r in rows:
        line = lines.setdefault(r["solver"], {"solver": r["solver"], **columns})
        cell = f"{r['latent_mse']:.4f} / {1e3 * r['feature_distance']:.3f} / {r['seconds_per_image']:.2f} s"
        line[f"{r['num_inference_steps']} steps"] = cell
    return list(lines.values())
