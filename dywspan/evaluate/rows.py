"""Rows of metrics, sample by sample, kept as they are made, so that a run can resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..artifact import write_atomically
from ..pipelines.hashes import digest
from ..pipelines.processes import in_turn, is_main, wait
from .statistics import Metric, Sample


def measure(
    keys: Sequence[str],
    make: Callable[[int], Sample],
    metrics: Sequence[Metric],
    folder: Path | None,
    title: str = "images",
) -> dict[str, Tensor]:
    """The rows of every metric, from files where they are, shared out over the processes by batches.

    A batch is one file for each metric: a run resumes to the same rows bit for bit, and
    a metric that is added samples again but measures only itself. A file that is damaged is made again.

    Args:
        keys: of each batch, what determines it.
        make: samples a batch, by its number.
        folder: of everything else that determines the samples; None to keep nothing.

    Returns:
        (N, D) float32 by metric, on the CPU.

    Raises:
        OSError: the folder cannot be written; what is finished stays.
    """
    found: dict[tuple[str, int], Tensor] = {}
    files: dict[tuple[str, int], Path] = {}
    if folder is not None:
        own = {m.name: folder / digest([m.name, m.facts]) for m in metrics}
        files = {(name, j): own[name] / f"{key}.safetensors" for name in own for j, key in enumerate(keys)}
    for place, file in files.items():
        if (rows := _read(file)) is not None:
            found[place] = rows
    missing = [j for j in range(len(keys)) if any((m.name, j) not in found for m in metrics)]
    wait()  # before anybody writes: all processes must find the same files missing
    turns = in_turn(len(missing)) if folder is not None else [(j, True) for j in range(len(missing))]
    with tqdm(
        total=len(keys), initial=len(keys) - len(missing), desc=title, disable=not missing or not is_main()
    ) as bar:
        for turn, is_mine in turns:
            j = missing[turn]
            batch = make(j)
            for m in metrics:
                if (m.name, j) in found:
                    continue
                rows = m.rows(batch).detach().float().cpu().contiguous()
                if bool(rows.isnan().any()):
                    raise ValueError(
                        f"{title}: {m.name} is no number on batch {j + 1} of {len(keys)}. Its samples are none, or a "
                        "decoder in float16 overflows: use a wider dtype, or leave this solver out."
                    )
                if folder is None:
                    found[m.name, j] = rows
                elif is_mine:
                    (file := files[m.name, j]).parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, save({"rows": rows}, metadata={"digest": digest(rows)}))
            bar.update(min(len(missing), turn + 1) + len(keys) - len(missing) - bar.n)
    wait()
    for place, file in files.items():
        if place not in found:
            if (rows := _read(file)) is None:
                raise OSError(
                    f"{file} was made by another process but is not here: the cache must be on a file system that all "
                    "machines share. Choose another cache directory."
                )
            found[place] = rows
    return {m.name: torch.cat([found[m.name, j] for j in range(len(keys))]) for m in metrics}


def _read(file: Path) -> Tensor | None:
    """The rows in a file, if it is whole."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            rows = opened.get_tensor("rows")
            if (opened.metadata() or {}).get("digest") == digest(rows):
                return rows
    except (SafetensorError, OSError):
        pass
    if is_main():
        print(f"{file} is damaged: it is made again.")
    return None
