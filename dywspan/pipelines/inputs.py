"""What each sample is made from: prompts, or other arguments of the pipeline's call, from files, datasets or a list."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from ..schedulers.bind import call_arguments, required_arguments
from .rollout import Inputs

# Sets of prompts that are known by name: the dataset, and its column. All have a split "train".
SETS = {
    "coco-captions": ("sentence-transformers/coco-captions", "caption1"),
    "drawbench": ("sayakpaul/drawbench", "Prompts"),
    "parti-prompts": ("nateraw/parti-prompts", "Prompt"),
    "stable-diffusion-prompts": ("Gustavosta/Stable-Diffusion-Prompts", "Prompt"),
}
OWN = "default"  # the list in this package


def read_inputs(
    source: str | Path | Sequence[Any] | None, column: str | None = None, split: str = "train", limit: int | None = None
) -> Inputs | None:
    """Each sample's own arguments, ``[{"prompt": ...}, ...]``; None where there is no source (unconditional models).

    Args:
        source: a list; a .txt file (a prompt a line); a .jsonl file (a text, or a mapping of arguments, a line); a .csv
            file; "default", the list in this package; a name of ``SETS``, of which each text is read once; or what
            ``datasets.load_dataset`` takes.
        column: of a mapping, CSV file or dataset, that holds the prompt.
        split: of a dataset.
        limit: read no more than these.

    Raises:
        ValueError: nothing in it, no such column, a kind of file that is not read, or rows with different arguments.
        OSError: no such file or dataset.
    """
    if source is None:
        return None
    rows: Iterable[Any]
    if source == OWN and not Path(OWN).exists():
        rows = (resources.files("dywspan") / "data" / "prompts.txt").read_text("utf-8").splitlines()
    elif isinstance(source, str) and source in SETS and not Path(source).exists():
        name, own = SETS[source]
        column = column or own
        rows = _once(_rows(name, split, column), column)
    else:
        rows = _rows(source, split, column or "prompt")
    rows = list(islice(rows, limit))
    if not rows:
        raise ValueError(f"prompts={source!r} holds no prompts.")
    # Only a list or JSON names its arguments; elsewhere, other columns are nobody's business.
    names_arguments = not isinstance(source, (str, Path)) or Path(source).suffix.lower() == ".jsonl"
    return [_arguments(row, column if names_arguments else column or "prompt", source) for row in rows]


def _rows(source: Any, split: str, column: str) -> Iterable[Any]:
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if path.is_file():
        read = _READERS.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"prompts={source!r}: a file must be one of {sorted(_READERS)}, or a dataset's folder.")
        return read(path)
    if path.suffix.lower() in _READERS:
        raise FileNotFoundError(f"prompts={source!r}: there is no such file.")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"prompts={source!r} is no file, and reading a dataset needs `pip install datasets`; {OWN!r} needs nothing"
        ) from error
    try:
        data = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # of many kinds, none of which names the way out
        said = str(error).rstrip(". ")
        raise OSError(
            f"prompts={source!r} is neither a file nor a dataset with split {split!r}: {said}. Sets that are known by "
            f"name: {sorted([OWN, *SETS])}."
        ) from error
    names = data.column_names or []
    if column not in names:
        raise ValueError(f"Dataset {source!r} has no column {column!r}: set prompt_column to one of {sorted(names)}.")
    return ({column: value} for value in data[column])  # the other columns, images often, are not even read


def _once(rows: Iterable[Any], column: str) -> Iterable[Any]:
    """Without repeated texts, which would be learned from and held out at once."""
    seen: set[str] = set()
    for row in rows:
        if row[column] not in seen:
            seen.add(row[column])
            yield row


def _lines(path: Path) -> io.StringIO:
    # Spreadsheets begin their files with a mark.
    return io.StringIO(path.read_text(encoding="utf-8-sig"))


def _jsonl(path: Path) -> Iterable[Any]:
    for number, line in enumerate(_lines(path), 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".txt": lambda path: (line.strip() for line in _lines(path) if line.strip()),
    ".jsonl": _jsonl,
    ".csv": lambda path: csv.DictReader(_lines(path)),
}


def _arguments(row: Any, column: str | None, source: Any) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"prompts={source!r} must hold texts or mappings of arguments; got {row!r}.")
    if column is None:
        return row
    if column not in row:
        raise ValueError(f"prompts={source!r} has no column {column!r}: set prompt_column to one of {sorted(row)}.")
    return {"prompt": row[column]}


def lacks_text(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether a pipeline takes a text that this call does not have."""
    takes = "prompt" in required_arguments(pipe) or hasattr(pipe, "encode_prompt")
    return takes and "prompt" not in call


def check_call(pipe: Any, inputs: Inputs, call: Mapping[str, Any]) -> None:
    """The pipeline takes these arguments.

    Raises:
        ValueError: it does not; names those it takes.
    """
    known, needed = {*call_arguments(pipe)}, required_arguments(pipe)
    taken = {"num_inference_steps", "generator", "output_type", "return_dict", "batch_size"}
    given: Sequence[str] = sorted({*call, *(inputs[0] if inputs else ())})
    if unknown := [name for name in given if name not in known or name in taken]:
        possible = sorted(known - taken - {"self"})
        raise ValueError(f"{type(pipe).__name__} cannot be called with {unknown} here: it takes {possible}.")
    if missing := sorted(needed - taken - {*given}):
        raise ValueError(f"{type(pipe).__name__} needs {missing}: set prompts to a file, a dataset or a list of them.")
