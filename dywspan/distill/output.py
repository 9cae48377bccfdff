"""The folder of a run: its artefact, written whole, by one run at a time; and the Hub repository that it goes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pipelines.pairs import UNWRITABLE
from ..pipelines.processes import is_main
from ..schedulers.apply import KINDS, load
from ..schedulers.dyweight import DyWeightScheduler
from .config import DistillConfig

SPARE = ".spare"  # a copy of the artefact, in its folder


def find_artefact(config: DistillConfig) -> Any:
    """What lies in the output folder from an earlier run and is added to."""
    if not (Path(config.output) / DyWeightScheduler.config_name).exists():
        return None
    found = DyWeightScheduler.load_config(config.output).get("_class_name")
    wanted = {"dyweight": {"DyWeightScheduler"}, "spanlift": {"SpanLiftScheduler"}}.get(config.solver, {*KINDS})
    if found not in wanted:
        raise ValueError(f"{config.output} holds a {found}: choose another output for a {' or '.join(sorted(wanted))}.")
    try:
        return load(config.output)
    except (ValueError, OSError):
        if not (spare := Path(config.output) / SPARE).exists():
            raise
        return load(spare)


def save_artefact(artefact: Any, output: Path) -> None:
    """Write it, on the main process. Two files are not written at once: whenever this is killed, one copy is whole."""
    if is_main():
        for folder in (output / SPARE, output):
            artefact.save_pretrained(folder)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """One run at a time in a folder; a killed one's lock is gone with it."""
    from filelock import FileLock, Timeout

    if not is_main():
        yield
        return
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"Another run is writing to {output}: wait for it, stop it, or choose another output.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written() -> Iterator[None]:
    """A full disk's error says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OSError(
            f"{error.filename} cannot be written ({error.strerror}). What is finished is kept: make room, or choose "
            "another output or cache, and run the same command again."
        ) from error


def push(repository: str, output: Path) -> None:
    """Upload the artefact, its card and its pictures.

    Raises:
        OSError: it failed; says how to repeat it.
    """
    from huggingface_hub import HfApi

    # By name: a pattern's * would match the folders of the teacher's samples and of the state too.
    kinds = ("scheduler_config.json", "*.safetensors", "README.md", "*.png")
    files = [path.name for kind in kinds for path in output.glob(kind)]
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=output, allow_patterns=files, commit_message="Upload solvers"
        )
    except Exception as error:
        raise OSError(
            f"The upload to {repository} failed ({error}). Nothing is lost: all is in {output}; repeat the command, or "
            f"`hf upload {repository} {output} . --exclude '*/*'` later."
        ) from error
    print(f"Uploaded to {url}")
