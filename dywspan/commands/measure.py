"""``dywspan demo`` and ``dywspan eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .shipped import EXAMPLES, check_here

# What `dywspan eval --help` shows, and then what --help-advanced adds.
EVALUATE = {
    "what is measured": ("model solvers steps metrics images", "metric_options gap_from revision"),
    "samples": (
        "prompts guidance_scale call samples",
        "variants prompt_column prompt_split repeat_prompts seed",
    ),
    "reference": ("teacher teacher_steps", "teacher_order teacher_grid"),
    "time and memory": ("dtype mixed_precision batch_size cache", "layout latent_size"),
    "results": ("output plot", "picture_steps pictures"),
}


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan demo``: those of ``dywspan eval``, with other defaults."""
    from ..evaluate.config import QualityConfig
    from ..settings import add_arguments

    parser.set_defaults(run=demo)
    add_arguments(parser, QualityConfig, EVALUATE)


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
    learned = [f"{model}-solvers", f"{model}-spanlift"]
    check_here(model, *(learned if "solvers" not in given else ()))
    own: dict[str, Any] = {"solvers": ["euler", "dpmpp-2m", "unipc", "ipndm-2m", *learned], "samples": 48}
    own |= {"prompts": str(EXAMPLES / "prompts" / "emoji-held-out.txt"), "steps": given.get("steps", [3, 5, 7])}
    own |= {"metrics": ["latent_mse", "feature_distance"], "output": "demo/demo.json", "picture_steps": own["steps"]}
    learned = [name for name in given.get("solvers", learned) if Path(name).exists()]
    tables = [*shown_tables(load(learned[0])).values()] if learned else []
    own["call"] = dict(tables[0].provenance.get("call", {})) if tables else {}  # what it was learned for
    run(QualityConfig(**{"model": str(model), **own, **given}))


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
