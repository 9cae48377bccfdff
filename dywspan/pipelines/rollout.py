"""Run any pipeline with any scheduler, differentiably, through the pipeline's own ``__call__``.

Training and inference are so the same code path: guidance, rounding of timesteps and conditioning are the pipeline's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..artifact import release
from ..schedulers.bind import call_arguments
from ..schedulers.calls import TOLD, core, wrapped
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.time_lifting import time_lifted
from .modular import blocks_of, differentiable
from .networks import Left, denoisers


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    parts: Mapping[str, Any] | None = None,
) -> Any:
    """A pipeline, all parts in one dtype, on the accelerator if there is one, without a progress bar per call.

    Args:
        parts: components that are taken instead of the model's own; None: left out.
    """
    name = "dtype" if release(diffusers.__version__) >= (0, 42) else "torch_dtype"
    try:  # diffusers finds no class but its own by the name that files give
        config: Any = diffusers.DiffusionPipeline.load_config(model, revision=revision)
        ours = config["_class_name"] == "EDMPipeline"
        kind = pipeline_class("EDMPipeline") if ours else diffusers.DiffusionPipeline
        pipe = kind.from_pretrained(model, revision=revision, **{name: dtype}, **(parts or {}))
    except OSError:
        if (pipe := _load_modular(model, revision)) is None:
            raise
        pipe.load_components(**{name: dtype})
    for part in (pipe, *blocks_of(pipe)):  # a loop of blocks has a bar of its own
        if hasattr(part, "set_progress_bar_config"):
            part.set_progress_bar_config(disable=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not parts:
        return pipe.to(device)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and parts.get(name) is not part:
            part.to(device)
    return pipe


def pipeline_class(name: str) -> Any:
    """Of diffusers, or ours; None: neither has it."""
    if name == "EDMPipeline":
        from ..edm import EDMPipeline

        return EDMPipeline
    return getattr(diffusers, name, None)


def _load_modular(model: str, revision: str | None) -> Any:
    """A modular pipeline without its components; None where there is none."""
    kind: Any = getattr(diffusers, "ModularPipeline", None)
    try:
        kind.load_config(model, revision=revision)
    except (OSError, AttributeError):
        return None
    return kind.from_pretrained(model, revision=revision)


class _LastStep(Left):
    """How a rollout leaves the pipeline."""


def rollout(
    pipe: Any,
    scheduler: Any,
    *,
    decode: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
    until: int | None = None,
    **call: Any,
) -> tuple[Tensor, Any]:
    """Sample with ``scheduler`` in place of the pipeline's own.

    The undecorated ``__call__`` runs, so gradients flow where they are enabled. Without ``decode`` it is left by an
    exception from the last step: no decoding, no conversion to numpy, and pipelines without output_type="latent" work.

    Args:
        pipe: a diffusers pipeline, modular or not.
        scheduler: any diffusers or dywspan scheduler.
        decode: run the pipeline to its end.
        watch: gets the number of every step, from 0, and the sample it returned.
        until: steps to take, all by default; only a whole run can be decoded.
        call: its arguments (prompt, num_inference_steps, generator, guidance_scale, ...).

    Returns:
        The last sample, in the scheduler's frame, and the pipeline's output (None without ``decode``).

    Raises:
        ValueError: gradients are asked for and end at the network, or at the pipeline's own code.
        RuntimeError: the pipeline takes fewer steps.
    """
    run = getattr(type(pipe).__call__, "__wrapped__", type(pipe).__call__)
    step, calls, last, flows = scheduler.step, 0, None, False

    @functools.wraps(step)  # pipelines read the signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, last, flows
        output = args[0] if args else kwargs.get("model_output")
        if flows and isinstance(output, Tensor) and not output.requires_grad:
            raise ValueError(
                f"Gradients do not pass through {type(pipe).__name__}: what step {calls} is given has none. Its "
                "network, or code around it, has no backward pass: use optimizer='least_squares', which needs none."
            )
        result = step(*args, **kwargs)
        if watch is not None:
            watch(calls, result[0])
        calls, flows = calls + 1, result[0].requires_grad
        if calls == (until or len(scheduler.timesteps)):
            last = result[0]
            if not decode:
                raise _LastStep
        return result

    own, output = pipe.scheduler, None
    pipe.scheduler, scheduler.step = scheduler, watched
    try:
        with differentiable(pipe), time_lifted(pipe, scheduler):
            output = run(pipe, **call)
    except _LastStep:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    finally:
        pipe.scheduler = own
        del scheduler.step
    if last is None:
        raise RuntimeError(
            f"{type(pipe).__name__} took {calls} of {len(scheduler.timesteps)} steps: a rollout starts from noise and "
            "ends at the last step; use its text-to-image call, without strength or denoising_end."
        )
    return last, output


def set_timesteps(scheduler: DyWeightScheduler, steps: int) -> None:
    """Outside a pipeline's call, where only the number of steps matters: any resolution's shift will do."""
    before, scheduler.lifting = scheduler.lifting, True  # no network is asked
    try:
        scheduler.set_timesteps(steps, mu=1.0 if scheduler.config.get("use_dynamic_shifting") else None)
    finally:
        scheduler.lifting = before


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a sample: noise does not depend on the batch it is drawn in, nor on the device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that stand in lists or dictionaries: what a network consists of."""
    found: list[nn.Module] = []
    for child in model.children():
        found += (
            [m for m in child.children() if any(True for _ in m.parameters())]
            if isinstance(child, nn.ModuleList | nn.ModuleDict)
            else blocks(child)
        )
    return found


