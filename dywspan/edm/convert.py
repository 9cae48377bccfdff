"""NVIDIA's published EDM networks, pickles of objects with their source code, as pipelines of safetensors.

A pickle is a program: here nothing in it is imported or called, see :mod:`dywspan.inert_pickle`. Of the object under
"ema" three things are read: names of classes, the arguments they were made with, and tensors.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from ..core.check import number, shown
from ..inert_pickle import read_pickle
from .network import EDMUNet
from .pipeline import EDMPipeline

# What a class of theirs is called here, and its arguments where a file leaves them out.
_ADM = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]}
_DDPM = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
CLASSES: dict[str, tuple[str, Mapping[str, Any]]] = {"SongUNet": ("ddpm++", _DDPM), "DhariwalUNet": ("adm", _ADM)}

# Their arguments by our names.
_ARGUMENTS = {
    "sample_size": "img_resolution",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_class_embeds": "label_dim",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "layers_per_block": "num_blocks",
    "attention_resolutions": "attn_resolutions",
    "dropout": "dropout",
}

# What no network here does otherwise; it would be NCSN++ with the other values.
_FIXED = {
    "channel_mult_emb": 4,
    "channel_mult_noise": 1,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
}

# Where their parameters are here. The augmentation's layer has no bias: without augmentation it adds nothing.
_RENAMED = {r"^map_augment\.weight$|^.*resample_filter$": "", r"^map_": "embedding.map_", r"^dec\.\d+x\d+_aux_": "out_"}


def convert_edm(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> EDMPipeline:
    """Turn a published EDM network, ``edm-cifar10-32x32-uncond-vp.pkl`` say, into a folder of an ``EDMPipeline``.

    Its scheduler is ``EDMEulerScheduler`` with sigma from 0.002 to 80 and rho = 7, the paper's (EDM, table 1). The
    layer for augmentation, which is used in training only, is left out.

    Args:
        source: a pickle with a network under "ema", DDPM++ or ADM with EDM preconditioning.
        destination: folder for ``model_index.json``, ``unet`` and ``scheduler``.

    Raises:
        ValueError: a folder that is not empty; a file that is damaged or holds no such network, but one of NCSN++, say,
            or with the preconditioning of VP, VE or iDDPM.
        OSError: a file that is not there, a folder that cannot be written.
    """
    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{destination} is not empty: choose another folder.")
    try:
        root = read_pickle(Path(source).read_bytes())
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{source} is not a readable EDM network ({type(error).__name__}: {error}).") from error
    try:
        pipe = _pipeline(root)
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{source} holds no EDM network as NVIDIA writes them ({error!r}).") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:  # whole or not at all
        pipe.save_pretrained(f"{unfinished}/whole")
        os.replace(f"{unfinished}/whole", folder)
    return pipe


def _pipeline(root: Any) -> EDMPipeline:
    if not isinstance(root, dict) or "ema" not in root:
        raise ValueError("it holds no network under 'ema'.")
    name, outer = _object(root["ema"])
    if name != "EDMPrecond":
        raise ValueError(f"its network is asked through {name}; only EDMPrecond is known here.")
    name, inner = _object(_parts(outer, "_modules")["model"])
    if name not in CLASSES:
        raise ValueError(f"its network is {name}, none of {', '.join(CLASSES)}.")
    architecture, defaults = CLASSES[name]
    given = {"label_dim": 0, "dropout": 0.1, **defaults, **inner["_init_kwargs"]}
    tensors = dict(_tensors(inner))
    filters = (v for k, v in tensors.items() if k.endswith("resample_filter"))
    other = [f"{k}={shown(given[k])}" for k, v in _FIXED.items() if given.get(k, v) != v]
    if other or any(v.numel() != 4 or bool((v != 0.25).any()) for v in filters):
        raise ValueError(f"it is no DDPM++ and no ADM: {', '.join(other) or 'it does not resample by means of 2 x 2'}.")
    settings: dict[str, Any] = {own: given[theirs] for own, theirs in _ARGUMENTS.items()}
    settings["num_class_embeds"] = settings["num_class_embeds"] or None
    with torch.device("meta"):
        network = EDMUNet(architecture, **settings)
    weights = {new: v for k, v in tensors.items() if (new := _renamed(k))}
    sizes = ({k: tuple(v.shape) for k, v in known.items()} for known in (network.state_dict(), weights))
    if wrong := sorted({k for k, _ in set.symmetric_difference(*(set(known.items()) for known in sizes))}):
        raise ValueError(f"{len(wrong)} tensors are not those of its arguments: {', '.join(wrong[:3])}, ...")
    if len({v.untyped_storage().data_ptr() for v in weights.values()}) < len(weights):
        raise ValueError("its tensors share memory, which those of no such network do.")
    network.load_state_dict({k: v.float().contiguous() for k, v in weights.items()}, assign=True)
    sigma_data = number("sigma_data", outer.get("sigma_data", 0.5), 1e-6, 1e6)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data, rho=7.0)
    return EDMPipeline(network.eval().requires_grad_(False), scheduler)


def _object(node: Any) -> tuple[str, dict[str, Any]]:
    """Class and attributes of an object: of a persistent one its own, as its source code would restore it."""
    name, state = type(node).__name__, next(iter(node.state), None)
    if name == "_reconstruct_persistent_obj":
        ((meta,), _) = node.args
        name, state = meta["class_name"], meta["state"]
    if not isinstance(name, str) or not isinstance(state, dict):
        raise TypeError("an object without attributes")
    return name[:80], state


def _parts(attributes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Those of a module by name: ``_modules``, ``_parameters`` or ``_buffers``."""
    parts = attributes.get(kind) or {}
    if not all(isinstance(name, str) and len(name) < 100 for name in parts):
        raise TypeError("names that no layer has")
    return {k: v for k, v in parts.items() if v is not None}


def _tensors(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and those in it, by path; a file may name one often, or within itself."""
    todo = [("", attributes)]
    for seen, (path, own) in enumerate(todo):
        if seen >= 10_000 or path.count(".") > 10:
            raise ValueError("it has more layers, or layers deeper in others, than any such network.")
        for kind in ("_parameters", "_buffers"):
            for name, value in _parts(own, kind).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"{path}{name} is no tensor.")
                yield f"{path}{name}", value
        todo += [(f"{path}{name}.", _object(child)[1]) for name, child in _parts(own, "_modules").items()]


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED.items():
        name = re.sub(pattern, new, name)
    return name
