"""Where a solver's files are: in a folder or on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..artifact import write_atomically
from ..core.check import shown

LARGEST = 1e4  # of an operator's weights: more would be damage, and may leave no sample finite
DOWNLOAD = ("cache_dir", "token", "revision", "local_files_only", "force_download")


@contextlib.contextmanager
def broken_downloads_named(source: Any) -> Iterator[None]:
    """huggingface_hub lets its HTTP library's errors through, and has changed libraries."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "requests")):
            raise
        raise OSError(
            f"The download of {source} broke off ({error}). Try again, or use what is in the cache: "
            "local_files_only=True."
        ) from error


def find(
    name: str, source: Any, subfolder: str | None, commit: str | None, download: Mapping[str, Any]
) -> str | os.PathLike[str]:
    """The file beside a configuration, from the very commit of that.

    Args:
        source: a folder, the path of the configuration itself, or a Hub id.

    Raises:
        OSError: it is not there.
    """
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    if folder.is_dir():
        inner = folder / (subfolder or "")
        # As diffusers does for the configuration: what is not in the subfolder is looked for above it.
        file = (inner if inner.is_dir() else folder) / name
        if not file.is_file():
            raise OSError(f"{file} is not there: this solver is a configuration and this file, copy both.")
        return file
    try:
        with broken_downloads_named(source):
            revision = commit or download.get("revision")
            return hf_hub_download(str(source), name, subfolder=subfolder, **{**download, "revision": revision})
    except EntryNotFoundError as error:
        raise OSError(
            f"{source} has a solver's configuration but no {name} beside it "
            "(or it is not in the cache and the network may not be used)."
        ) from error


def weights_of(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What a weights file holds: ``name.key`` of every network."""
    return {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}


def write_tensors(file: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write a weights file atomically; its SHA-256."""
    # Through bytes: safetensors' own save_file leaves a file that only its owner can read.
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_atomically(file, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """What a weights file holds; nothing but tensors is ever read.

    Raises:
        ValueError: it is damaged.
    """
    try:
        # Copied: what is read from a file is a view of it, and would change with it.
        return {name: value.clone() for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({shown(str(error))}): download it again.") from error


def check_digest(file: str | os.PathLike[str], digest: str | None, setting: str) -> None:
    """A weights file is the one that its configuration was saved with.

    Args:
        digest: the SHA-256 that it must have; None: any.
        setting: where that stands.

    Raises:
        ValueError: it is another one.
    """
    if digest is not None and digest != hashlib.sha256(Path(file).read_bytes()).hexdigest():
        raise ValueError(
            f"{file} is not the file this configuration was saved with ({setting} differs): it is damaged, or "
            "from another save. Download or copy both again."
        )


def read_weights(file: str | os.PathLike[str], networks: Mapping[str, nn.Module], digest: str | None) -> None:
    """Give networks their weights.

    Args:
        networks: of the right shapes, on any device, "meta" too.
        digest: see :func:`check_digest`.

    Raises:
        ValueError: damaged, or made for other networks.
    """
    state = read_tensors(file)
    expected = weights_of(networks)
    if state.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise ValueError(
            f"{file} does not hold the operator this configuration describes: missing {missing[:3]}, unexpected "
            f"{extra[:3]}. Configuration and weights must come from the same save."
        )
    for name, value in state.items():
        if value.shape != expected[name].shape or value.dtype != torch.float32:
            raise ValueError(
                f"{file}: {name} is {value.dtype} {tuple(value.shape)}; the operator of this configuration needs "
                f"torch.float32 {tuple(expected[name].shape)}. Was it made for another model?"
            )
        if not bool((value.abs() <= LARGEST).all()):
            raise ValueError(
                f"{file}: {name} holds numbers that are not finite, or above {LARGEST:g}. Download or distil it again."
            )
    check_digest(file, digest, "weights_sha256")
    for name, network in networks.items():
        network.load_state_dict({k: state[f"{name}.{k}"] for k in network.state_dict()}, assign=True)
        network.requires_grad_(False)
