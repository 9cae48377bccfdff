"""What a comparison is told: one flat list of settings, from the command line, the page, or Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..settings import check_types, option

SIDE_BY_SIDE = 4  # solvers beside the reference
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class CompareConfig:
    """One comparison; every field is explained by ``dywspan app --help``."""

    model: str = option("", "pipeline: a directory or a Hub id; default: the first in examples/")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "type of the weights; default: bfloat16 on CUDA, else float32"
    )
    prompt: str = option("clown face, twemoji", "text of the picture")
    seed: int = option(0, "seed of the noise, the same for all solvers")
    steps: int = option(4, "network evaluations of each solver (NFE)")
    guidance_scale: float | None = option(None, "guidance scale; default: what the model's solvers were learned for")
    call: dict[str, Any] | None = option(
        None, 'more arguments of the pipeline\'s call, e.g. {"height": 512}; default: what its solvers were learned for'
    )
    solvers: list[str] = option(
        [], f"1 to {SIDE_BY_SIDE} solvers: names, artefact directories or Hub ids; default: those of the model"
    )
    teacher_steps: int = option(50, "network evaluations of the reference")

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.solvers) > SIDE_BY_SIDE:
            raise ValueError(f"Choose at most {SIDE_BY_SIDE} solvers; {len(self.solvers)} are chosen.")
        if len({*self.solvers}) < len(self.solvers):
            raise ValueError(f"solvers={self.solvers} must name each solver once.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed={self.seed} must lie between 0 and {LARGEST_SEED}.")
        if not 1 <= self.steps <= self.teacher_steps:
            raise ValueError(
                f"steps={self.steps} must lie between 1 and the {self.teacher_steps} evaluations of the reference."
            )
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 1000:
            raise ValueError(f"guidance_scale={self.guidance_scale} must lie between 0 and 1000.")
