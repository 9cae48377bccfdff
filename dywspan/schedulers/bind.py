"""Tell a scheduler what pipelines know and ``step`` is not told: guidance scale, packed latents' size, late starts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..core.layout import LAYOUTS, Packed
from .dyweight import DyWeightScheduler
from .sources import LateStart
from .spanlift import SpanLiftScheduler
from .time_lifting import time_lifted

_UNBOUND = "_unbound"  # in the class of a bound pipeline: the class it had


def bind(pipe: Any) -> Any:
    """Make a pipeline tell its scheduler, in every call, what it is called with.

    That is the guidance scale, SpanLift's height and width, and the step that an image-to-image call begins at. And the
    pipeline's networks are told what a TimeLift says.

    The guidance scale is read from the call, or from the guider of a modular pipeline; height and width from
    ``prepare_latents``, which every pipeline with packed tokens has, or from a modular pipeline's inputs. Both are for
    that call only: another pipeline that has the same scheduler is told nothing. Without it a solver is for the
    guidance scale that it was learned around, packed tokens are taken for a square, and a continuous solver refuses
    to begin late.

        pipe = dywspan.bind(pipe)

    Raises:
        TypeError: the pipeline knows none of them.
    """
    kind = type(pipe)
    if hasattr(kind, _UNBOUND):
        return pipe
    prepare = getattr(kind, "prepare_latents", None)
    sized = prepare is not None and {"height", "width"} <= inspect.signature(prepare).parameters.keys()
    if is_modular(pipe):
        sized = "height" in call_arguments(pipe)
    late = getattr(kind, "get_timesteps", None)
    lifted = bool(getattr(pipe.scheduler, "time_lifts", None))
    if not lifted and not sized and late is None and guidance_argument(pipe) is None and not hasattr(pipe, "guider"):
        raise TypeError(
            f"{kind.__name__} has no prepare_latents that takes height and width, and is not called with a "
            "guidance_scale: use scheduler.set_latent_size(height, width) if its tokens are packed, and "
            "scheduler.set_guidance_scale(g)."
        )
    # Python looks calls up in the class: it gets one of its own, of the same name.
    call: Any = kind.__call__
    own: dict[str, Any] = {_UNBOUND: kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    own["__call__"] = told = _told(call)
    # A rollout takes the undecorated call, through which gradients flow.
    told.__wrapped__ = _told(getattr(call, "__wrapped__", call))
    if prepare is not None and sized and not is_modular(pipe):
        own["prepare_latents"] = _telling_size(prepare)
    if late is not None:
        own["get_timesteps"] = _beginning(late)
    pipe.__class__ = type(kind.__name__, (kind,), own)
    return pipe


def unbind(pipe: Any) -> Any:
    """Undo :func:`bind`."""
    pipe.__class__ = getattr(type(pipe), _UNBOUND, type(pipe))
    return pipe


def is_modular(pipe: Any) -> bool:
    """Whether it is a pipeline of blocks, whose components are swapped by ``update_components``."""
    return hasattr(pipe, "update_components")


def call_arguments(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call, with their defaults (None: there is none); of a modular one, its inputs."""
    if is_modular(pipe):
        inputs = {p.name or p.kwargs_type: p.default for p in pipe.blocks.inputs}
        return {"output": None, **{name: default for name, default in inputs.items() if name is not None}}
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def required_arguments(pipe: Any) -> set[str]:
    """Those without which a pipeline cannot be called."""
    if is_modular(pipe):
        return {p.name for p in pipe.blocks.inputs if p.required and p.name is not None}
    parameters = [*inspect.signature(type(pipe).__call__).parameters.values()][1:]
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def guidance_argument(pipe: Any) -> str | None:
    """The argument of the call that is the guidance scale: true_cfg_scale where guidance_scale has no effect."""
    known = call_arguments(pipe)
    order = ("guidance_scale", "true_cfg_scale") if _embeds_guidance(pipe) else ("true_cfg_scale", "guidance_scale")
    return next((name for name in order if name in known), None)


def guidance_scale(pipe: Any, given: Mapping[str, Any]) -> float:
    """g of a call with these arguments, 1 without guidance.

    Where the network is told a guidance scale, this times that of classifier-free guidance on top. Classifier-free
    guidance is none at 1 and below, nor, by a true_cfg_scale, without a negative prompt. A guider's is its own.
    """
    given = {k: v for k, v in {**call_arguments(pipe), **given}.items() if v is not None}
    own, true = given.get("guidance_scale"), given.get("true_cfg_scale")
    if (guider := getattr(pipe, "guider", None)) is not None:
        scale = getattr(guider, "guidance_scale", None) if getattr(guider, "_enabled", True) else None
        own, true = (own if _embeds_guidance(pipe) else scale), None
    negative = any(k.startswith("negative_prompt") for k in given)
    if _embeds_guidance(pipe):
        told = float(own) if own and own > 0 else 1.0
    else:
        told = 1.0 if "true_cfg_scale" in given else max(float(own or 1), 1.0)
    return told * (max(float(true or 1), 1.0) if negative else 1.0)


def _embeds_guidance(pipe: Any) -> bool:
    """Whether its network is told the guidance scale, as guidance-distilled ones are."""
    return any(getattr(getattr(m, "config", None), "guidance_embeds", False) for m in pipe.components.values())


def _told(call: Callable[..., Any]) -> Any:
    """A pipeline's call, that tells the scheduler what it is called with, and takes it back."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        with _for_a_call(self.scheduler), time_lifted(self, self.scheduler):
            if isinstance(self.scheduler, DyWeightScheduler):
                self.scheduler.set_guidance_scale(guidance_scale(self, given))
                if is_modular(self):
                    _tell_size(self, {**call_arguments(self), **given})
            return call(self, *args, **kwargs)

    return told


@contextmanager
def _for_a_call(scheduler: Any) -> Iterator[None]:
    facts = {k: v for k, v in vars(scheduler).items() if k in ("guidance_scale", "latent_size")}
    try:
        yield
    finally:
        vars(scheduler).update(facts)


def _telling_size(prepare: Callable[..., Any]) -> Any:
    """``prepare_latents`` after the scheduler was told the size."""
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        _tell_size(self, given.arguments)
        return prepare(self, *args, **kwargs)

    return told


def _beginning(get_timesteps: Callable[..., Any]) -> Any:
    """``get_timesteps``, by which a pipeline takes the end of a run, of a solver that was told where that begins."""

    @functools.wraps(get_timesteps)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = get_timesteps(self, *args, **kwargs)
        except LateStart as late:
            self.scheduler.begin_at(late.begin)
            result = get_timesteps(self, *args, **kwargs)
        if getattr(self.scheduler, "time_lifts", None) and self.scheduler.begin_index is None:
            # The network is told the time of the first step before the scheduler is told which one it is.
            self.scheduler.set_begin_index(self.scheduler.index_for_timestep(result[0][0]))
        return result

    return told


def _tell_size(pipe: Any, given: Mapping[str, Any]) -> None:
    scheduler = pipe.scheduler
    layout = LAYOUTS[scheduler.config["layout"]] if isinstance(scheduler, SpanLiftScheduler) else None
    if isinstance(layout, Packed):
        multiple = layout.patch * (getattr(pipe, "vae_spatial_compression_ratio", None) or pipe.vae_scale_factor)
        sides = [given.get(side) or getattr(pipe, f"default_{side}") for side in ("height", "width")]
        height, width = (int(side) // multiple * layout.patch for side in sides)
        scheduler.set_latent_size(height, width)