Inputs = Sequence[Mapping[str, Any]]  # of each sample, its own arguments of the call: [{"prompt": "a cat"}, ...]


def sample(
    pipe: Any,
    scheduler: Any,
    steps: int,
    inputs: Inputs,
    seeds: Sequence[int],
    call: Mapping[str, Any],
    *,
    decode: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
    until: int | None = None,
) -> tuple[Tensor, Any]:
    """:func:`rollout` of a batch, each sample with its own inputs and from the noise of its own seed.

    Inputs that are tensors (embeddings) are batches of one and are joined; any others become lists.
    """
    columns: dict[str, Any] = {name: [own[name] for own in inputs] for name in inputs[0]}
    columns = {name: torch.cat(v) if isinstance(v[0], Tensor) else v for name, v in columns.items()}
    if "batch_size" in call_arguments(pipe):
        columns["batch_size"] = len(inputs)  # these pipelines do not tell it from their inputs
    # A text for all, such as a negative prompt, is one for each.
    common = {k: [v] * len(inputs) if isinstance(v, str) and "prompt" in k else v for k, v in call.items()}
    arguments = {**columns, "generator": generators(seeds), "num_inference_steps": steps, **common}
    end, output = rollout(pipe, scheduler, decode=decode, watch=watch, until=until, **arguments)
    return end[: len(inputs)], output  # some pipelines carry guidance's second half to the end


@contextmanager
def frozen(
    pipe: Any, recompute: bool = False, learned: Iterable[nn.Module] = (), by_blocks: bool = False
) -> Iterator[None]:
    """No gradients for the pipeline's weights; with ``recompute``, only one call's activations are held at a time.

    Args:
        recompute: checkpoint each denoiser call: memory flat in the number of steps, one more forward pass each.
        learned: networks of the solver, checkpointed too.
        by_blocks: checkpoint each block of a denoiser instead: the inputs of all blocks of all steps are held, and the
            activations of one block at a time.
    """
    modules = [m for own in pipe.components.values() if isinstance(own, nn.Module) for m in own.modules()]
    # By name: offloading puts new parameters in the place of the old ones.
    moving = [(m, name) for m in modules for name, p in m._parameters.items() if p is not None and p.requires_grad]
    for module, name in moving:
        getattr(module, name).requires_grad_(False)
    whole, sharded = _units(pipe, by_blocks)
    try:
        with (
            wrapped([*whole, *learned] if recompute else [], _recomputed),
            wrapped(sharded if recompute else [], _recomputed, inside=True),
        ):
            yield
    finally:
        for module, name in moving:
            getattr(module, name).requires_grad_(True)


def _units(pipe: Any, by_blocks: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """What is recomputed in one piece: a denoiser, or its blocks where their weights are gathered one by one."""
    whole: list[nn.Module] = []
    sharded: list[nn.Module] = []
    for model in denoisers(pipe).values():
        gathered = [m for m in model.modules() if m is not model and hasattr(m, "unshard")]
        sharded += gathered
        whole += [] if gathered else blocks(core(model)) if by_blocks else [model]
    return whole, sharded


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (told := TOLD.get()) is not None:  # and has to be again when the call is repeated
            kwargs["context_fn"] = lambda: (nullcontext(), told.within())
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call
