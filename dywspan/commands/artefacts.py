"""Commands about whole artefacts: find them, put several in one, take over what others published, upload one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from ..shipped import CONFIG, artefacts


def list_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan list``."""
    parser.set_defaults(run=list_artefacts)
    parser.add_argument("directories", nargs="*", help="more directories to search, with all below them")


def list_artefacts(args: argparse.Namespace) -> None:
    """A line for each artefact in a clone's examples, in the Hub's cache, and in the directories given.

    Configurations are read as they are, without torch; ``dywspan inspect`` checks one.
    """
    from ..text import markdown

    if rows := artefacts(args.directories):
        print(markdown(rows))
    else:
        print("No artefacts in the Hub's cache or in the directories. `dywspan tune` and `dywspan distill` make one.")


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan merge``."""
    parser.set_defaults(run=merge)
    parser.add_argument(
        "sources", nargs="+", help="artefacts of one class for one model: directories or Hub ids; later ones win"
    )
    parser.add_argument(
        "-o", "--output", required=True, help="directory of the result: new, empty, or one of the sources"
    )


def merge(args: argparse.Namespace) -> None:
    """Put solvers that were learned apart into one artefact; for the same number of steps the later one counts."""
    from ..distill.merge import merge_artefacts
    from ..schedulers.merge import learned

    scheduler, told = merge_artefacts(args.sources, args.output)
    for line in told:
        print(line)
    print(f"{args.output}: {type(scheduler).__name__} for {learned(scheduler)} steps")


def convert_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan convert``."""
    parser.set_defaults(run=convert)
    parser.add_argument("source", help="DyWeight .pt or .pkl file, or a directory of them")
    parser.add_argument("-o", "--output", required=True, help="directory of the artefact")
    parser.add_argument("--grid", type=json.loads, help="grid to use instead of the one in the file, as JSON")
    parser.add_argument("--sigma-min", type=float, help="smallest noise level, instead of the one in the file")
    parser.add_argument("--sigma-max", type=float, help="largest noise level, instead of the one in the file")


def convert(args: argparse.Namespace) -> None:
    """Turn published solvers into an artefact, without executing anything they hold."""
    from ..published import convert

    ends = {"sigma_min": args.sigma_min, "sigma_max": args.sigma_max}
    scheduler = convert(args.source, args.output, grid=args.grid, **ends)
    print(f"{args.output}: solvers for {sorted(scheduler.tables)} steps")


def convert_edm_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan convert-edm``."""
    parser.set_defaults(run=convert_network)
    parser.add_argument("source", help="a .pkl file, such as edm-cifar10-32x32-uncond-vp.pkl")
    parser.add_argument("-o", "--output", required=True, help="directory of the pipeline: new or empty")


def convert_network(args: argparse.Namespace) -> None:
    """Turn a network that NVIDIA published with EDM into a pipeline, without executing anything its pickle holds."""
    from ..edm import convert_edm

    pipe = convert_edm(args.source, args.output)
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"{args.output}: EDMPipeline, {pipe.unet.config.architecture}, {count / 1e6:.1f} M parameters")


def push_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan push``."""
    parser.set_defaults(run=push)
    parser.add_argument("artefact", help="directory of the artefact")
    parser.add_argument("repository", help="Hub repository, name or organisation/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def push(args: argparse.Namespace) -> None:
    """Upload an artefact, its card and its pictures to the Hub, once it loads. Without a card, one is made."""
    from ..distill.card import write_card
    from ..distill.merge import settings_of
    from ..distill.output import CARD, push
    from ..schedulers.apply import load

    folder, made = Path(args.artefact), {}
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: name the directory of an artefact.")
    scheduler = load(folder)
    if not (folder / CARD).exists():
        with TemporaryDirectory() as own:
            write_card(scheduler, Path(own), settings_of(scheduler) | {"push_to_hub": args.repository})
            made = {file.name: file.read_bytes() for file in Path(own).iterdir()}
    push(args.repository, folder, made, args.private or None)
