"""One line for a solver from a folder or the Hub: load it, check that it is of a pipeline's kind, and swap it in."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ..core.check import shown
from ..core.prediction import Prediction
from .base import SolverScheduler
from .bind import bind, is_modular, unbind
from .dyweight import DyWeightScheduler
from .hosts import different_networks
from .spanlift import SpanLiftScheduler
from .time_lifting import find_places

KINDS: dict[str, type[DyWeightScheduler]] = {k.__name__: k for k in (DyWeightScheduler, SpanLiftScheduler)}


def load(source: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> DyWeightScheduler:
    """A solver, of the class that its file names.

    Args:
        source: a folder, the path of a ``scheduler_config.json``, or a Hub id.
        kwargs: as of ``from_pretrained`` (``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...).

    Raises:
        OSError: no such repository, revision or file, or no connection.
        ValueError: it holds no solver of this package, or a damaged one.
    """
    config = SolverScheduler.load_config(source, subfolder=subfolder, **kwargs)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{source} holds a {shown(name)}, which is no solver of dywspan: they are {sorted(KINDS)}.")
    scheduler: Any = KINDS[name].from_pretrained(source, subfolder=subfolder, **kwargs)
    return scheduler


class Applied:
    """A solver in a pipeline, until :meth:`undo`, or the end of the ``with`` block that it is given to.

    Attributes:
        pipe: the pipeline.
        scheduler: the solver in it.
    """

    def __init__(self, pipe: Any, scheduler: DyWeightScheduler) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        self._own, self._kind = pipe.scheduler, type(pipe)
        _swap(pipe, scheduler)
        with contextlib.suppress(TypeError):  # it may know nothing that a solver is to be told
            bind(pipe)

    def undo(self) -> None:
        """Give the pipeline back the scheduler that it had."""
        _swap(self.pipe, self._own)
        if type(self.pipe) is not self._kind:
            unbind(self.pipe)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def apply(
    pipe: Any, solver: str | os.PathLike[str] | DyWeightScheduler, subfolder: str | None = None, **kwargs: Any
) -> Applied:
    """Load a solver, bind the pipeline, and swap its scheduler: standard and modular pipelines alike.

        dywspan.apply(pipe, "org/solvers-for-my-model")
        pipe(prompt, num_inference_steps=5)

    Args:
        pipe: a diffusers pipeline.
        solver: where it is, see :func:`load`, or one that is loaded.
        kwargs: as of :func:`load`.

    Returns:
        What can be undone: ``.undo()``, or ``with dywspan.apply(...):``.

    Raises:
        OSError: it cannot be loaded.
        ValueError: the pipeline's scheduler cannot be replaced, or the solver is of networks of another kind.
    """
    scheduler = solver if isinstance(solver, DyWeightScheduler) else load(solver, subfolder, **kwargs)
    own: Prediction = DyWeightScheduler.from_config(pipe.scheduler).host.prediction
    if wrong := different_networks(own, scheduler.host.prediction):
        raise ValueError(
            f"This solver was learned for {type(scheduler.host.prediction).__name__} networks, and that of "
            f"{type(pipe).__name__} is of kind {type(own).__name__}, with other {wrong}: load a solver of this model."
        )
    model, trained = str(getattr(pipe, "name_or_path", "") or ""), models(scheduler)
    if model and trained and model not in trained:
        warnings.warn(
            f"This solver was learned on {', '.join(sorted(trained))}, and the pipeline is {model}: on another model "
            "it may be no better than a classical solver.",
            stacklevel=2,
        )
    for lift in scheduler.time_lifts.values():
        find_places(pipe, lift)
    return Applied(pipe, scheduler)


def models(scheduler: DyWeightScheduler) -> set[str]:
    """The base models that its numbers were learned on, as far as they say."""
    parts: list[Any] = [*scheduler.tables.values(), scheduler.continuous, *scheduler.time_lifts.values()]
    if isinstance(scheduler, SpanLiftScheduler):
        parts += [*scheduler.lifts.values(), scheduler.continuous_lift]
    found: list[Mapping[str, Any]] = [p.provenance for p in parts if p is not None]
    return {str(p["base_model"]) for p in found if p.get("base_model")}


def _swap(pipe: Any, scheduler: Any) -> None:
    if is_modular(pipe):
        pipe.update_components(scheduler=scheduler)
    else:
        pipe.scheduler = scheduler
