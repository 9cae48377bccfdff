"""Where a network is told the time: the few parameters by which its layers are modulated, found by asking it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..schedulers.calls import core, wrapped
from .networks import TIME, denoisers

# Layers that make the embedding of the time, which all others are told; and those that work on tokens.
_OTHERS = re.compile(r"Embed|Projection|Approximator|(Attention|FeedForward)$")
_TABLES = re.compile(r"scale_shift_table|modulation")  # parameters that are added to what layers are told

Found = dict[str, torch.Size]  # shapes of parameters, by "component.path.parameter"


@contextmanager
def looking_for_modulation(pipe: Any) -> Iterator[Found]:
    """What a pipeline's networks are modulated by, found while it samples within.

    Each network is asked three times in its first call: as it is, for another sample, and at another time. Linear
    layers whose input only the time changes tell their block the time: AdaLN's, a UNet's ``time_emb_proj``. Their
    biases count, those that do not exist too, and the affine norms beside them, and the tables that PixArt's kin add to
    what one such layer tells all blocks.

    Raises:
        ValueError: on leaving, if nothing was found; or a step cache, which answers without the network.
    """
    found: Found = {}
    reasons: list[str] = []

    def look(name: str, network: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        seen = False

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if not seen:
                seen = True
                own = _modulation(network, args, kwargs)
                if isinstance(own, str):
                    reasons.append(f"its {name} {own}")
                else:
                    found.update({f"{name}.{path}": shape for path, shape in own.items()})
            return forward(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, network in denoisers(pipe).items():
            stack.enter_context(wrapped([network], functools.partial(look, name, core(network))))
        yield found
    if not found:
        raise ValueError(f"TimeLift finds nothing to learn in {type(pipe).__name__}: {'; '.join(reasons)}.")


def _modulation(network: nn.Module, args: Any, kwargs: Any) -> Found | str:
    """Of one network, or why there is none."""
    if getattr(network, "is_cache_enabled", False):
        return "answers from a step cache: learn with disable_cache(); the cache may be used with the learned solver"
    try:
        given = inspect.signature(type(network).forward).bind(network, *args, **kwargs)
    except (TypeError, ValueError) as error:
        return f"cannot be asked again ({error})"
    _, *own = given.arguments
    times = [name for name in own if TIME.search(name) and _number(given.arguments[name])]
    samples = [name for name in own if name not in times and _is_sample(given.arguments[name])]
    if not times or not samples:
        return f"takes {own}, none of which is known to be the time" if not times else "takes no sample"

    def told(name: str | None = None, change: Callable[[Any], Any] | None = None) -> dict[str, Tensor]:
        arguments = dict(given.arguments)
        if name is not None and change is not None:
            arguments[name] = change(arguments[name])
        again = inspect.BoundArguments(given.signature, arguments)  # type: ignore[arg-type]
        return _inputs_of_linears(network, again.args[1:], again.kwargs)

    base, moved, later = told(), told(samples[0], _another_sample), told(times[0], _another_time)
    same = lambda a, b: a.shape == b.shape and torch.equal(a, b)  # noqa: E731
    paths = [
        path
        for path, value in base.items()
        if path in moved and path in later and same(value, moved[path]) and not same(value, later[path])
    ]
    modules = {_plain(path): module for path, module in network.named_modules()}  # of two, the inner one
    found: Found = {}
    for path in paths:
        layer, parts = modules[_plain(path)], _plain(f"{path}.bias").split(".")[:-1]
        above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        if any(_OTHERS.search(type(modules[outer]).__name__) for outer in above):
            continue
        found[".".join([*parts, "bias"])] = torch.Size([layer.out_features])  # type: ignore[list-item]
        for name, norm in modules[above[-1]].named_children() if above else ():
            if "Norm" in type(norm).__name__ and "Ada" not in type(norm).__name__:
                factors = norm.named_parameters(recurse=False)
                found.update({f"{above[-1]}.{name}.{own}": factor.shape for own, factor in factors})
    for path, parameter in network.named_parameters():
        if _TABLES.search(path.rpartition(".")[2]):
            found[_plain(path)] = parameter.shape
    return found or "has no layer that is told the time and nothing else"


def _inputs_of_linears(network: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first inputs of all linear layers in one call, uncompiled."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any) -> None:
            if given and isinstance(given[0], Tensor):
                inputs.setdefault(path, given[0].detach().clone())

        return hook

    hooks = [m.register_forward_pre_hook(keep(path)) for path, m in network.named_modules() if _is_linear(path, m)]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            network.forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _is_linear(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not re.search(r"(^|\.)lora_\w+(\.|$)", path)


def _plain(path: str) -> str:
    """A name without what LoRA and ``torch.compile`` add to it."""
    return re.sub(r"(^|\.)(base_layer|_orig_mod)(?=\.|$)", "", path).lstrip(".")


def _number(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_sample(value: Any) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 1


def _another_sample(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_another_sample, value))
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return value + noise.to(value)


def _another_time(value: Any) -> Any:
    """Another one of the same kind; also of 0."""
    is_whole = not value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, int)
    return value * 3 // 5 + 1 if is_whole else value * 0.6 + 0.3
