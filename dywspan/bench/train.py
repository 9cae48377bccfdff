"""What learning costs on a network: seconds and memory of one update, and of a whole recipe reckoned from them."""

from __future__ import annotations

import contextlib
import gc
import io
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from ..core.check import whole
from ..distill.config import DistillConfig, LearningConfig
from ..distill.task import Task, Term
from ..distill.trainer import distill
from ..pipelines.memory import peak_bytes
from ..pipelines.networks import denoisers
from ..pipelines.pairs import Pairs
from ..pipelines.rollout import sample
from ..pipelines.teacher import Teacher
from ..schedulers.dyweight import DyWeightScheduler
from .memory import table_student
from .networks import EMBEDDED, NETWORKS, REAL, Network

TEACHER_STEPS = 10  # enough for targets that differ from where learning starts, and it warms the network up


@dataclass(frozen=True)
class Way:
    """One of the ways to learn: a solver of so many steps by an optimizer."""

    solver: str
    optimizer: str
    num_inference_steps: int


WAYS = (Way("DyWeight", "least_squares", 3), Way("DyWeight", "adamw", 5), Way("SpanLift", "adamw", 3))
SAMPLED = 5  # steps of the sampling that is timed, by default
# The recipe of a row is what `dywspan distill` does by default.
_OF_RECIPE = ("pairs", "held_out", "teacher_steps")
RECIPE: dict[str, Any] = {f.name: f.default for f in fields(DistillConfig) if f.name in _OF_RECIPE}


