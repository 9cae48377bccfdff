"""``dywspan tune`` and ``dywspan distill``."""

from __future__ import annotations

import argparse

# What --help shows, and then what --help-advanced adds.
TUNE = {
    "what is learned": ("steps output", ""),
    "samples": ("prompts guidance_scale call", "prompt_column prompt_split pairs held_out seed"),
    "cost and pictures": ("evaluations", "pictures layout"),
}
DISTILL = {
    "required, here or in the file that --config names": ("model output", ""),
    "what is learned": (
        "solver steps base continuous order init",
        "late_starts variants horizon grid afs bounded time_shifting time_scaling learn_base operator shared",
    ),
    "samples": (
        "prompts guidance_scale call pairs held_out cache",
        "prompt_column prompt_split held_out_prompts test_prompts test on_the_fly revision",
    ),
    "teacher": ("teacher teacher_steps", "teacher_order teacher_grid teacher_batch_size"),
    "loss": ("loss features", "latent_weight layout latent_size"),
    "learning": (
        "optimizer updates batch_size lr",
        "weight_decay clip regression path_substeps ridge difference evaluate_every patience seed",
    ),
    "time and memory": (
        "dtype mixed_precision micro_batch_size",
        "recompute recompute_blocks fsdp release_text_encoders",
    ),
    "results": ("dry_run push_to_hub", "trackers pictures checkpoint_every keep_checkpoints"),
}


def tune_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan tune``."""
    from ..settings import add_arguments
    from ..tuning.config import TuneConfig

    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="pipeline: a directory or a Hub id")
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights; default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--device", help="device to run on; default: cuda if there is one")
    add_arguments(parser, TuneConfig, TUNE)
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
    parser.usage = "%(prog)s --model MODEL --output DIRECTORY [options]"
    add_arguments(parser, DistillConfig, DISTILL)


def distill(args: argparse.Namespace) -> None:
    """Learn a solver: a DyWeight table for each number of steps, or a SpanLift operator or a TimeLift on top of one."""
    from ..distill.config import DistillConfig
    from ..distill.trainer import run
    from ..settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, DistillConfig))
