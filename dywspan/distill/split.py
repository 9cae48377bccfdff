"""Which inputs are learned from, and which are held out."""

from __future__ import annotations

from ..pipelines.inputs import read_inputs
from ..pipelines.rollout import Inputs
from .config import DistillConfig


def split_inputs(config: DistillConfig) -> tuple[Inputs, Inputs, Inputs]:
    """Inputs to learn from, to choose by and to test on, which share no line.

    Raises:
        ValueError, OSError: they cannot be read, or are fewer than are needed.
    """
    column, split = config.prompt_column, config.prompt_split
    counts = {"prompts": config.pairs, "held_out_prompts": config.held_out, "test_prompts": config.test}
    sources: list[tuple[str, list[int]]] = []  # a setting, and how many it gives to each part in turn
    for name, count in counts.items():
        if name == "prompts" or getattr(config, name) is not None:
            sources.append((name, [count]))
        else:  # the lines after those of the part before
            sources[-1][1].append(count)
    parts: list[Inputs] = []
    for name, shares in sources:
        needed = sum(shares)
        inputs = read_inputs(getattr(config, name), column, split, needed)
        if inputs is None:
            inputs = [{}] * needed
        if len(inputs) < needed:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has {len(inputs)} prompts, {needed} are needed: add some, or lower "
                f"pairs={config.pairs}, held_out={config.held_out} or test={config.test}."
            )
        for count in shares:
            parts.append(inputs[:count])
            inputs = inputs[count:]
    training, held_out, test = parts
    first = training[0]
    for own in (*training, *held_out, *test):
        if own.keys() != first.keys():
            raise ValueError(
                f"All samples must have the same arguments: some have {sorted(first)}, some {sorted(own)}."
            )
    return training, held_out, test
