"""The pipelines that learned solvers are compared on, and their samples by the teacher."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dywspan.distill.losses import make_loss
from dywspan.pipelines.embeddings import remembered_prompts
from dywspan.pipelines.hashes import fingerprint
from dywspan.pipelines.inputs import read_inputs
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.rollout import Inputs, load_pipeline
from dywspan.pipelines.teacher import find_teacher
from dywspan.schedulers.bind import bind, unbind
from dywspan.schedulers.dyweight import DyWeightScheduler

EXAMPLES = Path(__file__).resolve().parents[1]
PROMPTS = EXAMPLES / "prompts"
TEACHER_STEPS = 100


@dataclass(frozen=True)
class Part:
    """Samples of one purpose.

    Attributes:
        prompts: a file of :data:`PROMPTS`.
        seed: of the first; no two purposes share any.
    """

    prompts: str
    seed: int


TRAIN, HELD_OUT = Part("emoji-train.txt", 2 * 10**6), Part("emoji-select.txt", 10**6)
FRESH = Part("emoji-held-out.txt", 9 * 10**6)


@dataclass(frozen=True)
class Case:
    """A pipeline, and how it is called and taught.

    Attributes:
        folder: of the pipeline.
        call: arguments of its call.
        layout: of its latents.
        order: of the teacher, iPNDM.
        operator: size of SpanLift's.
        prompted: whether it takes prompts.
        module: of classes of its own, and the folder that it is in.
        build: the command that makes the pipeline, where it does not ship.
    """

    name: str
    folder: Path
    call: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "image"
    order: int = 2
    operator: Mapping[str, int] = field(default_factory=dict)
    prompted: bool = True
    module: Path | None = None
    build: str = ""


FLOW_CALL = {"height": 64, "width": 64, "max_sequence_length": 28}
CASES = {
    case.name: case
    for case in (
        Case("emoji-sd", EXAMPLES / "emoji-sd", {"guidance_scale": 1.0}),
        Case("emoji-flow", EXAMPLES / "emoji-flow", FLOW_CALL, "packed"),
        Case(
            "hsc64",
            Path("build/galaxies/hsc64"),
            order=4,
            operator={"width": 16},
            prompted=False,
            module=EXAMPLES / "galaxies" / "score_network.py",
            build="python examples/galaxies/galaxies.py build --networks hsc64",
        ),
    )
}


class Opened:
    """A case with its pipeline loaded.

    Args:
        cache: folder of the teacher's samples.
    """

    def __init__(self, case: Case, pipe: Any, cache: Path) -> None:
        self.case, self.pipe, self.cache, self.call = case, pipe, cache, dict(case.call)
        self.model, self.loss = fingerprint(pipe), make_loss(pipe, "rmse")
        self.teacher = find_teacher(pipe, "ipndm", TEACHER_STEPS, case.order)

    @property
    def own(self) -> DyWeightScheduler:
        """The pipeline's scheduler as one of ours."""
        return DyWeightScheduler.from_config(self.pipe.scheduler)

    def inputs(self, part: Part, count: int) -> Inputs:
        """Each sample's arguments of the call.

        Raises:
            ValueError: there are not as many prompts.
        """
        if not self.case.prompted:
            return [{}] * count
        found: Sequence[Mapping[str, Any]] = read_inputs(str(PROMPTS / part.prompts), limit=count) or []
        if len(found) < count:
            raise ValueError(f"{part.prompts} has {len(found)} prompts, and {count} were asked for: ask for fewer.")
        return found

    def pairs(self, part: Part, count: int, teacher: Any = None) -> Pairs:
        """Noise, and where the teacher ends, or another one."""
        seeds = range(part.seed, part.seed + count)
        options: dict[str, Any] = {"cache": self.cache, "model": self.model}
        return make_pairs(
            self.pipe, teacher or self.teacher, self.inputs(part, count), seeds, call=self.call, **options
        )


@contextmanager
def opened(case: Case, cache: Path) -> Iterator[Opened]:
    """Within, the pipeline is there, and every prompt is encoded once.

    Raises:
        FileNotFoundError: the pipeline is not there; says how to make it.
    """
    if case.module is not None:
        sys.path.insert(0, str(case.module.parent))
        import_module(case.module.stem)
    if not case.folder.exists():
        raise FileNotFoundError(f"{case.folder}: no such pipeline. Make it first: {case.build}")
    pipe = load_pipeline(str(case.folder))
    if case.layout != "image":
        bind(pipe)  # SpanLift is told what packed tokens are
    try:
        with remembered_prompts(pipe, cache / "prompts"):
            yield Opened(case, pipe, cache)
    finally:
        if case.layout != "image":
            unbind(pipe)
