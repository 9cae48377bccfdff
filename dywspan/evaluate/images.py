"""Images that are already there: a directory of them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor


def find_images(folder: str, batch_size: int = 1) -> list[Path]:
    """The images of a directory, by name, numbers in names by their size.

    Raises:
        ValueError: there are not two, or they are of several sizes and batches need one.
        OSError: no such directory, or an image that cannot be read.
    """
    from PIL import Image

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"images={folder!r}: there is no such directory.")
    known = Image.registered_extensions()
    found = (file for file in Path(folder).rglob("*") if file.suffix.lower() in known)
    files = sorted(
        found, key=lambda file: [part.zfill(20) if part.isdigit() else part for part in _PARTS.split(str(file))]
    )
    if len(files) < 2:
        raise ValueError(f"images={folder!r} holds {len(files)} images, at least 2 are needed.")
    sizes = {}
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.setdefault(image.size, file)
                image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(file, error) from error
    if len(sizes) > 1 and batch_size > 1:
        shown = ", ".join(f"{w} x {h} ({file.name})" for (w, h), file in [*sizes.items()][:3])
        raise ValueError(f"{folder} holds images of several sizes: {shown}. Resize them, or set batch_size to 1.")
    return files


def _unreadable(file: Path, error: Exception) -> OSError:
    return OSError(f"{file} is not an image that can be read: {error}. Replace it, or take it out.")


_PARTS = re.compile(r"(\d+)")


def read_image(file: Path) -> Tensor:
    """(3, H, W) float32 in [0, 1].

    Raises:
        OSError: it is damaged; names it.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(file) as image:
            return torch.from_numpy(numpy.array(image.convert("RGB"))).movedim(-1, 0).float() / 255
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(file, error) from error
