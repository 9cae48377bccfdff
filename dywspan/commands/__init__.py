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
    "overhead": Command("time and memory of a solver's step beside diffusers' own", "bench:overhead_options"),
    "memory": Command("the memory that learning a solver takes", "bench:memory_options"),
    "train": Command("time and memory of learning on networks of real size with random weights", "bench:train_options"),
    "distill": Command(
        "evaluations that learning a solver takes, by optimizer, and the error", "bench:learning_options"
    ),
    "tune": Command("error of a tuned solver beside the best classical one's", "bench:tune_options"),
    "table": Command(
        "print or draw an evaluation's or a bench's JSON file, or what changed since an older one",
        "bench:table_options",
    ),
}
COMMANDS = {
    "demo": Command(
        "compare learned and classical solvers on a pipeline: a picture and a table", "measure:demo_options"
    ),
    "tune": Command("learn a solver for a pipeline in minutes, without gradients", "learn:tune_options"),
    "distill": Command("learn a solver for a pipeline, with every setting at hand", "learn:distill_options"),
    "inspect": Command("show what an artefact is for, how it was learned, and its numbers", "inspect:inspect_options"),
    "list": Command(
        "list artefacts: those that ship, in the Hub's cache, and in directories", "artefacts:list_options"
    ),
    "merge": Command("put solvers that were learned apart into one artefact", "artefacts:merge_options"),
    "convert": Command("make an artefact of solvers that others published", "artefacts:convert_options"),
    "convert-edm": Command(
        "make a pipeline of a pixel network that NVIDIA published with EDM", "artefacts:convert_edm_options"
    ),
    "push": Command("upload an artefact to the Hub", "artefacts:push_options"),
    "eval": Command("measure solvers, or images that are there already, by any metrics", "measure:evaluate_options"),
    "analyze": Command(
        "show what each step of a solver misses, and how much of it no weights reach", "analyze:options"
    ),
    "app": Command("compare solvers side by side in a browser", "app:app_options"),
    "bench": Command("measure overhead, memory and learning; print what was measured", BENCH),
    "doctor": Command("show versions, devices, optional packages, and what can run here", "doctor:doctor_options"),
}
