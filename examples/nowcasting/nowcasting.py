"""Forecasts of rain in 5 evaluations instead of 100: SpanLift section 5.2 on simulated rain.

    python training/pretrain_rain.py --output build/rain     # the autoencoder and the network, into build/rain/rain
    python examples/nowcasting/nowcasting.py learn           # a table, and SpanLift on it by three supervisions
    python examples/nowcasting/nowcasting.py measure         # the rows of the paper's table 4, and a picture

The three supervisions: the teacher's latents; its frames' features; and the features of what really happened.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forecast import NowcastPipeline
from PIL import Image
from rain import KNOWN, sequences
from scores import compared, scores
from torch import Tensor
from torch.nn.functional import mse_loss

from dywspan import DyWeightScheduler
from dywspan.distill.config import LearningConfig
from dywspan.distill.losses import Loss
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.evaluate.report import write_results
from dywspan.pipelines.features import encoder, feature_distance
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.rollout import sample
from dywspan.pipelines.teacher import Teacher, find_teacher
from dywspan.plot import picture
from dywspan.schedulers.apply import load
from dywspan.text import markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"
STEPS, TEACHER = 5, 100  # of the students, and of DDIM that teaches
TRAIN, HELD_OUT, FRESH = 2 * 10**6, 10**6, 5 * 10**6  # seeds of the first sequence, far from each other
LAYOUT = "video_channels_last"
DDIM = "euler"  # in the frame of sigma / alpha they are one solver
LATENT_WEIGHT = 0.1  # of the latents' squared error beside the features', as in SpanLift eq. (16)
COLUMNS, SHOWN = 6, (0, 1)  # of the picture: frames, and which sequences


class Supervision(NamedTuple):
    """What a lift learns from: whether it sees frames' features, and whether it sees the real future."""

    features: bool
    target: bool


SUPERVISIONS = {
    "latents, teacher": Supervision(features=False, target=False),
    "features, teacher": Supervision(features=True, target=False),
    "features, target": Supervision(features=True, target=True),
}


