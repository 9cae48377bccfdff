"""``dywspan tune`` and ``dywspan distill``."""

from __future__ import annotations

import argparse


def tune_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan tune``."""
    from ..settings import add_arguments
    from ..tuning.config import TuneConfig

    parser.add_argument("model", help="pipeline: a directory or a Hub id")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of its weights; default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--device", help="default: cuda, if there is one")
    add_arguments(parser, TuneConfig)
    parser.set_defaults(run=tune, output="tuned")


def tune(args: argparse.Namespace) -> None:
    """Learn a solver for a pipeline in a minute or a few: from the best classical solver, without gradients."""
    import torch

    from ..pipelines.rollout import load_pipeline
    from ..settings import make_config
    from ..tuning import tune
    from ..tuning.config import TuneConfig

    own = {"run", "model", "dtype", "device", "revision"}
    config = make_config({k: v for k, v in vars(args).items() if k not in own}, TuneConfig)
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    tune(load_pipeline(args.model, dtype=dtype, device=args.device, revision=args.revision), **vars(config))


def distill_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan distill``."""
    from ..distill.config import DistillConfig
    from ..settings import add_arguments

    parser.set_defaults(run=distill)
    add_arguments(parser, DistillConfig)


def distill(args: argparse.Namespace) -> None:
    """Learn a solver: a DyWeight table for each number of steps, or a SpanLift operator or a TimeLift on top of one."""
    from ..distill.config import DistillConfig
    from ..distill.trainer import run
    from ..settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, DistillConfig))
