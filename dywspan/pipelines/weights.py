"""Packages and pretrained weights that may not be there: errors at once, that say what to do."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session

PATIENCE = 10.0  # seconds without an answer after which a download is given up


def package_for(module: str, name: str | None = None) -> Any:
    """A module of an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = name or module
        message = f"These features need the package {name!r} ({error}): pip install {name}, or use features='encoder'."
        raise ModuleNotFoundError(message) from error


@contextmanager
def weights_for(features: str, *, url: str = "", repo: str = "") -> Iterator[None]:
    """Weights from the cache, or from a network that answers at once.

    By themselves, downloads from a URL wait for ever, and those from the Hub try again for minutes.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    timeout, offline = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(PATIENCE)
    try:
        if url and offline and not file.exists():
            raise OSError("HF_HUB_OFFLINE is set")
        constants.HF_HUB_OFFLINE = offline or (bool(repo) and not Path(repo).is_dir() and not _hub_answers())
        yield
    except OSError as error:
        once = f"put {url} in {file.parent}" if url else f"run `hf download {repo}`"
        raise OSError(
            f"features={features!r} needs weights that are neither cached nor to be had: {once} once, or use "
            f"features='encoder', which needs none. ({str(error).partition(chr(10))[0]})"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # requests' errors or httpx', by the Hub client's release
        return False
    return True
