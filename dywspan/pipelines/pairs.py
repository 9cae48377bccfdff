"""Teacher pairs: inputs and seeds with the endpoints a slow, accurate solver reaches from them."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..artifact import write_atomically, write_together
from .hashes import checksum, digest, fingerprint
from .memory import Parts, is_sharded
from .processes import agreed, in_turn, is_main, wait
from .rollout import Inputs
from .teacher import Teacher

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Pairs:
    """P samples: inputs, the seeds of their noise, and the teacher's endpoints.

    Attributes:
        inputs: each sample's own arguments of the pipeline's call.
        targets: (P, ...) float32, in memory or read from files when asked for.
        is_path: targets are (P, N, ...): the states of a path, the endpoint last.
    """

    inputs: Inputs
    seeds: Sequence[int]
    targets: Tensor | Rows
    is_path: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def endpoints(self) -> Tensor:
        """(P, ...) float32."""
        targets = self.targets if isinstance(self.targets, Tensor) else self.targets[range(len(self))]
        return targets[:, -1] if self.is_path else targets

    def choose(self, indices: Sequence[int]) -> Pairs:
        """These pairs, in this order, in memory."""
        inputs, seeds = [self.inputs[i] for i in indices], [self.seeds[i] for i in indices]
        targets = self.targets[list(indices)]
        return Pairs(inputs, seeds, targets, self.is_path)

    def __getitem__(self, part: slice) -> Pairs:
        return self.choose(range(*part.indices(len(self))))


def ends(paths: Pairs, steps: int, level: float) -> Pairs:
    """Pairs that start in the middle of teacher paths, this many steps before their end.

    Args:
        level: what a pipeline that is given latents multiplies them by, there: sigma, 1 for flow networks.
    """
    states = paths.targets[range(len(paths))]
    starts = (states[:, -steps - 1] / level).split(1)
    return Pairs([{**own, "latents": z} for own, z in zip(paths.inputs, starts)], paths.seeds, states[:, -1])


def common_path(wholes: Iterable[int], steps: int) -> tuple[int, int]:
    """N of a path on which all steps of these ways lie, and the substeps of each for it to take at least ``steps``."""
    common = math.lcm(*wholes)
    return common, -(-steps // common)


Source = Callable[[Sequence[int]], Pairs]  # positions in an endless stream of samples -> these


def shuffled(pairs: Pairs, seed: int) -> Source:
    """The pairs in an order of their own each time through. A position's pair depends on nothing else."""

    def choose(positions: Sequence[int]) -> Pairs:
        orders: dict[int, list[int]] = {}
        for epoch in {p // len(pairs) for p in positions}:
            draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(pairs), generator=draw).tolist()
        return pairs.choose([orders[p // len(pairs)][p % len(pairs)] for p in positions])

    return choose


def fresh(pipe: Any, teacher: Teacher, inputs: Inputs, first_seed: int, call: Mapping[str, Any]) -> Source:
    """New noise for every position, and the teacher's endpoint computed when it is asked for."""
    parts = Parts(None, "teacher samples", "micro_batch_size", sharded=is_sharded(pipe))

    def make(positions: Sequence[int]) -> Pairs:
        own, seeds = [inputs[p % len(inputs)] for p in positions], [first_seed + p for p in positions]
        return Pairs(own, seeds, torch.cat(parts.run(len(seeds), _endpoints(pipe, teacher, own, seeds, call))))

    return make


class Rows:
    """Tensors of one file each, read when asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([_read(self.files[i])[0] for i in indices])


def make_pairs(
    pipe: Any,
    teacher: Teacher,
    inputs: Inputs,
    seeds: Sequence[int],
    *,
    call: Mapping[str, Any],
    batch_size: int = 16,
    cache: str | os.PathLike[str] | None = None,
    model: str | None = None,
    setting: str = "teacher_batch_size",
) -> Pairs:
    """The teacher's endpoints, from ``cache`` where the same were made before, shared out over the processes.

    The cache has one folder for each (model, call, teacher) and in it one file a sample, named by a hash of its own
    inputs and seed: what is there is not computed again, whatever the batches, the order or the number of processes
    were. A file that cannot be read, or whose contents are not what was written, is made again.

    Args:
        call: arguments of the pipeline's call (guidance_scale, height, width, ...), the same for teacher and student.
        batch_size: samples computed at a time; fewer once memory does not suffice.
        model: what stands for the pipeline in the hash; :func:`fingerprint` of its weights by default.
        setting: what ``batch_size`` is called where it was set.

    Raises:
        OSError: the cache cannot be written; what is finished stays.
        torch.OutOfMemoryError: there is no room for one sample, or in a sharded network for a batch.
    """
    title, is_path = f"teacher, {teacher.num_inference_steps} steps", bool(teacher.substeps)
    parts = Parts(batch_size, "teacher samples", setting, sharded=is_sharded(pipe))
    endpoints = _endpoints(pipe, teacher, inputs, seeds, call)
    if cache is None:
        with tqdm(total=len(seeds), desc=title, disable=not is_main()) as progress:

            def shown(part: Sequence[int]) -> Tensor:
                targets = endpoints(part)
                progress.update(len(part))
                return targets

            return Pairs(inputs, seeds, torch.cat(parts.run(len(seeds), shown)), is_path)

    key = {"model": model or fingerprint(pipe), "pipeline": type(pipe).__name__, "call": dict(call)}
    key |= {"teacher": teacher.describe()}
    folder = Path(cache) / digest(key)
    files = [folder / f"{digest([own, seed])}.safetensors" for own, seed in zip(inputs, seeds, strict=True)]
    first = {file: i for i, file in reversed([*enumerate(files)])}  # of those that are the same
    missing = agreed([i for i in sorted(first.values()) if not _is_whole(files[i])] if is_main() else [])
    done, batches = len(first) - len(missing), range(0, len(missing), batch_size)
    try:
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "key.json", (json.dumps(key, indent=1, default=str) + "\n").encode())
        wait()
        options = {"initial": done, "desc": title, "disable": not missing or not is_main()}
        with tqdm(total=len(first), **options) as progress:
            for turn, is_mine in in_turn(len(batches)):

                def keep(part: Sequence[int], is_mine: bool = is_mine) -> None:
                    targets = endpoints(part)
                    if is_mine:  # a batch at once: one that is cut in two would round differently when it is repeated
                        write_together({files[i]: _packed(own) for i, own in zip(part, targets)})

                parts.run(missing[batches[turn] :][:batch_size], keep)
                progress.update(min(len(missing), (turn + 1) * batch_size) + done - progress.n)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        kept = sum(file.exists() for file in first)
        raise OSError(
            f"The teacher cache {folder} cannot be written ({error.strerror}): {kept} of {len(first)} files are kept. "
            "Make room, or choose another cache directory, and run the same command again."
        ) from error
    wait()
    if lost := [file for file in files if not file.exists()]:
        raise OSError(
            f"{lost[0]} was made by another process but is not here: the cache must be on a file system that all "
            "machines share. Choose another cache directory."
        )
    return Pairs(inputs, seeds, Rows(files), is_path)


def _endpoints(
    pipe: Any, teacher: Teacher, inputs: Inputs, seeds: Sequence[int], call: Mapping[str, Any]
) -> Callable[[Sequence[int]], Tensor]:
    return lambda part: teacher.endpoints(pipe, [inputs[i] for i in part], [seeds[i] for i in part], call)


def _packed(targets: Tensor) -> bytes:
    targets = targets.contiguous()
    return save({"targets": targets}, metadata={"sha256": checksum(targets)})


def _read(file: Path) -> tuple[Tensor, str | None]:
    """What a file holds, and the checksum that it should have."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("targets"), (opened.metadata() or {}).get("sha256")


def _is_whole(file: Path) -> bool:
    """Whether a file of the cache holds what was written; says so if it is there and does not."""
    if not file.exists():
        return False
    try:
        targets, expected = _read(file)
        if expected == checksum(targets):
            return True
    except (SafetensorError, OSError, KeyError):
        pass
    print(f"{file} is damaged: it is made again.")
    return False
