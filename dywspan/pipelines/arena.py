"""Solvers judged on the same few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.table import InvalidSolverError
from ..pipelines.memory import Parts, is_sharded
from ..pipelines.pairs import Pairs
from ..pipelines.replay import Memo
from ..pipelines.rollout import Inputs, sample

CHUNK = 4  # samples at a time, always the same ones together: what the network answers may depend on that


class Arena:
    """A pipeline's samples, by their places, and how far solvers end from the teacher.

    Attributes:
        memo: how many evaluations of the network it took so far.
        targets: the teacher's endpoints, of the places that it was asked for.
    """

    def __init__(self, pipe: Any, inputs: Inputs, seeds: Sequence[int], call: Mapping[str, Any], memo: Memo) -> None:
        self.pipe, self.inputs, self.seeds, self.call, self.memo = pipe, inputs, seeds, call, memo
        self.parts = Parts(CHUNK, "samples", "the number of samples at a time", sharded=is_sharded(pipe))
        self.targets: dict[int, Tensor] = {}

    def pairs(self, places: Sequence[int]) -> Pairs:
        """Those with the teacher's endpoints, to learn from."""
        targets = torch.stack([self.targets[i] for i in places])
        return Pairs([self.inputs[i] for i in places], [self.seeds[i] for i in places], targets)

    @torch.no_grad()
    def endpoints(self, scheduler: Any, steps: int, places: Sequence[int]) -> Tensor:
        """(P, ...) float32 on the CPU: where a solver ends."""
        ends: dict[int, Tensor] = {}

        def sampled(part: Sequence[int]) -> None:
            inputs, seeds = [self.inputs[i] for i in part], [self.seeds[i] for i in part]
            end, _ = sample(self.pipe, scheduler, steps, inputs, seeds, self.call)
            ends.update(zip(part, end.float().cpu()))

        for chunk in sorted({i // CHUNK for i in places}):
            self.parts.run([i for i in places if i // CHUNK == chunk], sampled)
        return torch.stack([ends[i] for i in places])

    def errors(self, scheduler: Any, steps: int, places: Sequence[int]) -> Tensor:
        """(P,) root mean square of each endpoint's difference to the teacher's; infinite where there is none, and of a
        solver whose levels are none that the network knows.
        """
        try:
            ends = self.endpoints(scheduler, steps, places)
        except InvalidSolverError:
            return torch.full((len(places),), torch.inf)
        targets = torch.stack([self.targets[i] for i in places])
        return (ends - targets).flatten(1).square().mean(1).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)


def typical(errors: Tensor) -> float:
    """Their geometric mean: of few samples, one that ends in another image would rule the mean."""
    return float(errors.double().clamp(min=1e-12).log().mean().exp())
