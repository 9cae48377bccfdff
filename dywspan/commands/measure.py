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


# What `dywspan demo` shows of an embedded pipeline: people, hands and faces that it draws well, at the guidance it is
# used with, four evaluations a picture.
DEMO: dict[str, Any] = {"steps": [4], "samples": 24, "seed": 20_000, "pictures": 10, "picture_classical": 2}
DEMO |= {"prompts": str(EXAMPLES / "prompts" / "emoji-demo.txt"), "output": "demo/demo.json"}
DEMO |= {"metrics": ["latent_rmse", "feature_distance"]}
SHOWN: dict[str, dict[str, Any]] = {
    "emoji-sd": {
        "solvers": ["ddim", "dpmpp-2m", str(EXAMPLES / "emoji-sd-any-guidance")],
        "call": {"guidance_scale": 4.0},
        "teacher_order": 4,  # guided, this one errs least
    },
    "emoji-flow": {
        "solvers": ["dpmpp-2m", "unipc", *(str(EXAMPLES / f"emoji-flow-{kind}") for kind in ("solvers", "timelift"))]
    },
}


# What `dywspan demo` compares where no option says otherwise; ``{model}`` is the pipeline.
DEMO: dict[str, Any] = {
    "model": "examples/emoji-sd",
    "solvers": ["euler", "dpmpp-2m", "unipc", "ipndm-2m", "{model}-solvers", "{model}-spanlift"],
    "steps": [3, 5, 7],
    "metrics": ["latent_mse", "feature_distance"],
    "prompts": "examples/prompts/emoji-held-out.txt",
    "samples": 48,
    "output": "demo/demo.json",
}


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan demo``: those of ``dywspan eval``, with other defaults."""
    from ..evaluate.config import QualityConfig
    from ..settings import add_arguments

    parser.set_defaults(run=demo)
    shown = {"call": "what the solvers were learned for", "picture_steps": "those of --steps"}
    shown["solvers"] = " ".join(DEMO["solvers"]).format(model="MODEL")
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
    solvers = [name.format(model=model) for name in DEMO["solvers"]]
    own = {**DEMO, "prompts": str(EXAMPLES / "prompts" / "emoji-held-out.txt"), "solvers": solvers, "model": str(model)}
    check_here(model, *(solvers[-2:] if "solvers" not in given else ()))
    own["picture_steps"] = given.get("steps", own["steps"])
    learned = [name for name in given.get("solvers", solvers) if Path(name).exists()]
    tables = [*shown_tables(load(learned[0])).values()] if learned else []
    own["call"] = dict(tables[0].provenance.get("call", {})) if tables else {}  # what it was learned for
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
