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

from ..artifact import write_atomically
from .hashes import checksum, digest, fingerprint
from .processes import in_turn, is_main, wait
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

    def make(positions: Sequence[int]) -> Pairs:
        own, seeds = [inputs[p % len(inputs)] for p in positions], [first_seed + p for p in positions]
        return Pairs(own, seeds, teacher.endpoints(pipe, own, seeds, call))

    return make


class Rows:
    """Rows of tensors that lie in files of ``size`` rows each, read when asked for."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        rows = []
        for i in indices:
            with safe_open(self.files[i // self.size], "pt") as file:
                rows.append(file.get_slice("targets")[i % self.size])
        return torch.stack(rows)


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
) -> Pairs:
    """The teacher's endpoints, from ``cache`` where the same were made before, shared out over the processes.

    The cache has one folder for each (model, call, teacher) and in it one file a batch, named by a hash of the batch's
    inputs and seeds: a run that was stopped goes on where it was, and a longer list reuses what a shorter one made. A
    file that cannot be read, or whose contents are not what was written, is made again.

    Args:
        call: arguments of the pipeline's call (guidance_scale, height, width, ...), the same for teacher and student.
        model: what stands for the pipeline in the hash; :func:`fingerprint` of its weights by default.

    Raises:
        OSError: the cache cannot be written; what is finished stays.
    """
    batches = [slice(i, i + batch_size) for i in range(0, len(seeds), batch_size)]
    title, is_path = f"teacher, {teacher.num_inference_steps} steps", bool(teacher.substeps)
    if cache is None:
        made = [
            teacher.endpoints(pipe, inputs[part], seeds[part], call)
            for part in tqdm(batches, title, disable=not is_main())
        ]
        return Pairs(inputs, seeds, torch.cat(made), is_path)

    key = {"model": model or fingerprint(pipe), "pipeline": type(pipe).__name__, "call": dict(call)}
    key |= {"teacher": teacher.describe()}
    folder = Path(cache) / digest(key)
    digests = [digest([list(inputs[part]), list(seeds[part])]) for part in batches]
    files = [folder / f"{digest}.safetensors" for digest in digests]
    missing = [j for j, file in enumerate(files) if not _is_whole(file)]
    wait()  # before anybody writes: all processes must find the same files missing
    try:
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "key.json", (json.dumps(key, indent=1, default=str) + "\n").encode())
        wait()
        done = len(files) - len(missing)
        shown = {"initial": done, "desc": title, "disable": not missing or not is_main()}
        with tqdm(total=len(files), **shown) as progress:
            for turn, is_mine in in_turn(len(missing)):
                j = missing[turn]
                targets = teacher.endpoints(pipe, inputs[batches[j]], seeds[batches[j]], call).contiguous()
                if is_mine:
                    write_atomically(files[j], save({"targets": targets}, metadata={"sha256": checksum(targets)}))
                progress.update(min(len(missing), turn + 1) + done - progress.n)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        kept = sum(file.exists() for file in files)
        raise OSError(
            f"The teacher cache {folder} cannot be written ({error.strerror}): {kept} of {len(files)} files are kept. "
            "Make room, or choose another cache directory, and run the same command again."
        ) from error
    wait()
    if lost := [file for file in files if not file.exists()]:
        raise OSError(
            f"{lost[0]} was made by another process but is not here: the cache must be on a file system that all "
            "machines share. Choose another cache directory."
        )
    return Pairs(inputs, seeds, Rows(files, batch_size), is_path)


def _is_whole(file: Path) -> bool:
    """Whether a file of the cache holds what was written; says so if it is there and does not."""
    if not file.exists():
        return False
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("sha256") == checksum(opened.get_tensor("targets")):
                return True
    except (SafetensorError, OSError, KeyError):
        pass
    if is_main():
        print(f"{file} is damaged: it is made again.")
    return False