class Nowcasts:
    """A pipeline, its sequences and their teacher's forecasts."""

    def __init__(self, folder: Path) -> None:
        pipe: Any = NowcastPipeline.from_pretrained(folder / "rain")
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.folder = pipe, folder
        self.teacher: Teacher = find_teacher(pipe, DDIM, TEACHER)
        self.features = encoder(pipe)

    def pairs(self, first: int, count: int) -> tuple[Pairs, Tensor]:
        """The teacher's endpoints from these sequences' known frames; and what really happened (N, T, H, W)."""
        whole = sequences(count, first)
        inputs = [{"context": own[None]} for own in whole[:, :KNOWN]]
        cache = self.folder / "cache"
        return make_pairs(self.pipe, self.teacher, inputs, range(first, first + count), call={}, cache=cache), whole[
            :, KNOWN:
        ]

    @torch.no_grad()
    def real(self, pairs: Pairs, future: Tensor) -> Pairs:
        """The same sequences with the latents of what really happened in the place of the teacher's."""
        return Pairs(pairs.inputs, pairs.seeds, self.pipe.encode(future))

    def loss(self, kind: Supervision) -> Loss:
        """c |z - z*|^2 + |f(D(z)) - f(D(z*))|^2 over all frames, f the autoencoder's encoder; or the first alone."""

        def maps(latents: Tensor) -> Sequence[Tensor]:
            return self.features(2 * self.pipe.decode(latents).flatten(0, 1)[:, None] - 1)

        def loss(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                aim = maps(target)
            errors = [mse_loss(a, b) for a, b in zip(maps(endpoint), aim)]
            return LATENT_WEIGHT * mse_loss(endpoint, target) + torch.stack(errors).mean()

        def latents(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
            return mse_loss(endpoint, target)

        chosen, chosen_name = (loss, "encoder features") if kind.features else (latents, "latent_mse")
        chosen.__name__ = chosen_name
        return chosen

    def distance(self, frames: Tensor, others: Tensor) -> float:
        """LPIPS without learned weights: the mean squared difference of the encoder's features of unit length."""
        images = (2 * x.flatten(0, 1)[:, None] - 1 for x in (frames, others))
        return float(feature_distance(self.features, *images).mean())

    @torch.no_grad()
    def frames(self, scheduler: Any, steps: int, pairs: Pairs, batch_size: int = 32) -> Tensor:
        """(N, T, H, W) in [0, 1]: forecasts."""
        made = []
        for i in range(0, len(pairs), batch_size):
            part = slice(i, i + batch_size)
            end, _ = sample(self.pipe, scheduler, steps, pairs.inputs[part], pairs.seeds[part], {})
            made.append(self.pipe.decode(end).clamp(0, 1))
        return torch.cat(made)


# ------------------------------------------------------------------------------------------------------------ commands


def learn(args: argparse.Namespace) -> None:
    """Learn a table from the teacher, then SpanLift on it by each supervision."""
    own = Nowcasts(args.folder)
    (train, future), (held_out, later) = own.pairs(TRAIN, args.pairs), own.pairs(HELD_OUT, args.held_out)
    options: dict[str, Any] = {"batch_size": args.batch_size, "evaluate_every": 20, "recompute": False, "order": 2}
    config = LearningConfig(updates=args.updates, **options)
    base = distill(Task(own.pipe, own.teacher, [Term(STEPS, {}, train, held_out)], config))
    base.save_pretrained(args.folder / "table")
    for name, kind in SUPERVISIONS.items():
        pairs, checks = (train, held_out) if not kind.target else (own.real(train, future), own.real(held_out, later))
        config = LearningConfig(updates=args.updates, lr=args.lr, **options)
        lifted: dict[str, Any] = {"solver": "spanlift", "base": base, "layout": LAYOUT, "name": str(STEPS)}
        lifted["operator"] = {"width": args.width}
        task = Task(own.pipe, own.teacher, [Term(STEPS, {}, pairs, checks)], config, own.loss(kind), **lifted)
        distill(task).save_pretrained(args.folder / name.replace(", ", "-"))


def measure(args: argparse.Namespace) -> None:
    """Score forecasts by what really happened: results, a table and a picture."""
    own = Nowcasts(args.folder)
    pairs, future = own.pairs(FRESH, args.samples)
    ddim = DyWeightScheduler.from_config(own.pipe.scheduler, solver=DDIM)
    forecasts = {f"DDIM, {TEACHER}": own.pipe.decode(pairs.endpoints).clamp(0, 1)}
    forecasts |= {f"{name}, {STEPS}": own.frames(solver, STEPS, pairs) for name, solver in _solvers(args, ddim).items()}
    few, rows = forecasts[f"DDIM, {STEPS}"], list[dict[str, Any]]()
    for name, frames in forecasts.items():
        row = {"solver": name, "nfe": TEACHER if name == f"DDIM, {TEACHER}" else STEPS, **scores(frames, future)}
        row |= {"feature_distance": own.distance(frames, future), "samples": len(future)}
        if frames is not few:
            row["paired"] = {"against": f"DDIM, {STEPS}", **compared(frames, few, future)}
        rows.append(row)
    command = shlex.join(["python", "examples/nowcasting/nowcasting.py", *sys.argv[1:]])
    write_results(args.output, rows, command=command, reference={"solver": DDIM, "steps": TEACHER})
    last = [own["context"][0, -1:] for own in pairs.inputs]
    images = [
        (label, [_grey(frame) for i in SHOWN for frame in torch.cat([last[i], frames[i]])[:COLUMNS]])
        for label, frames in [("what happened", future), *forecasts.items()]
    ]
    picture(images, ["now", *[f"+{k}" for k in range(1, COLUMNS)]] * len(SHOWN)).save(args.picture, optimize=True)
    shown = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items() if k != "paired"} for row in rows]
    print(markdown(shown))


def _solvers(args: argparse.Namespace, ddim: DyWeightScheduler) -> Mapping[str, Any]:
    learned = {f"SpanLift ({name})": load(str(args.folder / name.replace(", ", "-"))) for name in SUPERVISIONS}
    return {"DDIM": ddim, "DyWeight": load(str(args.folder / "table")), **learned}


def _grey(frame: Tensor) -> Image.Image:
    return Image.fromarray((255 * frame).round().byte().numpy()).resize((96, 96), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("learn", learn), ("measure", measure)):
        sub = commands.add_parser(name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--folder", type=Path, default=Path("build/rain"), help="of the pipeline and what is learned")
        if run is learn:
            sub.add_argument("--pairs", type=int, default=256, help="sequences to learn from")
            sub.add_argument("--held-out", type=int, default=64, help="sequences that choose the best update")
            sub.add_argument("--updates", type=int, default=200, help="of each solver")
            sub.add_argument("--batch-size", type=int, default=16, help="sequences of an update")
            sub.add_argument("--lr", type=float, default=1e-3, help="of SpanLift")
            sub.add_argument("--width", type=int, default=32, help="of the operator")
        else:
            sub.add_argument("--samples", type=int, default=256, help="sequences to score")
            sub.add_argument("--output", type=Path, default=DOCS / "results" / "nowcasting.json")
            sub.add_argument("--picture", type=Path, default=DOCS / "images" / "nowcasting.png")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
