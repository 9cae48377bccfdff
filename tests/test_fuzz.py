"""Damaged artefacts: whatever is wrong with a file, the solver works or the error says what is wrong, soon."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.core.prediction import EDM, Flow

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIG, WEIGHTS = "scheduler_config.json", SpanLiftScheduler.weights_name
SECONDS = 3.0
COUNTS = (3, 5)
Place = tuple[Any, ...]


@dataclass(frozen=True)
class Artefact:
    """Files of a solver, and a sample as its pipeline makes them."""

    config: dict[str, Any]
    weights: bytes | None
    sample: Tensor
    mu: float | None

    @property
    def kind(self) -> type[DyWeightScheduler]:
        return DyWeightScheduler if self.weights is None else SpanLiftScheduler


@dataclass(frozen=True)
class Mutant:
    """What the files hold instead, and how to say it."""

    what: str
    config: bytes | None
    weights: bytes | None


@pytest.fixture(scope="module")
def artefacts() -> dict[str, Artefact]:
    found: dict[str, Artefact] = {}
    image, tokens = (torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((1, 4, 16, 16), (1, 64, 16)))
    for name in ("sd-solvers", "sd-spanlift", "flow-spanlift", "sd-any-steps", "sd-any-lift"):
        folder = EXAMPLES / f"emoji-{name}"
        weights = (folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).exists() else None
        sample, mu = (tokens, 0.4) if name.startswith("flow") else (image, None)
        found[name] = Artefact(json.loads((folder / CONFIG).read_text()), weights, sample, mu)
    polynomial = {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    for name, host, tables in (
        (
            "afs",
            diffusers.EDMEulerScheduler(),
            [SolverTable.initial(n, 2, polynomial, EDM(), afs=True) for n in COUNTS],
        ),
        (
            "flow-grid",
            diffusers.FlowMatchEulerDiscreteScheduler(),
            [SolverTable.initial(n, 3, {"name": "flow", "shift": 3.0}, Flow(1000)) for n in COUNTS],
        ),
    ):
        made = DyWeightScheduler.from_config(host.config).with_tables(tables)
        found[name] = Artefact(json.loads(made.to_json_string()), None, image, None)
    return found


# ------------------------------------------------------------------ mutants

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1000, 10**7, -(2**63), 10**400, -(10**400), 0.5, -0.0, 5e-324, 1e-20, 1e20,
    1e308, -1e308, math.nan, math.inf, -math.inf, "", "a", "3", "é", "a.b", "nan", "9" * 5000, "euler", "flow",
    "DDIMScheduler", [], [0], [1.0], [1.0, 0.5, 0.0], [[1.0]], [None], [math.nan], [True], ["a"], {}, {"a": 1},
    {"name": "flow"}, {"sigmas": [1.0, 0.5, 0.0]}, [0.0] * 10**5, [[0.0] * 300] * 300, {str(i): i for i in range(3000)},
]  # fmt: skip


def places(node: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in a configuration, those in provenance apart."""
    if at:
        yield at
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key != "provenance":
            yield from places(value, (*at, key))


def general(place: Place) -> str:
    """The place without numbers of steps and positions: one class of mutants."""
    return ".".join("#" if isinstance(p, int) or p.isdigit() else p for p in place)


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} characters)"


def mutate_config(artefact: Artefact, rng: random.Random) -> Mutant:
    config, classes = copy.deepcopy(artefact.config), {}
    for place in places(config):
        classes.setdefault(general(place), []).append(place)
    *parents, last = place = rng.choice(classes[rng.choice(sorted(classes))])  # a long list is one class, not most
    node: Any = config
    for p in parents:
        node = node[p]
    more = ["insert"] if isinstance(node, list) else ["rename", "duplicate"]
    how, value = rng.choice(["drop", *more, *["replace"] * 7]), rng.choice(VALUES)
    if how == "drop":
        del node[last]
    elif how == "rename":
        node[rng.choice([f"{last}x", last[1:], last.upper(), f"{last} ", "9" * 5000])] = node.pop(last)
    elif how == "insert":
        node.insert(last, value)
    else:
        node[f"{last}@again" if how == "duplicate" else last] = value
    what = f"{how} {general(place)}" + (f" = {brief(value)}" if how not in ("drop", "rename") else "")
    return Mutant(what, json.dumps(config).replace('@again"', '"').encode(), artefact.weights)


def mutate_text(artefact: Artefact, rng: random.Random) -> Mutant:
    text = json.dumps({**artefact.config, "tables": None} if rng.random() < 0.5 else artefact.config).encode()
    at = rng.randrange(len(text))
    texts: dict[str, bytes | None] = {
        "empty": b"",
        "missing": None,
        "truncated": text[:at],
        "byte": text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
        "whole": json.dumps(rng.choice(VALUES)).encode(),
        "deep": text[:-1] + b', "deep": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "digits": text[:-1] + b', "order": ' + b"9" * 5000 + b"}",
    }
    how = rng.choice(sorted(texts))
    return Mutant(f"text {how}", texts[how], artefact.weights)


