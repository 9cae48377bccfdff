"""Modulate a pipeline's networks by a :class:`TimeLift` while they compute, and leave nothing behind."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.time_lift import TimeLift
from .calls import TOLD, Told, core, moves_by_groups, wrapped


@dataclass(frozen=True, eq=False)
class Place:
    """Where a network keeps a parameter.

    Attributes:
        owner: the layer.
        name: of the parameter in it.
        spare: what a bias that is not there is for the time of a call; None where it is there.
    """

    owner: nn.Module
    name: str
    spare: nn.Parameter | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter's memory, without its class and gradient."""
        parameter = self.owner._parameters[self.name] if self.spare is None else self.spare
        assert parameter is not None
        with torch._C.DisableTorchFunctionSubclass():
            return parameter.detach().as_subclass(Tensor)


@dataclass(eq=False)
class Lifting:
    """Whether a pipeline's call is going on: known to the copies that it makes of its scheduler, for a sound say."""

    going_on: bool = False

    def __bool__(self) -> bool:
        return self.going_on

    def __deepcopy__(self, memo: Any) -> Lifting:
        return self


@contextmanager
def time_lifted(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Within, the networks of a pipeline compute at each step with what the scheduler's time lift makes of them.

    They do so only in their own calls: between these, and after an exception, they are as they were, bit for bit.
    Without gradients parameters are changed in place, so that compiled networks keep their graphs; with gradients other
    tensors stand in for them, through which these flow to the offsets.

    Raises:
        ValueError: the networks are not those that it was learned on, or cannot be changed.
    """
    lifts: Mapping[int, TimeLift] = getattr(scheduler, "time_lifts", {})
    if not lifts or scheduler.lifting:  # or within another of these
        yield
        return
    networks = {name.partition(".")[0] for lift in lifts.values() for name in lift.offsets}
    places = {n: find_places(pipe, lift) for n, lift in lifts.items()}
    before, scheduler.lifting = scheduler.lifting, Lifting(True)
    try:
        with wrapped([pipe.components[name] for name in sorted(networks)], _Run(scheduler, places).wrap):
            yield
    finally:
        scheduler.lifting.going_on = False
        scheduler.lifting = before


def find_places(pipe: Any, lift: TimeLift) -> dict[str, Place]:
    """The parameters that a time lift moves, by its names of them.

    Raises:
        ValueError: see :func:`time_lifted`.
    """
    for component in {name.partition(".")[0] for name in lift.offsets}:
        network = pipe.components.get(component)
        if not isinstance(network, nn.Module):
            raise _another(pipe, f"it has no {component}")
        if moves_by_groups(network):
            raise _cannot(pipe, f"the weights of its {component} are offloaded by groups")
    return {name: _find(pipe, name, offset.shape[1:]) for name, offset in lift.offsets.items()}


def _find(pipe: Any, name: str, shape: Sequence[int]) -> Place:
    component, *path, own = name.split(".")
    owner = core(pipe.components[component])
    for part in path:
        if (inner := _inner(owner)._modules.get(part)) is None:
            raise _another(pipe, f"it has no {name}")
        owner = inner
    owner = _inner(owner)
    if own not in owner._parameters:
        raise _another(pipe, f"it has no {name}")
    place = Place(owner, own, _spare(owner, shape) if owner._parameters[own] is None else None)
    tensor = place.tensor
    if tensor.shape != torch.Size(shape):
        raise _another(pipe, f"{name} has shape {tuple(tensor.shape)} there, and {tuple(shape)} in the solver")
    if tensor.is_meta:
        raise _cannot(pipe, f"{name} is not in memory between calls, as enable_sequential_cpu_offload leaves it")
    if hasattr(owner._parameters[own], "device_mesh"):
        raise _cannot(pipe, f"{name} is sharded over several processes")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise _cannot(pipe, f"{name} is stored as {tensor.dtype}, in which offsets would be lost")
    return place


def _inner(module: nn.Module) -> nn.Module:
    """A layer behind what LoRA and ``torch.compile`` put around it."""
    while (inner := module._modules.get("base_layer", module._modules.get("_orig_mod"))) is not None:
        module = inner
    return module


def _spare(owner: nn.Module, shape: Sequence[int]) -> nn.Parameter:
    weight = owner._parameters.get("weight")
    dtype = torch.float32 if weight is None else weight.dtype
    dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
    device = "cpu" if weight is None else weight.device
    return nn.Parameter(torch.zeros(tuple(shape), dtype=dtype, device=device), requires_grad=False)


def _another(pipe: Any, reason: str) -> ValueError:
    return ValueError(
        f"This solver's TimeLift was learned on another network than that of {type(pipe).__name__}: {reason}. Load a "
        "solver of this model, or one without TimeLift: DyWeightScheduler.from_config(scheduler.config, "
        "time_lifts=None)."
    )


def _cannot(pipe: Any, reason: str) -> ValueError:
    return ValueError(
        f"TimeLift cannot modulate {type(pipe).__name__}: {reason}. Load the network on its device, or offload it by "
        "enable_model_cpu_offload; or use the solver without TimeLift: from_config(scheduler.config, time_lifts=None)."
    )


class _Run:
    """One call of a pipeline.

    Args:
        places: of the parameters that the time lift of each number of steps moves.
    """

    def __init__(self, scheduler: Any, places: Mapping[int, Mapping[str, Place]]) -> None:
        self.scheduler, self.all, self.thread = scheduler, places, threading.get_ident()
        self.lift: TimeLift | None = None
        self.places: list[Place] = []
        self.offsets: list[Tensor] = []
        self.kept: list[Tensor] = []  # the parameters' own values
        self.wide: list[Tensor] = []  # and these in float32 or wider

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A network's call, modulated for the step that the scheduler is at."""

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            lift = self.scheduler.time_lifts.get(self.scheduler.num_inference_steps)
            if lift is None:
                return forward(*args, **kwargs)
            if threading.get_ident() != self.thread:
                raise RuntimeError(
                    "This network is in use by a pipeline with TimeLift in another thread: let them take turns, or "
                    "give each a network of its own."
                )
            told = self._told(lift, self.scheduler.state.expected or 0)
            token = TOLD.set(told)
            try:
                with told.within():
                    return forward(*args, **kwargs)
            finally:
                TOLD.reset(token)

        return call

    def _told(self, lift: TimeLift, step: int) -> Told:
        if lift is not self.lift:
            self._begin(lift)
        rows = [offset[step] for offset in self.offsets]
        values = torch._foreach_add(self.wide, rows) if rows else ()
        if torch.is_grad_enabled():
            values = [value.to(k.dtype) for value, k in zip(values, self.kept)]
            return Told(values, partial(_replaced, self.places, values))
        return Told(values, partial(_moved, self.places, self.kept, values))

    def _begin(self, lift: TimeLift) -> None:
        found = {
            name: place
            for name, place in self.all[self.scheduler.num_inference_steps].items()
            # A bias of zeros may change the last bits: the product and the sum are one kernel.
            if place.spare is None or torch.is_grad_enabled() or bool(lift.offsets[name].any())
        }
        self.lift, self.places = lift, [*found.values()]
        self.kept = [place.tensor.clone() for place in self.places]
        self.wide = [k.to(torch.promote_types(k.dtype, torch.float32)) for k in self.kept]
        self.offsets = [lift.offsets[name].to(own) for name, own in zip(found, self.wide)]


@contextmanager
def _replaced(places: Sequence[Place], values: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters."""
    before = [place.owner._parameters[place.name] for place in places]
    for place, value in zip(places, values):
        place.owner._parameters[place.name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for place, parameter in zip(places, before):
            place.owner._parameters[place.name] = parameter


@contextmanager
def _moved(places: Sequence[Place], kept: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Parameters changed in place, and put back."""
    absent = [place for place in places if place.spare is not None]
    with _installed(absent), torch.no_grad():
        _write(places, values)
        try:
            yield
        finally:
            _write(places, kept)


def _installed(absent: Sequence[Place]) -> AbstractContextManager[None]:
    return _replaced(absent, [place.spare for place in absent if place.spare is not None])


def _write(places: Sequence[Place], values: Sequence[Tensor]) -> None:
    """Into the parameters, wherever offloading has put them."""
    if not places:
        return
    tensors = [place.tensor for place in places]
    torch._foreach_copy_(tensors, [*values])
    if torch.is_autocast_enabled(tensors[0].device.type):
        torch.clear_autocast_cache()  # it may hold them as they were
