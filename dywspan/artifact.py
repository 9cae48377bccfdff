"""The artefact: solver tables as a page of JSON inside ``scheduler_config.json``.

    "tables": {"5": {"weights": [[1.0], [1.4, -0.4], ...], "time_scale": [...], "grid": {...}, "afs": false,
                     "provenance": {...}}}

Keyed by ``num_inference_steps``. Row i of ``weights`` lists min(i + 1, K) numbers, newest derivative first.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from .core.check import MAX_STEPS, shown, whole
from .core.continuous import HIGHEST_ORDER, Continuous, ContinuousLift, ContinuousTable, names
from .core.operator import Lift
from .core.table import SolverTable
from .core.time_lift import TimeLift
from .version import __version__

T = TypeVar("T")

LARGEST = 1e6  # weight, time scale, alpha or beta: float32 overflows of larger ones in a few steps
_OPTIONAL = {"time_scale", "afs", "time_shifting", "provenance", "convention"}
_SHOWN = (3, 5, 8, 15)  # numbers of steps, of a solver that has all
_KEYS = {"weights", "grid"} | _OPTIONAL


def table_to_json(table: SolverTable) -> dict[str, Any]:
    """The JSON form of a table; floats survive bit for bit."""
    rows = table.weights.detach().double().tolist()
    return {
        "weights": [row[: i + 1] for i, row in enumerate(rows)],
        "time_scale": table.time_scale.detach().double().tolist(),
        "grid": dict(table.grid),
        "afs": table.afs,
        **({} if table.time_shifting else {"time_shifting": False}),
        **({} if table.convention is None else {"convention": table.convention}),
        "provenance": dict(table.provenance),
    }


def table_from_json(data: Mapping[str, Any]) -> SolverTable:
    """Read one table.

    Raises:
        ValueError: missing keys, ragged in another way than row i having min(i + 1, K) numbers, or anything that
            :class:`SolverTable` refuses.
    """
    if not isinstance(data, Mapping) or not data.keys() >= _KEYS - _OPTIONAL:
        raise ValueError("a table is a mapping with at least 'weights' and 'grid'")
    _warn_of_unknown(data, _KEYS, "Solver table")
    rows = data["weights"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise ValueError("weights must be a non-empty list of non-empty rows")
    whole("number of weights rows", len(rows), 1, MAX_STEPS)
    order = max(map(len, rows))
    weights = torch.zeros(len(rows), order, dtype=torch.float64)
    for i, row in enumerate(rows):
        if len(row) != min(i + 1, order):
            raise ValueError(f"weights row {i} must have {min(i + 1, order)} numbers (K = {order}); it has {len(row)}")
        weights[i, : len(row)] = _numbers(row, f"weights row {i}")
    scale = _numbers(data.get("time_scale", [1.0] * len(rows)), "time_scale")
    weights, scale = _bounded(weights, "weights"), _bounded(scale, "time_scale")
    flags = {"afs": data.get("afs", False), "time_shifting": data.get("time_shifting", True)}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false; got {shown(value)}")
    own = {"provenance": _provenance(data), "convention": data.get("convention")}
    return SolverTable(weights, scale, data["grid"], **flags, **own)


def read_tables(tables: Mapping[str, Any] | None) -> dict[int, SolverTable]:
    """All tables of an artefact, keyed by ``num_inference_steps``; errors name the table."""
    if not isinstance(tables, Mapping | None):
        raise ValueError(f"tables must map numbers of steps to tables; got a {type(tables).__name__}.")
    result = {}
    for key, data in (tables or {}).items():
        try:
            table = table_from_json(data)
            if not isinstance(key, (str, int)) or str(table.num_inference_steps) != f"{key}":
                raise ValueError(f"it holds a table for {table.num_inference_steps} network evaluations")
        except (ValueError, TypeError, OverflowError) as error:
            raise _damaged(f'solver table "{_key(key)}"', error) from error
        result[table.num_inference_steps] = table
    return result


def continuous_to_json(function: ContinuousTable | ContinuousLift) -> dict[str, Any]:
    """The JSON form of a continuous table or lift; columns are ``features``."""
    own = {f.name: getattr(function, f.name) for f in fields(function) if f.name != "coefficients"}
    rest = {k: dict(v) if isinstance(v, Mapping) else v for k, v in own.items() if v is not None}
    features = list(names(function.guidance_scale))
    return {"coefficients": function.coefficients.detach().double().tolist(), "features": features, **rest}


def read_continuous(data: Mapping[str, Any] | None, kind: type[Continuous] = ContinuousTable) -> Continuous | None:
    """Read a continuous table or lift.

    Raises:
        ValueError: missing keys, features this version does not know, or anything ``kind`` refuses.
    """
    if data is None:
        return None
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    needed = [f.name for f in fields(kind) if f.name not in optional]
    what = f"continuous {kind.__name__.removeprefix('Continuous').lower()}"
    try:
        if not isinstance(data, Mapping) or not data.keys() >= {*needed}:
            raise ValueError(f"it is a mapping with at least {' and '.join(map(repr, needed))}")
        _warn_of_unknown(data, {*needed, *optional, "features"}, what.capitalize())
        known = list(names(data.get("guidance_scale")))
        if data.get("features", known) != known:
            raise ValueError(f"its features are {shown(data['features'])}, this version's {known}: upgrade dywspan")
        rows = data["coefficients"]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ValueError("coefficients must be a list of rows")
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"coefficients must be rows of the same length; they have {shown([len(r) for r in rows])}")
        whole("number of coefficients rows", len(rows), 1, HIGHEST_ORDER + 1)
        coefficients = torch.stack([_numbers(row, f"coefficients row {i}") for i, row in enumerate(rows)])
        own = {f.name: data[f.name] for f in fields(kind) if f.name in data}
        return kind(**{**own, "coefficients": coefficients, "provenance": _provenance(data)})
    except (ValueError, TypeError, OverflowError) as error:
        raise _damaged(what, error) from error


def shown_tables(scheduler: Any) -> dict[int, SolverTable]:
    """The scheduler's tables, or some that its continuous one writes."""
    if scheduler.tables or scheduler.continuous is None:
        return scheduler.tables
    counts = sorted(getattr(scheduler, "lifts", ())) or _SHOWN
    return {n: scheduler.continuous.table(n, scheduler.host.prediction) for n in counts}


