"""Commands about whole artefacts: find them, put several in one, take over what others published, upload one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from .shipped import EXAMPLES

CONFIG = "scheduler_config.json"


def list_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan list``."""
    parser.set_defaults(run=list_artefacts)
    parser.add_argument("directories", nargs="*", help="also look here, and in all directories below")


def list_artefacts(args: argparse.Namespace) -> None:
    """A line for each artefact in a clone's examples, in the Hub's cache, and in the directories given.

    Configurations are read as they are, without torch; ``dywspan inspect`` checks one.
    """
    from ..text import markdown

    for directory in args.directories:
        if not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory} is no directory: name one that holds artefacts.")
    found: dict[Path, str] = {}  # what each configuration is called
    for folder in (EXAMPLES, *map(Path, args.directories)):
        for file in sorted(folder.rglob(CONFIG)):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):  # a run's spare copies
                found.setdefault(file.resolve(), _name(file.parent))
    found |= dict(_cached())
    rows = [{"artefact": name, **row} for file, name in found.items() if (row := _row(file))]
    if rows:
        print(markdown(rows))
    else:
        print(
            "No artefacts in the Hub's cache, nor in directories given. `dywspan tune` or `dywspan distill` makes one."
        )


def _name(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _cached() -> Iterator[tuple[Path, str]]:
    """Configurations in the Hub's cache: of each repository those of the newest revision there."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        newest = max(repository.revisions, key=lambda r: r.last_modified, default=None)
        for file in sorted(newest.files, key=lambda f: f.file_path) if newest else ():
            if file.file_name == CONFIG:
                inner = file.file_path.parent.relative_to(newest.snapshot_path).as_posix()  # type: ignore[union-attr]
                yield file.file_path, repository.repo_id + ("" if inner == "." else f", subfolder {inner}")


# By class, where its numbers of steps are, and its function of every number of them.
_PARTS = {"DyWeightScheduler": ("tables", "continuous"), "SpanLiftScheduler": ("lifts", "continuous_lift")}


def _row(file: Path) -> dict[str, str] | None:
    """Class, model and numbers of steps of a configuration; None if it is not of a solver of ours."""
    from ..text import counts

    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("_class_name")
        if kind not in _PARTS:
            return None
        own, function, late = (config.get(part) or {} for part in (*_PARTS[kind], "time_lifts"))
        provenances = [part.get("provenance") or {} for part in (*own.values(), *late.values(), function)]
        models = {str(provenance["base_model"]) for provenance in provenances if provenance.get("base_model")}
        steps = counts(map(int, own), bool(function)) or "any number of"
        use = f"{steps} steps" + (f", TimeLift for {counts(map(int, late))}" if late else "")
    except (AttributeError, OSError, TypeError, ValueError) as error:
        print(f"dywspan: {file} cannot be read: {error}", file=sys.stderr)
        return None
    return {"class": kind, "model": ", ".join(sorted(models)) or "not said", "for": use}


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan merge``."""
    parser.set_defaults(run=merge)
    parser.add_argument("sources", nargs="+", help="artefacts of one class for one model: directories or Hub ids")
    parser.add_argument(
        "-o", "--output", required=True, help="directory: a new one, an empty one, or one of the sources"
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
    parser.add_argument("--grid", type=json.loads, help="overrides the file's grid, as JSON")
    parser.add_argument("--sigma-min", type=float, help="overrides the file's range")
    parser.add_argument("--sigma-max", type=float, help="overrides the file's range")


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
    parser.add_argument("-o", "--output", required=True, help="directory of the pipeline, a new or empty one")


def convert_network(args: argparse.Namespace) -> None:
    """Turn a network that NVIDIA published with EDM into a pipeline, without executing anything its pickle holds."""
    from ..edm import convert_edm

    pipe = convert_edm(args.source, args.output)
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"{args.output}: EDMPipeline, {pipe.unet.config.architecture}, {count / 1e6:.1f} M parameters")


def push_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan push``."""
    parser.set_defaults(run=push)
    parser.add_argument("artefact", help="its directory")
    parser.add_argument("repository", help="Hub repository: name, or organisation/name; made where there is none")
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
