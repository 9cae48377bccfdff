"""The small form of TimeLift: each layer is told a time of its own, one number for each step and layer.

    t_(i, l) = t_i (1 + theta_(i, l))     through the network's own embedding, at evaluation i and layer l

TimeLift moves what a layer makes of the time, some thousands of numbers a step; this moves the time itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dywspan.distill.gradients import learning_rate
from dywspan.distill.losses import rmse_loss
from dywspan.pipelines.conditioning import looking_for_modulation
from dywspan.pipelines.networks import denoisers
from dywspan.pipelines.pairs import Pairs, shuffled
from dywspan.pipelines.rollout import frozen, sample

# By class of the network: the embedding of another time, from it and the arguments of its call.
EMBEDDINGS: dict[str, Callable[[Any, Mapping[str, Any], Tensor], Tensor]] = {
    "UNet2DConditionModel": lambda network, given, t: network.time_embedding(
        network.get_time_embed(given["sample"], t)
    ),
    "FluxTransformer2DModel": lambda network, given, t: network.time_text_embed(1000 * t, given["pooled_projections"]),
}


def layers(pipe: Any, scheduler: Any, steps: int, inputs: Any, call: Mapping[str, Any]) -> list[str]:
    """The linear layers that are told the time and nothing else, by path in the network.

    Raises:
        ValueError: the pipeline has several networks, or one whose embedding is not in ``EMBEDDINGS``.
    """
    names = [type(network).__name__ for network in denoisers(pipe).values()]
    if len(names) != 1 or names[0] not in EMBEDDINGS:
        raise ValueError(f"The networks are {names}: the small form is written for one of {sorted(EMBEDDINGS)}.")
    with looking_for_modulation(pipe) as found, torch.no_grad():
        sample(pipe, scheduler, steps, inputs, [0], call)
    paths = [name.partition(".")[2].removesuffix(".bias") for name in found if name.endswith(".bias")]
    (network,) = denoisers(pipe).values()
    return [path for path in paths if isinstance(network.get_submodule(path), nn.Linear)]


@contextmanager
def told(pipe: Any, paths: list[str], theta: Tensor) -> Iterator[None]:
    """Within, each layer is told its own time.

    Args:
        theta: (N, L), of the evaluations of a run and of the layers ``paths``.
    """
    (network,) = denoisers(pipe).values()
    embed, parameters = EMBEDDINGS[type(network).__name__], inspect.signature(type(network).forward)
    now: dict[str, Any] = {"evaluation": -1}

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        now["given"] = parameters.bind(module, *args, **kwargs).arguments
        now["evaluation"] = (now["evaluation"] + 1) % len(theta)

    def at(column: int) -> Callable[..., tuple[Tensor]]:
        def other(module: nn.Module, given: Any) -> tuple[Tensor]:
            time = now["given"]["timestep"] * (1 + theta[now["evaluation"], column])
            return (torch.nn.functional.silu(embed(network, now["given"], time)),)

        return other

    hooks = [network.register_forward_pre_hook(start, with_kwargs=True)]
    hooks += [network.get_submodule(path).register_forward_pre_hook(at(k)) for k, path in enumerate(paths)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def learn(
    pipe: Any,
    scheduler: Any,
    steps: int,
    pairs: Pairs,
    call: Mapping[str, Any],
    *,
    updates: int = 120,
    batch_size: int = 16,
    lr: float = 0.01,
) -> tuple[list[str], Tensor]:
    """Layers and theta (N, L) for one number of steps of a solver that stays as it is, by AdamW on the rmse loss."""
    paths = layers(pipe, scheduler, steps, pairs.inputs[:1], call)
    theta = torch.zeros(steps, len(paths), requires_grad=True)
    optimizer, source = torch.optim.AdamW([theta], lr=lr, weight_decay=0.0), shuffled(pairs, 0)
    with frozen(pipe), told(pipe, paths, theta):
        for update in range(updates):
            batch = source(range(update * batch_size, (update + 1) * batch_size))
            with torch.enable_grad():
                end, _ = sample(pipe, scheduler, steps, batch.inputs, batch.seeds, call)
                loss = rmse_loss(end.float(), batch.endpoints)
            if not math.isfinite(value := float(loss.detach())):
                raise FloatingPointError(f"The loss is {value} at update {update}: lower lr={lr}.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = lr * learning_rate(update, updates)
            optimizer.step()
            if update % 20 == 0:
                print(f"small form, {steps} steps, update {update} of {updates}: loss {value:.4f}")
    return paths, theta.detach()
