"""What a row is, and how its pipeline is called with another scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

from dywspan.pipelines.rollout import pipeline_class

Indices = Sequence[int]


@dataclass(frozen=True, eq=False)
class Tiny:
    """A pipeline and how to call it.

    Attributes:
        inputs: call arguments of the given samples; sample i is the same whichever batch it stands in.
        exercises: what this row has that others have not.
        denoiser: the component that is asked once per step and guidance branch.
        steps: num_inference_steps.
        seen: which of ``scheduler.timesteps`` are visited (img2img skips the first).
        branches: denoiser calls per step (guidance in separate calls).
        told: from a scheduler timestep to what the network is told.
        exact: the classical solver that equals the pipeline's own scheduler.
        twin: stand-in for the own scheduler, where that one adds noise or cuts times to integers.
        raw_noise: the pipeline never multiplies its noise by ``init_noise_sigma``.
        result: what to compare of what a call returns.
        experts: networks that are asked in place of the denoiser at some times.
        unlifted: why SpanLift cannot lift the sample and refuses it.
        unmodulated: why TimeLift finds nothing in the network and refuses it.
        layout: of the sample in ``step``, and channels: of its latent; see ``dywspan.core.layout``.
        tolerance: how far two float32 ways to the same result may be apart, in units of the result's largest value.
        batch: how many samples the tests ask for together; 1 where a call makes no more.
    """

    pipe: Any
    inputs: Callable[[Indices], dict[str, Any]]
    exercises: str
    denoiser: str = "transformer"
    steps: int = 3
    seen: Callable[[Tensor], Tensor] = lambda t: t
    branches: int = 1
    told: Callable[[Tensor], Tensor] = lambda t: t
    exact: dict[str, Any] = field(default_factory=lambda: {"solver": "euler"})
    twin: type | None = None
    raw_noise: bool = False
    result: Callable[[Any], Any] = lambda output: output[0]
    experts: tuple[str, ...] = ()
    unlifted: str = ""
    unmodulated: str = ""
    layout: str = "image"
    channels: int = 4
    tolerance: float = 1e-4
    batch: int = 2

    @property
    def samples(self) -> tuple[int, ...]:
        """Indices of those that the tests ask for together."""
        return tuple(range(self.batch))

    @property
    def networks(self) -> list[nn.Module]:
        return [getattr(self.pipe, name) for name in (self.denoiser, *self.experts)]

    @property
    def flow(self) -> bool:
        """Trained on straight lines from data to noise."""
        config = self.pipe.scheduler.config
        return "FlowMatch" in type(self.pipe.scheduler).__name__ or bool(config.get("use_flow_sigmas"))

    @property
    def edm(self) -> bool:
        """Preconditioned as in EDM."""
        scheduler = self.pipe.scheduler
        return type(scheduler).__name__.startswith("EDM") or scheduler.config.get("timestep_type") == "continuous"

    @property
    def sigma_data(self) -> float:
        """Of EDM's preconditioning, the deviation of the data; with 1 the input's scale is that of a VP network."""
        return self.pipe.scheduler.config.get("sigma_data", 1.0) if self.edm else 1.0


@dataclass(eq=False)
class Trace:
    """What one call did: the solver's inputs and outputs, what it noised, and the times the denoiser was told."""

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # model_output, sample, prev_sample
    noised: list[tuple[float, Tensor, Tensor, Tensor]] = field(default_factory=list)  # timestep, clean, noise, result
    told: list[Tensor] = field(default_factory=list)


PIPELINES: dict[str, Callable[[], Tiny]] = {}


def row(name: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Register a builder under a diffusers class name, with an optional variant after a space."""

    def register(builder: Callable[[], Tiny]) -> Callable[[], Tiny]:
        PIPELINES[name] = builder
        return builder

    return register


def available(name: str) -> bool:
    """Whether the installed diffusers has the class already, and transformers and peft what it needs."""
    if "LoRA" in name and find_spec("peft") is None:
        return False
    try:
        return pipeline_class(name.split()[0]) is not None
    except RuntimeError:
        return False


@functools.cache
def build(name: str) -> Tiny:
    return made(PIPELINES[name])


def made(builder: Callable[[], Tiny]) -> Tiny:
    """Seeded, in eval mode, quiet, and with a network that answers."""
    torch.manual_seed(0)
    tiny = builder()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    for network in tiny.networks:
        awaken(network)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def awaken(module: nn.Module) -> None:
    """Fill what was initialised with zeros: a network that answers 0 tests no solver."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3)


def run(tiny: Tiny, scheduler: Any, indices: Indices, **overrides: Any) -> Trace:
    """Call the pipeline with ``scheduler`` in place of its own; sample i has a noise generator of its own."""
    pipe, own = tiny.pipe, tiny.pipe.scheduler
    generators = [torch.Generator().manual_seed(1000 + i) for i in indices]
    arguments = {"num_inference_steps": tiny.steps, "generator": generators, **tiny.inputs(indices), **overrides}
    trace = Trace()
    swap(pipe, scheduler)
    try:
        with _listening(tiny.networks, scheduler, trace):
            trace.output = torch.as_tensor(tiny.result(pipe(**arguments)))
    finally:
        swap(pipe, own)
    trace.timesteps = scheduler.timesteps
    return trace


def swap(pipe: Any, scheduler: Any) -> None:
    """The one line. Modular pipelines have a method for it."""
    if isinstance(pipe, d.ModularPipeline):
        pipe.update_components(scheduler=scheduler)
    else:
        pipe.scheduler = scheduler


@contextmanager
def _listening(networks: list[nn.Module], scheduler: Any, trace: Trace) -> Iterator[None]:
    kind = type(scheduler)

    @functools.wraps(kind.step)  # pipelines look at the signature of step
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, model_output, timestep, sample, *args, **kwargs)
        if self is scheduler:  # not the copy that a pipeline makes for its sound
            values = model_output, sample, result[0]
            if (times := kwargs.get("per_token_timesteps")) is not None:
                moving = times[0].expand(sample.shape[1]) > 0  # the pipeline keeps the others itself
                values = -model_output[:, moving], sample[:, moving], result[0][:, moving]
            trace.steps.append(values)
        return result

    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        result = kind.add_noise(self, original_samples, noise, timesteps)
        trace.noised.append((float(timesteps.reshape(-1)[0]), original_samples, noise, result))
        return result

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # UNets, HunyuanDiT and Z-Image take the time as their second positional argument.
        names = ("timestep", "timesteps", "timestep_ratio", "t", "vision_timesteps")
        time = next((kwargs[k] for k in names if k in kwargs), args[1] if args[1:] else None)
        trace.told.append(torch.as_tensor(time).detach().reshape(-1)[-1:].double())

    heard = {"step": step, "__module__": kind.__module__}
    if hasattr(kind, "add_noise"):
        heard["add_noise"] = add_noise
    scheduler.__class__ = type(kind.__name__, (kind,), heard)
    handles = [network.register_forward_pre_hook(listen, with_kwargs=True) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        scheduler.__class__ = kind