def table_of(scheduler: Any, steps: int) -> SolverTable:
    """The scheduler's learned table for a number of steps.

    Raises:
        ValueError: it has none; names those that it has.
    """
    if steps in scheduler.tables:
        return scheduler.tables[steps]
    if scheduler.continuous is None:
        known = f"learned for {sorted(scheduler.tables)} steps" if scheduler.tables else "a classical solver"
        raise ValueError(f"This solver has no learned table for {steps} steps: it is {known}.")
    return scheduler.continuous.table(steps, scheduler.host.prediction)


def for_every_count(scheduler: Any) -> ContinuousTable | ContinuousLift | None:
    """What a scheduler holds for every number of steps, if it was not learned for some only."""
    return getattr(scheduler, "continuous_lift" if hasattr(scheduler, "lifts") else "continuous", None)


def provenances(scheduler: Any) -> dict[int | str, Mapping[str, Any]]:
    """Where the solver of each number of steps comes from that was learned or, for a continuous one, learned from.

    By number of steps, or where there are several guidance scales by "5 @ 7.5", and late starts by "3/5". Of what was
    learned on something else that was learned, the last: a SpanLift on a table, a TimeLift on either, or a SpanLift on
    a TimeLift, which its provenance says.
    """
    own, function = dict(getattr(scheduler, "lifts", scheduler.tables)), for_every_count(scheduler)
    own |= {n: t for n, t in scheduler.time_lifts.items() if n not in own or not own[n].provenance.get("on_time_lift")}
    shared = function.provenance if function is not None else {}
    kinds = [kind for kind in ("held_out_error", "test_error") if kind in shared]
    made = {
        int(name) if name.isdigit() else name: {
            **shared,
            **{kind: shared[kind][name] for kind in kinds if name in shared[kind]},
        }
        for name in shared.get("held_out_error", {})
    }
    return dict(sorted((made | {n: part.provenance for n, part in own.items()}).items(), key=lambda m: steps_of(m[0])))


def steps_of(name: int | str) -> int:
    """The number of steps in 5 or "5 @ 7.5", and of the whole way in "3/5"."""
    return int(str(name).partition(" @ ")[0].rpartition("/")[2])


def lift_to_json(lift: Lift) -> dict[str, Any]:
    """The JSON form of SpanLift's scalars."""
    values = {name: getattr(lift, name).detach().double().tolist() for name in ("alpha", "beta")}
    return {**values, "operator": lift.operator, "provenance": dict(lift.provenance)}


def read_lifts(lifts: Mapping[str, Any] | None) -> dict[int, Lift]:
    """SpanLift's scalars, keyed by ``num_inference_steps``; errors name the entry."""

    def read(data: Any) -> Lift:
        if not isinstance(data, Mapping) or not data.keys() >= {"alpha", "beta"}:
            raise ValueError("it is a mapping with at least 'alpha' and 'beta'")
        _warn_of_unknown(data, {"alpha", "beta", "operator", "provenance"}, "SpanLift entry")
        alpha, beta = (_bounded(_numbers(data[name], name), name) for name in ("alpha", "beta"))
        return Lift(alpha, beta, data.get("operator", "shared"), _provenance(data))

    return _entries(lifts, "lifts", "SpanLift", read)


