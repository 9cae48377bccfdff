"""What a tuning is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..names import LAYOUTS
from ..settings import check_types, help_of, option

FEW_STEPS = 4
BUDGETS, PAIRS = (1000, 2000), (10, 12)  # of up to so many steps, and of more
MOST = 16  # steps; with more, classical solvers are as good


@dataclass(frozen=True)
class TuneConfig:
    """Settings of :func:`dywspan.tune`; every field is explained by ``dywspan tune --help``."""

    steps: list[int] = option([4], "numbers of steps to tune for")
    prompts: str | list | None = option(
        None, "a file (.txt, .jsonl, .csv), a dataset, or a list; default: a list in this package"
    )
    prompt_column: str | None = option(None, "column of the dataset or file; default: 'prompt'")
    prompt_split: str = option("train", "split of the dataset")
    call: dict[str, Any] = option({}, 'arguments of the pipeline\'s call, e.g. {"height": 512, "width": 512}')
    guidance_scale: float | None = option(None, "short for guidance_scale in call")
    evaluations: int | None = option(
        None,
        f"network evaluations to spend on each number of steps; default: {BUDGETS[0]} up to {FEW_STEPS} steps, else "
        f"{BUDGETS[1]}",
    )
    pairs: int | None = option(
        None, f"samples to learn from; default: {PAIRS[0]}, or {PAIRS[1]} for more than {FEW_STEPS} steps"
    )
    held_out: int = option(8, "samples that the solvers are judged by; nothing is learned from them")
    layout: str = option("image", f"layout of the latents, for pictures: {', '.join(LAYOUTS)}")
    seed: int = option(0, "seed of the noise")
    output: str | None = option(None, "directory for the solver, its model card and pictures")
    pictures: int = option(4, "held-out samples in a picture")

    def __post_init__(self) -> None:
        check_types(self)
        if self.guidance_scale is not None:
            object.__setattr__(self, "call", {**self.call, "guidance_scale": self.guidance_scale})
            object.__setattr__(self, "guidance_scale", None)
        if not self.steps or len(set(self.steps)) < len(self.steps) or not all(2 <= n <= MOST for n in self.steps):
            raise ValueError(f"steps={self.steps} must name numbers of steps, each from 2 to {MOST} and once.")
        for name, least in {"pairs": 8, "held_out": 4, "evaluations": 300, "pictures": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}: {help_of(self, name)}.")

    @property
    def training(self) -> int:
        """How many samples are learned from."""
        return self.pairs or PAIRS[max(self.steps) > FEW_STEPS]

    def budget(self, steps: int) -> int:
        """Guided evaluations of the network to spend on this number of steps."""
        return self.evaluations or BUDGETS[steps > FEW_STEPS]
