"""Prompt embeddings, computed once: ``encode_prompt`` with a memory in files, and text encoders that can go."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..artifact import write_atomically
from .hashes import digest, extracts
from .networks import denoisers, hooks_of, left_at_first_call, place
from .processes import in_turn, is_main, wait
from .rollout import Inputs, sample

_OF_EACH_PROMPT = ("prompt", "negative_prompt")  # how arguments with an entry for each prompt begin


@contextmanager
def remembered_prompts(
    pipe: Any, folder: Path, left_out: Mapping[str, bytes] | None = None
) -> Iterator[PromptMemory | None]:
    """Within, ``pipe.encode_prompt`` computes each prompt once and reads it from ``folder`` afterwards.

    Args:
        left_out: text encoders that the pipeline was loaded without, as :func:`.encoders.encode_apart` says them.
    """
    if not hasattr(pipe, "encode_prompt"):
        yield None
        return
    memory = PromptMemory(pipe, folder, left_out or {})
    pipe.encode_prompt = functools.update_wrapper(memory, memory.encode)
    try:
        yield memory
    finally:
        del pipe.encode_prompt
        memory.bring_back()


class PromptMemory:
    """An ``encode_prompt`` that remembers, for any pipeline.

    Pipelines agree neither on what it takes nor on what it returns. So prompts are encoded one at a time, and what is
    returned is joined along the batch, whatever its structure. The first batch is also encoded as the pipeline does it;
    where the two differ (embeddings padded to the longest prompt, say) nothing is remembered and all works as before.

    Attributes:
        encoders: :func:`.hashes.extracts` of the networks that embeddings may depend on.
        released: text encoders that were taken out of the pipeline.
    """

    def __init__(self, pipe: Any, folder: Path, left_out: Mapping[str, bytes]) -> None:
        self.pipe, self.folder, self.left_out = pipe, folder, left_out
        others = {*denoisers(pipe)} | {name for name, part in pipe.components.items() if hasattr(part, "decode")}
        self.encoders: dict[str, bytes] = {**extracts(pipe, others), **left_out}
        self.key = digest([type(pipe).__name__, {k: hashlib.sha256(v).hexdigest() for k, v in self.encoders.items()}])
        self.encode = pipe.encode_prompt
        self.signature = inspect.signature(self.encode)
        self.works, self.checked = True, bool(left_out)  # which are left out where all this was found to work
        self.released: dict[str, nn.Module] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        prompts = bound.arguments.get("prompt")
        if not self.works or not isinstance(prompts, (str, list)) or not all(map(_is_plain, bound.arguments.values())):
            return self._plain(bound)
        device = bound.arguments.get("device") or self.pipe._execution_device
        count, plain = len(prompts) if isinstance(prompts, list) else 1, None
        try:
            joined = _join([self._one(bound, i, count) for i in range(count)], device)
            if not self.checked and count > 1:
                plain = self._plain(bound)
                if not _same(joined, plain):
                    raise _CannotJoin("a batch's embeddings differ from its prompts' own")
                self.checked = True
        except _CannotJoin as reason:
            warnings.warn(
                f"{type(self.pipe).__name__}'s prompts are encoded anew in every call: {reason}.", stacklevel=2
            )
            self.works = False
            # Not a second time: Z-Image writes its template into the list of prompts it is given.
            return self._plain(bound) if plain is None else plain
        return joined

    def fill(self, inputs: Inputs, call: Mapping[str, Any], batch_size: int, alone: bool = False) -> None:
        """Encode all prompts now, the processes in turn, by running the pipeline up to its first denoiser call.

        Args:
            alone: the other processes do not.
        """
        size = max(2, batch_size)  # one prompt does not tell how a batch is encoded
        starts = range(0, len(inputs), size)
        turns = [(j, True) for j in range(len(starts))] if alone else in_turn(len(starts))
        for j, _ in tqdm(turns, "prompts", disable=not is_main()):
            if self.works:
                own = inputs[starts[j] : starts[j] + size]
                with torch.no_grad(), left_at_first_call(self.pipe):
                    sample(self.pipe, self.pipe.scheduler, 1, own, range(len(own)), call)
        if not alone:
            wait()

    def release(self) -> None:
        """Take the text encoders out of the pipeline; a prompt that was never seen brings them back."""
        if not (self.works and self.checked):
            return
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                # Not through the pipeline's own __setattr__, which would forget what class belongs here.
                self.released[name], self.pipe.__dict__[name] = _moved(part, torch.device("cpu")), None

    def bring_back(self) -> None:
        """Undo :meth:`release`."""
        while self.released:
            name, part = self.released.popitem()
            self.pipe.__dict__[name] = _moved(part, place(self.pipe))

    def _plain(self, bound: inspect.BoundArguments) -> Any:
        if self.left_out:
            raise RuntimeError(
                f"The prompt {bound.arguments.get('prompt')!r} was not among those encoded before {[*self.left_out]} "
                "went: set release_text_encoders to false."
            )
        self.bring_back()
        return self.encode(*bound.args, **bound.kwargs)

    def _one(self, bound: inspect.BoundArguments, i: int, count: int) -> Any:
        """What ``encode_prompt`` returns for the i-th prompt of a call alone."""
        # By name: Sana's complex_human_instruction is a list too, and its length can be the batch's.
        own = {
            k: [v[i]] if isinstance(v, list) and len(v) == count and k.startswith(_OF_EACH_PROMPT) else v
            for k, v in bound.arguments.items()
        }
        key = {k: v for k, v in own.items() if k != "device"}
        name = hashlib.sha256(json.dumps([self.key, key], sort_keys=True, default=str).encode()).hexdigest()
        file = self.folder / f"{name[:32]}.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                facts, tensors = opened.metadata() or {}, [opened.get_tensor(str(j)) for j in range(len(opened.keys()))]
            if facts["sha256"] == _checksum(facts["spec"], tensors):
                return _unpack(json.loads(facts["spec"]), tensors)
        except (OSError, SafetensorError, KeyError):
            pass  # not made yet, or damaged
        single = inspect.BoundArguments(self.signature, own)  # type: ignore[arg-type]
        tensors: list[Tensor] = []
        spec = _pack(self._plain(single), tensors)
        tensors, text = [t.cpu().contiguous().clone() for t in tensors], json.dumps(spec)
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"spec": text, "sha256": _checksum(text, tensors)}
        write_atomically(file, save({str(j): t for j, t in enumerate(tensors)}, facts))
        return _unpack(spec, tensors)


def _moved(part: nn.Module, device: torch.device) -> nn.Module:
    """It is there, unless hooks move it, or it is of a kind that stays where it is, as some that are quantised."""
    if not any(hooks_of(*part.modules())):
        with suppress(ValueError, NotImplementedError):
            part.to(device)
    return part


class _CannotJoin(Exception):
    """Embeddings of single prompts that do not make up a batch's."""


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    """The structure of what was returned, as JSON, its tensors apart."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise _CannotJoin(f"it returns a {type(value).__name__}")


def _unpack(spec: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
    ((kind, value),) = spec.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "value":
        return value
    return (tuple if kind == "tuple" else list)(_unpack(v, tensors) for v in value)


def _join(parts: Sequence[Any], device: Any) -> Any:
    """One value a prompt to a value for all: batches are concatenated, what no batch has must be the same in all."""
    first = parts[0]
    if isinstance(first, Tensor):
        if any(p.shape != first.shape for p in parts):
            raise _CannotJoin("their lengths differ")
        if first.shape[:1] == (1,):
            return torch.cat(list(parts)).to(device)
        if all(torch.equal(p, first) for p in parts):
            return first.to(device)
        raise _CannotJoin("they have no batch dimension")
    if isinstance(first, tuple):
        return tuple(_join(column, device) for column in zip(*parts))
    if isinstance(first, list):
        return [v.to(device) if isinstance(v, Tensor) else v for part in parts for v in part]
    if any(p != first for p in parts):
        raise _CannotJoin(f"they are {parts[:2]}")
    return first


def _same(a: Any, b: Any) -> bool:
    """Equal up to the rounding that another batch size brings."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        scale = b.detach().float().abs().max().clamp(min=1e-6) if b.numel() else 1.0
        return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= 2e-2 * scale).all())
    if isinstance(a, (tuple, list)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b


def _is_plain(value: Any) -> bool:
    """Whether its text says all: embeddings or images given by the caller do not."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _checksum(spec: str, tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(spec.encode())
    for tensor in tensors:
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
