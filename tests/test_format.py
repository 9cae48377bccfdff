"""docs/format.md, its schema and its golden vectors say what dywspan reads and does; the numpy reader does the same."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import jsonschema
import numpy as np
import pytest

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.core.bases import BASES, multistep
from dywspan.core.continuous import FEATURES, HIGHEST_ORDER
from dywspan.core.grid import GRIDS, RANGES
from dywspan.core.layout import LAYOUTS
from dywspan.core.operator import OPERATORS
from dywspan.core.prediction import PREDICTIONS
from dywspan.core.table import SolverTable
from dywspan.schedulers.sources import ContinuousSource

ROOT = Path(__file__).parent.parent
READER = ROOT / "examples" / "comfyui_dywspan" / "read_table.py"
SCHEMA = json.loads((ROOT / "docs" / "format.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = sorted(path.parent.name for path in ROOT.glob("examples/*/scheduler_config.json"))
GOLDEN = json.loads(golden.FILE.read_text())
TABLES = [name for name, case in GOLDEN["cases"].items() if "tables" in case["config"]]


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "examples" / name / "scheduler_config.json").read_text())


def reader() -> Any:
    spec = importlib.util.spec_from_file_location("read_table", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------- the schema


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_artefact_is_valid(name: str) -> None:
    VALIDATOR.validate(read(name))


def test_what_dywspan_saves_is_valid(tmp_path: Path) -> None:
    DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-flow-timelift").save_pretrained(tmp_path / "time")
    SpanLiftScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-any-lift").save_pretrained(tmp_path / "lift")
    DyWeightScheduler(solver="dpmpp", grid={"name": "logsnr", "sigma_min": 0.1, "sigma_max": 9.0}).save_pretrained(
        tmp_path / "classical"
    )
    for name in ("time", "lift", "classical"):
        VALIDATOR.validate(json.loads((tmp_path / name / "scheduler_config.json").read_text()))


DAMAGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no prediction_type": ("emoji-sd-solvers", lambda c: c.pop("prediction_type")),
    "another class": ("emoji-sd-solvers", lambda c: c.update(_class_name="DDIMScheduler")),
    "no such solver": ("emoji-sd-solvers", lambda c: c.update(solver="rk4")),
    "a key that is no number of steps": ("emoji-sd-solvers", lambda c: c["tables"].update({"05": c["tables"]["5"]})),
    "a table without a grid": ("emoji-sd-solvers", lambda c: c["tables"]["5"].pop("grid")),
    "a table with an unknown key": ("emoji-sd-solvers", lambda c: c["tables"]["5"].update(shift=1)),
    "an empty row": ("emoji-sd-solvers", lambda c: c["tables"]["5"]["weights"].append([])),
    "a weight that is a text": ("emoji-sd-solvers", lambda c: c["tables"]["5"]["weights"][0].append("1")),
    "a weight that is too large": ("emoji-sd-solvers", lambda c: c["tables"]["5"]["weights"][0].append(1e7)),
    "a scale of zero": ("emoji-sd-solvers", lambda c: c["tables"]["5"]["time_scale"].append(0)),
    "afs as a number": ("emoji-sd-solvers", lambda c: c["tables"]["5"].update(afs=1)),
    "no such convention": ("emoji-sd-solvers", lambda c: c["tables"]["5"].update(convention="ve")),
    "no such grid": ("emoji-sd-solvers", lambda c: c["tables"]["5"].update(grid={"name": "cosine"})),
    "a grid with a parameter of another": ("emoji-flow-solvers", lambda c: c["tables"]["5"]["grid"].update(rho=7)),
    "levels below zero": ("emoji-sd-solvers", lambda c: c["tables"]["5"].update(grid={"sigmas": [1.0, -0.1]})),
    "a function on listed levels": ("emoji-sd-any-steps", lambda c: c["continuous"].update(grid={"sigmas": [1, 0]})),
    "a base of two stages": ("emoji-sd-any-steps", lambda c: c["continuous"].update(base="heun")),
    "coefficients of too few features": ("emoji-sd-any-steps", lambda c: c["continuous"]["coefficients"][0].pop()),
    "lifts of a class without": ("emoji-sd-solvers", lambda c: c.update(lifts={})),
    "lifts without an operator": ("emoji-sd-spanlift", lambda c: c.update(operator=None)),
    "a lift without beta": ("emoji-sd-spanlift", lambda c: c["lifts"]["3"].pop("beta")),
    "an operator's even kernel": ("emoji-sd-spanlift", lambda c: c["operator"].update(kernel=4)),
    "no such layout": ("emoji-sd-spanlift", lambda c: c.update(layout="bchw")),
    "no digest": ("emoji-sd-spanlift", lambda c: c.update(weights_sha256="none")),
    "a time lift with numbers": ("emoji-sd-timelift", lambda c: c["time_lifts"]["3"].update(offsets=[1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_schema_refuses(damage: str) -> None:
    name, change = DAMAGES[damage]
    config = read(name)
    change(config)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(config)


def test_the_schema_has_what_the_registries_have() -> None:
    own, defs = SCHEMA["properties"], SCHEMA["$defs"]
    settings = set(inspect.signature(SpanLiftScheduler.__init__).parameters) - {"self", "args", "base"}
    assert {*own} == settings | {"_class_name", "_diffusers_version"}
    forbidden = SCHEMA["allOf"][0]["then"]["properties"]
    assert {*forbidden} == settings - set(inspect.signature(DyWeightScheduler.__init__).parameters)
    assert {*own["prediction_type"]["enum"]} == {*PREDICTIONS} - {"edm"}  # EDM is known by its scheduler
    assert {*defs["convention"]["enum"]} == {p.convention for p in PREDICTIONS.values()}
    assert {*own["solver"]["enum"]} == {None, *BASES} and {*own["layout"]["enum"]} == {*LAYOUTS}
    assert {*defs["continuous_table"]["properties"]["base"]["enum"]} == {*multistep()}
    assert own["solver_order"]["maximum"] == HIGHEST_ORDER == defs["coefficients"]["maxItems"] - 1
    assert tuple(item["const"] for item in defs["features"]["prefixItems"]) == FEATURES
    grids: dict[str, set[str]] = {}
    for option in defs["named_grid"]["oneOf"]:
        name = option["properties"]["name"]
        grids |= {n: {*option["properties"]} - {"name"} for n in name.get("enum", [name.get("const")])}
        for parameter in option["properties"].keys() - {"name"}:
            rule = option["properties"][parameter]
            rule = defs[rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
            assert (rule["minimum"], rule["maximum"]) == RANGES[parameter]
    parameters = {n: set(inspect.signature(g).parameters) - {"n", "prediction"} for n, g in GRIDS.items()}
    assert grids == parameters
    ((kind, operator),) = OPERATORS.items()
    sizes = defs["operator"]["properties"]
    assert sizes["kind"]["const"] == kind and {*sizes} == {"kind", *operator.limits}
    limits = {k: (v["minimum"], v["maximum"]) for k, v in sizes.items() if "minimum" in v}
    assert limits == {k: v for k, v in operator.limits.items() if k != "kernel"}
    assert sizes["kernel"]["enum"] == list(range(operator.limits["kernel"][0], operator.limits["kernel"][1] + 1, 2))


def test_the_document_names_every_field() -> None:
    text = (ROOT / "docs" / "format.md").read_text()

    def fields(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return set().union(*map(fields, schema))
        if not isinstance(schema, dict):
            return set()
        inner = {k: v for k, v in schema.items() if k != "if"}
        return {*schema.get("properties", {})} | set().union(set(), *(fields(v) for v in inner.values()))

    named = set(re.findall(r"`([^`\n]+)`", text))
    assert not {f for f in fields(SCHEMA) if f not in named}
    assert not {n for n in [*GRIDS, *LAYOUTS, *PREDICTIONS, *FEATURES] if n not in named}


# ---------------------------------------------------------------------------------------- the golden vectors


def close(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=tolerance, atol=tolerance)


def test_the_golden_vectors_are_what_dywspan_gives() -> None:
    made = golden.make()
    assert {**made, "cases": None} == {**GOLDEN, "cases": None} and made["cases"].keys() == GOLDEN["cases"].keys()
    for name, case in made["cases"].items():
        expected = GOLDEN["cases"][name]
        assert case.keys() == expected.keys()
        for key, value in case.items():
            if key in ("config", "steps", "mu", "begin"):
                assert value == expected[key]
            else:
                close(value, expected[key], 1e-10)


ALONE = """
import importlib.util, json, sys

