"""Which inputs are learned from, and which are held out."""

from __future__ import annotations

from ..pipelines.inputs import read_inputs
from ..pipelines.rollout import Inputs
from .config import DistillConfig


def split_inputs(config: DistillConfig) -> tuple[Inputs, Inputs]:
    """Training and held-out inputs, which share no line.

    Raises:
        ValueError, OSError: they cannot be read, or are fewer than are needed.
    """
    column, split, apart = config.prompt_column, config.prompt_split, config.held_out_prompts is not None
    needed = {"prompts": config.pairs + (0 if apart else config.held_out), "held_out_prompts": config.held_out * apart}
    read: list[Inputs] = []
    for name, count in needed.items():
        inputs = read_inputs(getattr(config, name), column, split, count)
        if inputs is None:
            inputs = [{}] * count
        if len(inputs) < count:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has {len(inputs)} prompts, {count} are needed: add some, or lower "
                f"pairs={config.pairs} or held_out={config.held_out}."
            )
        read.append(inputs)
    first = read[0][0]
    for own in (*read[0], *read[1]):
        if own.keys() != first.keys():
            raise ValueError(
                f"All samples must have the same arguments: some have {sorted(first)}, some {sorted(own)}."
            )
    training, held_out = read[0][: config.pairs], read[1] if apart else read[0][config.pairs :]
    return training, held_out
