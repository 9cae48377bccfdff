"""The folder of a run: its artefact, written whole, by one run at a time; and the Hub repository that it goes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pipelines.pairs import UNWRITABLE
from ..pipelines.processes import is_main
from ..schedulers.apply import KINDS, load
from ..schedulers.dyweight import DyWeightScheduler
from .config import DistillConfig

CARD = "README.md"
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


def push(repository: str, output: Path, made: Mapping[str, bytes] | None = None, private: bool | None = None) -> None:
    """Upload the artefact, its card and its pictures in one commit. The card's usage names the repository.

    Args:
        made: files besides those in the folder, by name.
        private: whether a new repository is.

    Raises:
        OSError: it failed; says how to repeat it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    kinds = ("scheduler_config.json", "*.safetensors", "README.md", "*.png")
    files: dict[str, Any] = {path.name: path for kind in kinds for path in output.glob(kind)} | dict(made or {})
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        if isinstance(card := files.get(CARD), Path):
            usage = card.read_text(encoding="utf-8")
            files[CARD] = usage.replace(f'"{output.resolve().name}")', f'"{url.repo_id}")').encode()
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        api.create_commit(url.repo_id, operations, commit_message="Upload solvers")
    except Exception as error:
        raise OSError(
            f"The upload to {repository} failed ({error}). Nothing is lost: all is in {output}; log in with "
            f"`hf auth login` if you are not, and repeat the command, or `hf upload {repository} {output} . "
            "--exclude '*/*'` later."
        ) from error
    print(f"Uploaded to {url}")