def mutate_weights(artefact: Artefact, rng: random.Random) -> Mutant:
    raw = artefact.weights
    if raw is None:
        return mutate_config(artefact, rng)
    sealed = rng.random() < 0.2
    config = artefact.config if sealed else {**artefact.config, "weights_sha256": None}
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:start]), raw[start:]
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    key = rng.choice(["dtype", "shape", "data_offsets"])
    value = rng.choice([*VALUES, "F16", "F64", "I64", [2**40], [0, 0], [0, 2**62], [-1, 3]])
    others = [f"{name}x", name.replace(".", "-"), "", "a.b", name.partition(".")[2]]
    renamed = {rng.choice(others) if k == name else k: v for k, v in header.items()}
    lengths = [0, 1, start - 7, start - 9, 2**31, 2**63, 2**64 - 1]
    files: dict[str, bytes | None] = {
        "empty": b"",
        "missing": None,
        "truncated": raw[: rng.choice([rng.randrange(len(raw)), 4, 8, start, len(raw) - 1])],
        "longer": raw + b"\0" * rng.choice([1, 4, 4096]),
        "length of header": struct.pack("<Q", rng.choice(lengths)) + raw[8:],
        "bytes of header": raw[:8] + _flipped(raw[8:start], rng) + data,
        "bytes of data": raw[:start] + _flipped(data, rng),
        f"{key} = {brief(value)}": _file({**header, name: {**header[name], key: value}}, data),
        "without one": _file({k: v for k, v in header.items() if k != name}, data),
        "renamed": _file(renamed, data),
    }
    how = rng.choice(list(files))
    return Mutant(f"weights{' (sealed)' * sealed} {how}", json.dumps(config).encode(), files[how])


def _file(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 100])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


KINDS: list[Callable[[Artefact, random.Random], Mutant]] = [mutate_config] * 8 + [mutate_text, mutate_weights]

# ------------------------------------------------------------------ what becomes of one

# What Python and torch say of an operation tried on the wrong thing: it tells no one what to mend.
UNHELPFUL = (
    "unsupported operand", "not supported between", "object is not", "has no attribute", "has no len",
    "not subscriptable", "not iterable", "unhashable", "unexpected keyword", "positional argument", "math domain",
    "index out of range", "must be real", "too many values", "not enough values", "to be a number",
    "invalid combination",
    "indices must be", "must be tuple of", "argument of type", "could not convert", "expected str", "must be int",
    "cannot be interpreted", "not 'NoneType'", "int too large", "size of tensor", "new(): ", "can't multiply",
    "arguments to be", "got an invalid", "argument '",
)  # fmt: skip


def run(artefact: Artefact, folder: Path) -> None:
    """Load it, and step through with a network that is smooth in the sample."""
    scheduler = artefact.kind.from_pretrained(folder)
    for n in COUNTS:
        try:
            scheduler.set_timesteps(n, mu=artefact.mu)
        except ValueError as error:
            if f"num_inference_steps={n}" not in str(error):
                raise
            continue  # the mutant took this number of steps away
        x = artefact.sample * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * torch.tanh(x), t, x).prev_sample
        if not bool(x.isfinite().all()):
            raise AssertionError("the result is not finite")


def failure(artefact: Artefact, mutant: Mutant, folder: Path) -> tuple[str, str] | None:
    """None, or the class of what went wrong and what it says."""
    for name, content in ((CONFIG, mutant.config), (WEIGHTS, mutant.weights)):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    start, found = time.perf_counter(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(artefact, folder)
    except Exception as error:
        message, kind = str(error), type(error).__name__
        first = message.partition("\n")[0]
        if not isinstance(error, (ValueError, TypeError, OSError)):
            found = f"{kind} {_where(error)}", message
        elif len(message) < 20 or (f"{WEIGHTS} is damaged" not in first and any(text in first for text in UNHELPFUL)):
            found = f"unhelpful {kind} {_where(error)}", message
        elif len(message) > 3000:
            found = f"{kind} of {len(message)} characters {_where(error)}", message
    taken = time.perf_counter() - start
    return (f"{taken:.0f} s, not {SECONDS}", f"{found}") if taken > SECONDS else found


def _where(error: BaseException) -> str:
    """The innermost function of ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/dywspan/" in f.filename]
    return f"in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "elsewhere"


def fuzz(artefacts: dict[str, Artefact], count: int, seed: int, folder: Path) -> str:
    """One line for each class of failures: how many, and the first."""
    rng, classes = random.Random(seed), {}
    for _ in range(count):
        name = rng.choice(sorted(artefacts))
        mutant = rng.choice(KINDS)(artefacts[name], rng)
        if (found := failure(artefacts[name], mutant, folder)) is not None:
            classes.setdefault(found[0], []).append(f"{name}: {mutant.what} -> {found[1][:120]!r}")
    ordered = sorted(classes.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"{len(found)} x {kind}: {found[0]}" for kind, found in ordered)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(50)
    yield
    diffusers.utils.logging.set_verbosity(level)


def test_whole_artefacts_work(artefacts: dict[str, Artefact], tmp_path: Path) -> None:
    for name, artefact in artefacts.items():
        whole = Mutant("whole", json.dumps(artefact.config).encode(), artefact.weights)
        assert failure(artefact, whole, tmp_path) is None, name


@pytest.mark.parametrize(
    ("count", "seed"), [(200, 0), pytest.param(10_000, 1, marks=[pytest.mark.slow, pytest.mark.weekly])]
)
def test_no_damage_goes_unsaid(artefacts: dict[str, Artefact], tmp_path: Path, count: int, seed: int) -> None:
    report = fuzz(artefacts, count, seed, tmp_path)
    if report:
        pytest.fail(f"Classes of failures, and the first of each:\n{report}", pytrace=False)