def train(
    networks: Sequence[str] | None = None,
    batch_size: int = 4,
    steps: int | None = None,
    updates: int = 2,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of learning, by network and way of learning.

    A network that fails, or whose memory does not suffice, is a row that says why; the others are measured.

    Args:
        networks: keys of ``NETWORKS``; by default all of real size, on CPUs the small embedded pipelines.
        batch_size: pairs of an update, and samples of a batch.
        steps: of every solver; by default of each its own, see ``WAYS`` and ``SAMPLED``.
        updates: timed ones of each way, after one that warms up; the fastest counts.
        device: by default CUDA, if there is one.

    Returns:
        Rows of ``network``, ``size``, ``dtype``, ``weights_gib`` (the network's own), ``ms_per_evaluation`` (of one
        sample while sampling, guidance included), ``solver``, ``optimizer``, ``num_inference_steps``,
        ``seconds_per_update``, ``peak_gib`` (above the weights), ``recipe_minutes``, ``failed`` (why, or None) and
        ``environment``. A recipe is never run: its time is reckoned from the others, see :func:`recipe_seconds`.

    Raises:
        ValueError: no such network or device, or a number below 1.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none of PyTorch's: use cpu, cuda or cuda:1, say.") from error
    if networks is None:
        networks = EMBEDDED if place.type == "cpu" else REAL
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise ValueError(f"networks={unknown} are not here: there are {[*NETWORKS]}.")
    for name, value in (("batch_size", batch_size), ("updates", updates), ("steps", 1 if steps is None else steps)):
        whole(name, value, 1, 1000)
    rows: list[dict[str, Any]] = []
    work = sum(NETWORKS[name].parameters for name in networks) * (1 + len(WAYS))
    # Shares of the bar are the networks' sizes: the time left is about right.
    with tqdm(total=work, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:
        for name in networks:
            measure = Measure(name, NETWORKS[name], place, batch_size, steps, updates)
            rows += measure.rows(bar)
    return rows


def recipe_seconds(
    config: LearningConfig, steps: int, per_evaluation: float, per_update: float, batch_size: int
) -> float:
    """Of `dywspan distill` with default settings, reckoned from what an evaluation and an update took:

        (pairs + held_out) teacher_steps e + updates u batch_size' / batch_size + checks held_out steps e

    The updates of the recipe are larger than the measured ones, and take longer in proportion.
    """
    updates = config.number("updates")
    teacher = (RECIPE["pairs"] + RECIPE["held_out"]) * RECIPE["teacher_steps"] * per_evaluation
    checks = (1 + updates // config.number("evaluate_every")) * RECIPE["held_out"] * steps * per_evaluation
    return teacher + updates * per_update * LearningConfig().batch_size / batch_size + checks


class Measure:
    """The measurement of one network.

    Args:
        others: as of :func:`train`.
    """

    def __init__(
        self, name: str, network: Network, device: torch.device, batch_size: int, steps: int | None, updates: int
    ) -> None:
        self.network, self.device, self.batch_size, self.updates = network, device, batch_size, updates
        self.ways = [Way(w.solver, w.optimizer, steps or w.num_inference_steps) for w in WAYS]
        self.sampled, self.name = steps or SAMPLED, name

    def rows(self, bar: Any) -> list[dict[str, Any]]:
        """One for each way, or one that says why there are none."""
        common: dict[str, Any] = {"network": self.name, "size": "{} x {}".format(*self.network.size)}
        common |= {"dtype": str(self.network.dtype_on(self.device)).removeprefix("torch.")}
        common |= {"weights_gib": None, "ms_per_evaluation": None}
        rows, part = [], self.network.parameters
        bar.set_description(f"{self.name}, sampling")
        try:
            with self._failing() as failed:
                self._prepare()
                common |= {"weights_gib": self.weights / 2**30, "ms_per_evaluation": 1e3 * self.per_evaluation}
            bar.update(part)
            for way in [] if failed else self.ways:
                bar.set_description(f"{self.name}, {way.solver} by {way.optimizer}")
                numbers: dict[str, Any] = dict.fromkeys(("seconds_per_update", "peak_gib", "recipe_minutes"))
                with self._failing() as why:
                    numbers |= self._measured(way)
                rows.append(common | vars(way) | numbers | {"failed": next(iter(why), None)})
                bar.update(part)
            if failed:
                none = dict.fromkeys((*vars(WAYS[0]), "seconds_per_update", "peak_gib", "recipe_minutes"))
                rows.append(common | none | {"failed": failed[0]})
                bar.update(part * len(self.ways))
        finally:
            self.__dict__.pop("pipe", None)
            self._free()
        return [row | {"environment": environment(self.device)} for row in rows]

    def _prepare(self) -> None:
        """The pipeline, pairs, and what an evaluation takes.

        Raises:
            FloatingPointError: what the network samples is not finite.
        """
        pipe = self.pipe = self.network.build(self.device)
        pipe.set_progress_bar_config(disable=True)
        networks = denoisers(pipe).values()
        self.weights = sum(p.nbytes for network in networks for p in network.parameters())
        count, solver = self.batch_size, {"solver": "ipndm", "solver_order": 2}
        self.base = DyWeightScheduler.from_config(pipe.scheduler, **solver)
        self.teacher = Teacher(self.base, TEACHER_STEPS)
        inputs = self.network.inputs(pipe, 2 * count + 1)
        parts = [slice(0, count), slice(count, 2 * count), slice(2 * count, 2 * count + 1)]
        seeds = range(2 * count + 1)
        ends = [self.teacher.endpoints(pipe, inputs[part], seeds[part], self.network.call) for part in parts]
        if not all(bool(end.isfinite().all()) for end in ends):
            raise FloatingPointError(f"The weights of {self.name} give samples that are not finite: use another dtype.")
        self.pairs = Pairs(inputs[: 2 * count], seeds[: 2 * count], torch.cat(ends[:2]))
        self.held_out = Pairs(inputs[2 * count :], seeds[2 * count :], ends[2])
        student = table_student(pipe, self.sampled)
        student.apply()

        @torch.no_grad()
        def sampling() -> None:
            part = self.pairs[:count]
            sample(pipe, student.scheduler, self.sampled, part.inputs, part.seeds, self.network.call)

        sampling()
        self.per_evaluation = min(self._seconds(sampling) for _ in range(2)) / (self.sampled * count)

    def _measured(self, way: Way) -> dict[str, float]:
        """Seconds and memory of an update."""
        moments: list[float] = []

        def log(numbers: Any, update: int) -> None:
            self._wait()
            moments.append(time.perf_counter())

        def run(updates: int = 1 + self.updates) -> None:
            learn(self, way, updates, log)

        alone = self.device.type == "cpu"  # there, looking at memory takes time
        if alone:
            run()
        timed = [*moments]
        _, peak = peak_bytes(partial(run, 1) if alone else run, self.device)
        seconds = min(after - before for before, after in pairwise(timed or moments))
        config = settings(way, None, LearningConfig().batch_size)
        recipe = recipe_seconds(config, way.num_inference_steps, self.per_evaluation, seconds, self.batch_size)
        return {"seconds_per_update": seconds, "peak_gib": peak / 2**30, "recipe_minutes": recipe / 60}

    def _seconds(self, run: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def _free(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    @contextmanager
    def _failing(self) -> Iterator[list[str]]:
        """Any error within becomes a line in the list; its traceback would keep what it was computing with."""
        reasons: list[str] = []
        try:
            yield reasons
        except Exception as error:  # whatever a network, a driver or an allocator can raise
            text = " ".join(str(error).split())
            reasons.append(f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}")
        self._free()


def settings(way: Way, updates: int | None, batch_size: int) -> LearningConfig:
    """How a way learns; without ``updates``, as by default."""
    optimizer: Any = way.optimizer
    return LearningConfig(optimizer=optimizer, updates=updates, evaluate_every=updates, batch_size=batch_size)


def learn(measure: Measure, way: Way, updates: int, log: Callable[[Any, int], None]) -> None:
    """Learn as ``dywspan distill`` does. ``log`` is called after every update; the last has a check of one pair too."""
    term = Term(way.num_inference_steps, measure.network.call, measure.pairs, measure.held_out)
    config, solver = settings(way, updates, measure.batch_size), way.solver.lower()
    on: dict[str, Any] = {"base": measure.base, "layout": measure.network.layout} if solver == "spanlift" else {}
    # Its own progress bar would be in the way of that of all networks.
    with contextlib.redirect_stderr(io.StringIO()):
        distill(Task(measure.pipe, measure.teacher, [term], config, solver=solver, **on), log=log)


def environment(device: torch.device) -> dict[str, Any]:
    """The device's name, and the versions that decide how fast it is."""
    cuda = device.type == "cuda"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": torch.version.cuda}
    name = torch.cuda.get_device_name(device) if cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    return {"device": name if cuda or device.type == "cpu" else device.type, **versions}


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
