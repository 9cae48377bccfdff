"""What one solver is learned from: a pipeline, a teacher's pairs, and the settings of learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..pipelines.pairs import Pairs, Source, shuffled
from ..pipelines.teacher import Teacher
from ..schedulers.bind import bind, guidance_scale
from ..schedulers.dyweight import DyWeightScheduler
from .config import LearningConfig
from .losses import Loss, latent_mse

T = TypeVar("T")
Call = Mapping[str, Any]  # arguments of the pipeline's call
Variants = Mapping[str, T]  # by name, where calls differ
# Training and held-out pairs, by steps and those of the whole way: see ``pairs.ends``.
Late = Mapping[tuple[int, int], tuple[Pairs, Pairs]]


@dataclass(frozen=True)
class Term:
    """One of the samplings that a solver is learned for, all of which weigh alike.

    Attributes:
        steps: number of steps.
        call: arguments of the pipeline's call.
        train, held_out: teacher pairs made with this call; of several terms as many.
        test: those that only the reported error is of; None: no such error.
        variant: its name, where calls differ.
        guidance_scale: of the call, where terms differ in it.
        whole: steps of the whole way, where these are the end of it only, as in img2img; the pairs start there.
    """

    steps: int
    call: Call
    train: Pairs | Source
    held_out: Pairs
    variant: str | None = None
    guidance_scale: float | None = None
    whole: int | None = None
    test: Pairs | None = None

    @property
    def name(self) -> str:
        """ "5", "5 @ large" for a variant, or "3/5" for the last three of five steps."""
        name = f"{self.steps}" if self.whole is None else f"{self.steps}/{self.whole}"
        return name if self.variant is None else f"{name} @ {self.variant}"

    def source(self, seed: int) -> Source:
        """Its pairs without end: shuffled anew each time through, or made when they are asked for."""
        return shuffled(self.train, seed) if isinstance(self.train, Pairs) else self.train


@dataclass(frozen=True, eq=False)
class Task:
    """What one solver is learned from.

    Attributes:
        pipe: the pipeline; its scheduler's configuration says what its network predicts.
        teacher: what made the pairs, for the provenance.
        terms: the samplings it is learned for, see :func:`make_terms`; the best is chosen on their held-out pairs.
            Least squares needs pairs, gradients can do with a source of endless ones.
        config: how it is learned.
        loss: what makes an endpoint close to the teacher's.
        solver: "dyweight" or "spanlift".
        continuous: one function for every number of steps, learned at those of the terms together.
        grid: the nominal grid of tables; None: :func:`default_grid`.
        paths: a teacher's by number of steps, that the first weights are fitted to, see :mod:`.regression`; of the
            middle one of several variants.
        base: of SpanLift: tables, a classical solver for every number of steps, or a SpanLift solver to continue from.
        layout, operator, name: of SpanLift: the latents' layout, size of the operator, and its name in the artefact.
        part: which of several tasks this is, "2 of 3", for progress bars.
        later: about how many times as long as this one all tasks after it take.
    """

    pipe: Any
    teacher: Teacher
    terms: Sequence[Term]
    config: LearningConfig = field(default_factory=LearningConfig)
    loss: Loss = latent_mse
    solver: str = "dyweight"
    continuous: bool = False
    grid: Mapping[str, Any] | None = None
    paths: Mapping[int, Pairs] = field(default_factory=dict)
    base: DyWeightScheduler | None = None
    layout: str = "image"
    operator: Mapping[str, Any] = field(default_factory=dict)
    name: str = "shared"
    part: str = ""
    later: float = 0.0

    @property
    def steps(self) -> list[int]:
        """The numbers of steps of whole ways."""
        return [*dict.fromkeys(term.steps for term in self.terms if term.whole is None)]

    @property
    def own_scheduler(self) -> DyWeightScheduler:
        """The pipeline's, as one of ours: what is learned becomes part of a copy."""
        return DyWeightScheduler.from_config(self.pipe.scheduler)

    @property
    def middle(self) -> Term:
        """The whole way of the fewest steps, of the middle variant."""
        variants = [term for term in self.terms if term.whole is None and term.steps == self.steps[0]]
        return variants[len(variants) // 2]

    @property
    def guidance_scale(self) -> float | None:
        """g0, the geometric mean of the terms' guidance scales; None where they do not differ."""
        scales = {term.guidance_scale for term in self.terms} - {None}
        return math.exp(sum(math.log(g) for g in scales if g) / len(scales)) if scales else None


def make_terms(
    pipe: Any,
    steps: Sequence[int],
    train: Pairs | Source | Variants[Pairs | Source],
    held_out: Pairs | Variants[Pairs],
    call: Call | Variants[Call],
    late: Late | None = None,
    test: Pairs | Variants[Pairs] | None = None,
) -> list[Term]:
    """What is learned together: every number of steps, of every variant; and ends of the way.

    A pipeline whose variants differ in the guidance scale is bound, see :func:`dywspan.bind`, so that its solver knows.
    """
    ends = [Term(n, call, *pairs, whole=whole) for (n, whole), pairs in (late or {}).items()]
    if not isinstance(train, Mapping) or not isinstance(held_out, Mapping):
        assert not isinstance(train, Mapping) and not isinstance(held_out, Mapping)
        assert not isinstance(test, Mapping)
        return [Term(n, call, train, held_out, test=test) for n in steps] + ends
    scales: dict[str, float | None] = {
        name: guidance_scale(pipe, {**held_out[name].inputs[0], **call[name]}) for name in train
    }
    if len({*scales.values()}) > 1:
        bind(pipe)
    else:
        scales = dict.fromkeys(train)
    tests: Any = test or dict.fromkeys(train)
    return [
        Term(n, call[name], train[name], held_out[name], name, scales[name], test=tests[name])
        for n in steps
        for name in train
    ]
