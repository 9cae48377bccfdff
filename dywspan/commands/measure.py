"""``dywspan demo`` and ``dywspan eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..shipped import EXAMPLES, check_here

# What `dywspan eval --help` shows, and then what --help-advanced adds.
EVALUATE = {
    "what is measured": ("model solvers steps metrics images", "metric_options gap_from revision"),
    "samples": (
        "prompts guidance_scale call samples",
        "variants prompt_column prompt_split repeat_prompts seed",
    ),
    "reference": ("teacher teacher_steps", "teacher_order teacher_grid"),
    "time and memory": ("dtype mixed_precision batch_size cache", "layout latent_size"),
    "results": ("output plot", "picture_steps pictures picture_classical"),
}


# What `dywspan demo` shows: people, hands and faces that the embedded pipelines draw well, four evaluations a picture.
DEMO: dict[str, Any] = {
    "model": "examples/emoji-sd",
    "steps": [4],
    "metrics": ["latent_rmse", "feature_distance"],
    "prompts": "examples/prompts/emoji-demo.txt",
    "samples": 24,
    "seed": 20_000,
    "output": "demo/demo.json",
    "pictures": 10,
    "picture_classical": 2,
}
# The rest by pipeline; {model} is its path. Guided, the embedded ones are shown at a scale that people use.
SHOWN: dict[str, dict[str, Any]] = {
    "emoji-sd": {
        "solvers": ["ddim", "dpmpp-2m", "{model}-any-guidance"],
        "call": {"guidance_scale": 4.0},
        "teacher_order": 4,  # guided, this one errs least
    },
    "emoji-flow": {"solvers": ["dpmpp-2m", "unipc", "{model}-solvers", "{model}-timelift"]},
}
OTHERS: dict[str, Any] = {"solvers": ["dpmpp-2m", "unipc", "{model}-solvers", "{model}-spanlift"]}  # of `make emoji-sd`


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan demo``: those of ``dywspan eval``, with other defaults."""
    from ..evaluate.config import QualityConfig
    from ..settings import add_arguments

    parser.set_defaults(run=demo)
    shown = {"call": "what the solvers were learned for", "picture_steps": "those of --steps"}
    shown["solvers"] = "two classical ones, and those that ship with the model"
    add_arguments(parser, QualityConfig, EVALUATE, defaults=DEMO | shown)


def demo(args: argparse.Namespace) -> None:
    """An evaluation of solvers that ship with an embedded pipeline, beside classical ones: a table and pictures."""
    from ..artifact import shown_tables
    from ..evaluate.config import QualityConfig
    from ..evaluate.quality import run
    from ..schedulers.apply import load
    from ..settings import read_config

    given = {k: v for k, v in vars(args).items() if k not in ("run", "config")}
    given = (read_config(args.config, QualityConfig) if "config" in args else {}) | given
    model = Path(given.pop("model", EXAMPLES / "emoji-sd"))
    ships = SHOWN.get(model.name, OTHERS) if model.parent.resolve() == EXAMPLES else OTHERS
    solvers = [name.format(model=model) for name in ships["solvers"]]
    check_here(model, *(solvers[2:] if "solvers" not in given else ()))
    own = {**DEMO, **ships, "prompts": str(EXAMPLES / "prompts" / "emoji-demo.txt"), "solvers": solvers}
    own |= {"model": str(model), "picture_steps": given.get("steps", DEMO["steps"])}
    learned = [name for name in given.get("solvers", solvers) if Path(name).exists()]
    tables = [*shown_tables(load(learned[0])).values()] if learned else []
    call = dict(tables[0].provenance.get("call", {})) if tables else {}  # what it was learned for
    own["call"] = call | (ships.get("call", {}) if "solvers" not in given else {})
    run(QualityConfig(**{**own, **given}))


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan eval``."""
    from ..evaluate.config import QualityConfig
    from ..settings import add_arguments

    parser.set_defaults(run=evaluate)
    parser.usage = "%(prog)s --model MODEL --solvers SOLVER ... [options]"
    add_arguments(parser, QualityConfig, EVALUATE)


def evaluate(args: argparse.Namespace) -> None:
    """Measure solvers, or images already there, by any metrics: a table and a JSON file. Re-run it to resume."""
    from ..evaluate.config import QualityConfig
    from ..evaluate.quality import run
    from ..settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, QualityConfig))