def time_lifts_to_json(lifts: Mapping[int, TimeLift]) -> dict[str, Any] | None:
    """The JSON form of time lifts, whose offsets are in a file of their own."""
    return {str(n): {"provenance": dict(lift.provenance)} for n, lift in sorted(lifts.items())} or None


def read_time_lifts(lifts: Mapping[str, Any] | None) -> dict[int, TimeLift]:
    """Time lifts without their offsets, keyed by ``num_inference_steps``; errors name the entry."""

    def read(data: Any) -> TimeLift:
        if not isinstance(data, Mapping):
            raise ValueError("it is a mapping")
        _warn_of_unknown(data, {"provenance"}, "TimeLift entry")
        return TimeLift(provenance=_provenance(data))

    return _entries(lifts, "time_lifts", "TimeLift", read)


def _entries(entries: Mapping[str, Any] | None, setting: str, kind: str, read: Callable[[Any], T]) -> dict[int, T]:
    """What ``read`` makes of each entry of a setting, keyed by number of steps; errors name the entry."""
    if not isinstance(entries, Mapping | None):
        raise ValueError(f"{setting} must map numbers of steps to {kind} entries; got a {type(entries).__name__}.")
    result = {}
    for key, data in (entries or {}).items():
        try:
            entry = read(data)
            result[_count(key)] = entry
        except (ValueError, TypeError) as error:
            raise _damaged(f'{kind} entry "{_key(key)}"', error) from error
    return result


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it."""
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Each file atomically, and all in one moment: none before the last is on the disk."""
    partials = {path: Path(f"{os.fspath(path)}.{os.getpid()}.tmp") for path in files}
    path: str | os.PathLike[str] = ""
    try:
        for path, partial in partials.items():
            partial.write_bytes(files[path])
        for path, partial in partials.items():
            os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # write(2) does not say where
            error.filename = os.fspath(path)
        raise
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def warn_if_newer(version: str | None) -> None:
    """A file written by a later release may mean something this one does not know.

    Raises:
        ValueError: it is no version.
    """
    if version is None:  # files of the first releases
        return
    try:
        newer = release(version) > release(__version__)
    except (TypeError, ValueError) as error:
        raise ValueError(f"dywspan_version={shown(version)} must be a text such as {__version__!r}.") from error
    if newer:
        warnings.warn(
            f"This solver was written by dywspan {version}, newer than the installed {__version__}. "
            "If it fails or looks wrong, upgrade: pip install -U dywspan.",
            stacklevel=3,
        )


def compact(text: str) -> str:
    """Put every innermost list of numbers of an indented JSON text on one line, so that a table reads as one."""
    # The line break after the bracket tells a list from a text that looks like one: JSON texts have none.
    return re.sub(r"\[\n[\d\s.,eE+-]*\]", lambda m: json.dumps(json.loads(m[0])), text)


def release(version: str) -> tuple[int, ...]:
    """(major, minor, patch) of a version string.

    Raises:
        ValueError: it does not begin with one.
    """
    found = re.match(r"\d{1,9}(\.\d{1,9}){0,2}(?!\d)", version)
    if found is None or len(version) > 64:
        raise ValueError(f"{shown(version)} is no version")
    return tuple(map(int, found[0].split(".")))


def _provenance(data: Mapping[str, Any]) -> Mapping[str, Any]:
    found = data.get("provenance", {})
    if not isinstance(found, Mapping | None):
        raise ValueError(f"provenance must be a mapping; got {shown(found)}")
    return found or {}


def _numbers(values: Any, name: str) -> torch.Tensor:
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must hold numbers only; got {shown(values)}")
    try:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)
    except OverflowError as error:
        raise ValueError(f"{name} holds a number that is too large; got {shown(values)}") from error


def _bounded(values: torch.Tensor, name: str) -> torch.Tensor:
    if bool((values.abs() > LARGEST).any()) and bool(values.isfinite().all()):
        raise ValueError(f"{name} must be at most {LARGEST:g} in size; got {shown(values.tolist())}")
    return values


def _count(key: Any) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", f"{key}" if isinstance(key, (str, int)) else "") or int(key) > MAX_STEPS:
        raise ValueError(f"the key must be a number of steps from 1 to {MAX_STEPS}")
    return int(key)


def _key(key: Any) -> str:
    return key if isinstance(key, str) and len(key) <= 40 else shown(key)


def _damaged(what: str, error: Exception) -> ValueError:
    return ValueError(f"Damaged {what}: {str(error).rstrip('.')}. Download or distil it again.")


def _warn_of_unknown(data: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(map(str, data.keys() - known)):
        warnings.warn(
            f"{what} has keys this version does not know: {unknown}. They are ignored; "
            "if results look wrong, upgrade: pip install -U dywspan.",
            stacklevel=3,
        )
