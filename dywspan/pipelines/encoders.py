"""Text encoders that are loaded, used and let go before the denoisers are loaded, once on a machine."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from .embeddings import remembered_prompts
from .networks import denoisers
from .processes import agreed, is_local_main, wait
from .rollout import Inputs, load_pipeline

Call = Mapping[str, Any]


def encode_apart(
    model: str, inputs: Inputs, calls: Collection[Call], folder: Path, batch_size: int = 16, **how: Any
) -> dict[str, bytes]:
    """Encode all prompts into ``folder``, see :func:`remembered_prompts`, with stand-ins for the denoisers.

    Args:
        inputs, calls: every sample's arguments, and those of every call.
        batch_size: prompts of a call.
        how: dtype, device and revision, see :func:`load_pipeline`.

    Returns:
        :func:`.hashes.extracts` of the text encoders, which may be left out from now on. Nothing, and a warning with
        the reason, where a pipeline asks more of its denoiser than a stand-in can answer, or encodes no prompt alone.
    """
    found: dict[str, bytes] = {}
    if is_local_main():
        try:
            found = _encoded(model, inputs, calls, folder, batch_size, **how)
        except Exception as error:  # of whatever kind: all that is lost is memory
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"The text encoders are loaded together with the denoiser: {reason}", stacklevel=2)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    wait()
    return agreed(found)


def _encoded(
    model: str, inputs: Inputs, calls: Collection[Call], folder: Path, batch_size: int, **how: Any
) -> dict[str, bytes]:
    pipe = load_pipeline(model, **how, parts=stand_ins(model, **how))
    with remembered_prompts(pipe, folder) as memory:
        if memory is None:
            raise ValueError(f"{type(pipe).__name__} has no encode_prompt")
        for call in calls:
            memory.fill(inputs, call, batch_size, alone=True)
        memory.release()
        released = {name: memory.encoders[name] for name in memory.released}
        if released:  # can the pipeline do without them?
            for call in calls:
                memory.fill(inputs[:batch_size], call, batch_size, alone=True)
        if not released or memory.released.keys() != released.keys():
            raise ValueError(f"{type(pipe).__name__} encodes its prompts anew in every call")
        memory.released.clear()
    return released


def stand_ins(
    model: str, dtype: torch.dtype, device: str | torch.device, revision: str | None = None
) -> dict[str, nn.Module]:
    """For each of a model's denoisers one of the same class and configuration, without weights.

    Its first parameter is empty and where the denoiser would be: by it pipelines learn device and dtype.
    """
    made: dict[str, Any] = {}
    config: Any = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    for name, value in config.items():
        library, kind = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
        cls: Any = getattr(diffusers, str(kind), None) if library == "diffusers" else None
        if cls is not None and hasattr(cls, "forward"):
            with torch.device("meta"):
                network = cls.from_config(cls.load_config(model, subfolder=name, revision=revision))
            made[name] = nn.Module.to(network, dtype)
    found = denoisers(SimpleNamespace(components=made))
    for network in found.values():
        anchor = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        network._parameters = {"anchor": anchor, **network._parameters}
    return found
