"""emoji64: 64 x 64 emoji on white, with captions: ``python training/emoji64.py FOLDER`` builds it.

It is made from the npm packages emoji-datasource-google and emoji-datasource-twitter (MIT, Cal Henderson). The artwork
has its own licences: Noto Emoji, Copyright Google LLC, Apache-2.0 / OFL 1.1; Twemoji, Copyright Twitter, Inc and other
contributors, CC-BY 4.0, which asks for attribution wherever the images, or a model trained on them, are shipped.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dywspan.artifact import write_atomically

HELD_OUT = 200
VERSION = "16.0.0"
STYLES = {"noto": "google", "twemoji": "twitter"}
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def load(folder: Path) -> tuple[Tensor, list[str]]:
    """Images (n, 3, 64, 64) in [-1, 1] and their captions, such as "red heart, noto". Builds what is not there."""
    if not all((folder / name).is_file() for name in ("emoji64.npz", "emoji64.json")):
        build(folder)
    images = torch.from_numpy(np.load(folder / "emoji64.npz")["images"]).permute(0, 3, 1, 2)
    captions = [entry["text"] for entry in json.loads((folder / "emoji64.json").read_text())]
    return images.float().div(127.5).sub(1).contiguous(), captions


def split(captions: list[str], held_out: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """Indices to learn from and to hold out: emoji whose other style stays in, so that captions are recombined."""
    styles: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        styles.setdefault(caption.rsplit(", ", 1)[0], []).append(i)
    both = [found for found in styles.values() if len(found) == 2]
    chosen = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))[:held_out].tolist()
    out = sorted(both[k][n % 2] for n, k in enumerate(chosen))
    return sorted(set(range(len(captions))) - set(out)), out


def build(folder: Path) -> None:
    """Write emoji64.npz (images: uint8, (n, 64, 64, 3)) and emoji64.json (text, category, style), in one order."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[np.ndarray] = []
    entries: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        archives = {style: _package(f"emoji-datasource-{STYLES[style]}", folder, scratch) for style in STYLES}
        for style, archive in archives.items():
            pictures = f"package/img/{STYLES[style]}/64/"
            with tarfile.open(archive) as tar:  # nothing is unpacked onto the disk, wherever a name may point
                wanted = (member for member in tar if member.name.startswith(("package/emoji.json", pictures)))
                files = {member.name: file.read() for member in wanted if (file := tar.extractfile(member))}
            emojis = json.loads(files["package/emoji.json"])
            for emoji in tqdm(emojis, f"emoji64, {style}"):
                for tones, variant in {"": emoji, **emoji.get("skin_variations", {})}.items():
                    images.append(_on_white(files[pictures + variant["image"]]))
                    text = f"{_caption(emoji, tones)}, {style}"
                    entries.append({"text": text, "category": emoji["category"], "style": style})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.stack(images))
    write_atomically(folder / "emoji64.npz", buffer.getvalue())
    write_atomically(folder / "emoji64.json", json.dumps(entries).encode())


def _package(package: str, folder: Path, scratch: Path) -> Path:
    """The package's .tgz, from the folder or else from npm, which checks what it downloads."""
    file = f"{package}-{VERSION}.tgz"
    if (folder / file).is_file():
        return folder / file
    npm, reason = shutil.which("npm"), "npm is not installed"
    if npm:
        tqdm.write(f"emoji64: downloading {package} {VERSION} with npm, some 70 MB")
        command = [npm, "pack", "--loglevel=error", f"{package}@{VERSION}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if done.returncode == 0 and (scratch / file).is_file():
            return scratch / file
        reason = f"npm pack exited with {done.returncode}: {done.stderr.strip()}"
    both = " and ".join(f"emoji-datasource-{name}-{VERSION}.tgz" for name in STYLES.values())
    raise RuntimeError(
        f"emoji64 is made from the npm package {package} {VERSION}, which could not be had: {reason}\n"
        f"Install Node.js (npm comes with it), or put {both} into {folder}."
    )


def _caption(emoji: dict[str, Any], tones: str) -> str:
    name = emoji["name"].lower()
    if emoji["category"] == "Flags":  # by its short name too: flag-fr
        name = f"{emoji['short_name'].replace('-', ' ')} {name}"
    skin = " and ".join(f"{tone} skin tone" for tone in dict.fromkeys(TONES[t] for t in tones.split("-") if t))
    return f"{name}, {skin}" if skin else name


def _on_white(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the emoji64 data set.")
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