blocked = ("torch", "dywspan", "diffusers", "safetensors", "huggingface_hub")
sys.modules.update(dict.fromkeys(blocked))  # importing one of these raises ImportError now
sys.dont_write_bytecode = True
import numpy as np

spec = importlib.util.spec_from_file_location("read_table", sys.argv[1])
reader = importlib.util.module_from_spec(spec)
sys.modules["read_table"] = reader
spec.loader.exec_module(reader)
golden = json.load(open(sys.argv[2]))
noise, mean, std = (np.array(v) for v in (golden["noise"], golden["data"]["mean"], golden["data"]["std"]))
results = {}
for name, case in golden["cases"].items():
    if "tables" not in case["config"]:
        continue
    solver, begin = reader.make_solver(case["config"], case["steps"], case.get("mu", 0.0)), case.get("begin", 0)

    def denoise(x, tau, t):
        alpha = 1 - tau if solver.flow else 1.0
        return mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + tau**2)

    start = solver.levels[begin]
    x = start * noise + bool(begin) * (1 - start if solver.flow else 1.0) * mean
    states = [x, *(x for x, _ in reader.run(solver, denoise, x, begin))]
    found = dict(levels=solver.levels, queries=solver.queries, times=solver.times, states=states)
    results[name] = {k: np.array(v).tolist() for k, v in found.items()}
