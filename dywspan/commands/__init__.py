"""The commands of the command line: each imports what it needs once it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A line of help, and "module:function" of this package: the function gives a parser its options and ``run``.

    In place of the function, ``options`` may be commands of its own.
    """

    help: str
    options: str | Mapping[str, Command]


BENCH = {
    "overhead": Command("compare the cost of a step with diffusers' own schedulers", "bench:overhead_options"),
    "memory": Command("measure the memory that learning a solver takes", "bench:memory_options"),
    "train": Command("measure the cost of learning on random networks of real size", "bench:train_options"),
    "distill": Command(
        "compare optimizers by the network evaluations they take and the error they reach", "bench:learning_options"
    ),
    "tune": Command("compare a tuned solver with the best classical one", "bench:tune_options"),
    "table": Command(
        "print or draw the results in a JSON file, or compare them with an older file",
        "bench:table_options",
    ),
}
COMMANDS = {
    "demo": Command(
        "compare learned and classical solvers on an embedded pipeline: a table and pictures", "measure:demo_options"
    ),
    "tune": Command("learn a solver for a pipeline in minutes, without gradients", "learn:tune_options"),
    "distill": Command("learn a solver for a pipeline, with all settings", "learn:distill_options"),
    "inspect": Command("show what an artefact is for, how it was learned, and its numbers", "inspect:inspect_options"),
    "list": Command(
        "list artefacts in examples/, in the cache of the Hub, and in directories", "artefacts:list_options"
    ),
    "merge": Command("merge artefacts of one model into one", "artefacts:merge_options"),
    "convert": Command("convert published DyWeight solvers to an artefact", "artefacts:convert_options"),
    "convert-edm": Command(
        "convert a network that NVIDIA published with EDM to a pipeline", "artefacts:convert_edm_options"
    ),
    "push": Command("upload an artefact to the Hub", "artefacts:push_options"),
    "eval": Command("measure solvers, or a directory of images, by any metrics", "measure:evaluate_options"),
    "analyze": Command(
        "show what each step of a solver misses, and how much of it no weights reach", "analyze:options"
    ),
    "app": Command("compare solvers side by side in a browser", "app:app_options"),
    "bench": Command("measure overhead, memory and learning; print results", BENCH),
    "doctor": Command("show versions, devices, optional packages, and what can run here", "doctor:doctor_options"),
}