assert not [m for m in sys.modules if m.split(".")[0] in blocked and sys.modules[m] is not None]
print(json.dumps(results))
"""


def test_numpy_alone_reproduces_the_golden_vectors() -> None:
    command = [sys.executable, "-c", ALONE, str(READER), str(golden.FILE)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [*found] == TABLES and len(TABLES) == 6
    for name, values in found.items():
        for key, value in values.items():
            close(value, GOLDEN["cases"][name][key], 1e-6)


def test_the_reader_is_less_than_a_hundred_lines() -> None:
    assert len(READER.read_text().splitlines()) < 100


# ---------------------------------------------------------------------------------------- the reader


def agrees(config: dict[str, Any], steps: int, mu: float | None = None) -> None:
    """The reader's numbers are the scheduler's."""
    scheduler = DyWeightScheduler.from_config({"_class_name": "DyWeightScheduler", **config})
    scheduler.set_timesteps(steps, mu=mu)
    assert scheduler.plan is not None
    schedule, solver = scheduler.plan.schedule, reader().make_solver(config, steps, mu or 0.0)
    close(solver.levels, schedule.levels, 1e-6)
    close(solver.queries, schedule.queries, 1e-6)
    close(solver.sizes[:, None] * solver.weights, schedule.increments, 1e-6)
    close(solver.times[solver.afs :], scheduler.timesteps, 1e-6)


@pytest.mark.parametrize("name", ["emoji-sd-solvers", "emoji-flow-solvers", "emoji-flow-any-steps"])
def test_the_reader_follows_every_shipped_table(name: str) -> None:
    config = read(name)
    for n in config["tables"]:
        agrees(config, int(n), mu=0.4 if "flow" in name else None)


WEIGHTS = {"weights": [[0.9], [1.4, -0.3], [1.2, -0.1]], "time_scale": [0.9, 1.1, 1.0]}
RANGE = {"sigma_min": 0.05, "sigma_max": 12.0}
EPSILON = golden.STABLE_DIFFUSION | {"prediction_type": "epsilon"}
FLOW = {"host_scheduler": "FlowMatchEulerDiscreteScheduler", "prediction_type": "flow_prediction"}
FLOW |= {"num_train_timesteps": 1000}
GRID_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logsnr": (EPSILON, {"name": "logsnr", **RANGE}),
    "polynomial": (EPSILON, {"name": "polynomial", **RANGE, "rho": 5.0}),
    "discrete, linear betas": (EPSILON | {"beta_schedule": "linear"}, {"name": "discrete", **RANGE}),
    "sigmas": (EPSILON, {"sigmas": [20.0, 5.0, 1.0, 0.0]}),
    "flow, shift": (FLOW, {"name": "flow", "shift": 3.0}),
    "flow, mu": (FLOW | {"invert_sigmas": True}, {"name": "flow", "mu": 0.7, "shift": None}),
    "flow, neither": (FLOW, {"name": "flow"}),
}


@pytest.mark.parametrize("case", GRID_CASES)
def test_the_reader_knows_the_grid(case: str) -> None:
    config, grid = GRID_CASES[case]
    agrees({**config, "tables": {"3": {**WEIGHTS, "grid": grid}}}, 3)


def test_the_reader_refuses_what_it_cannot_follow() -> None:
    make, table = reader().make_solver, {**WEIGHTS, "grid": {"name": "logsnr", **RANGE}}
    config = {**EPSILON, "tables": {"3": table}}
    for change, message in [
        ({"tables": {"4": table}}, r"no table for 3 steps; there are tables for \[4\]"),
        ({"lifts": {"3": {}}}, "operator or a TimeLift"),
        ({"continuous_lift": {"order": 2}}, "operator or a TimeLift"),
        ({"time_lifts": {"3": {}}}, "operator or a TimeLift"),
        ({"clip_sample": True}, "clips"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, "beta_schedule"),
        ({"tables": {"3": {**table, "convention": "flow"}}}, "'flow', not 'vp'"),
        ({"tables": {"3": {**table, "grid": {"name": "time_uniform", **RANGE}}}}, "time_uniform"),
    ]:
        with pytest.raises(ValueError, match=message):
            make({**copy.deepcopy(config), **change}, 3)


def test_functions_become_tables_that_the_reader_follows(tmp_path: Path) -> None:
    """The recipe of docs/format.md."""
    make = reader().make_solver
    for name, mu in [("emoji-sd-any-steps", None), ("emoji-flow-any-steps", 0.75)]:
        scheduler = DyWeightScheduler.from_pretrained(ROOT / "examples" / name)
        case = GOLDEN["cases"]["flow, continuous" if mu else "v-prediction, continuous"]
        tables: list[SolverTable] = []
        for n in (3, 7):
            scheduler.set_timesteps(n, mu=mu)
            assert isinstance(scheduler.source, ContinuousSource) and scheduler.request is not None
            tables.append(scheduler.source.table(scheduler.request))
        scheduler.with_tables(tables).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "scheduler_config.json").read_text())
        VALIDATOR.validate(config)
        for key in ("levels", "queries", "weights", "times"):
            close(getattr(make(config, 3), key), case[key], 1e-6)
        assert scheduler.plan is not None
        close(make(config, 7).queries, scheduler.plan.schedule.queries, 1e-6)
