"""Features of the images that others are compared with: of a directory, or of a dataset."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines.features import Features
from .statistics import Metric, Sample

Images = Callable[[], Iterator[tuple[str, Image.Image]]]  # names and images, as often as called

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_reference(
    source: str | Path,
    network: Features,
    size: int | None,
    split: str,
    column: str,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Callable[[], Tensor], str]:
    """Its features (N, D), computed at the first call, and what it is; the images are checked now.

    Args:
        source: a directory of images, or a dataset, as ``datasets.load_dataset`` takes it.
        size: pixels to which the images are resized and cropped, bicubic; None to take them as they are.
        split, column: of the dataset.

    Raises:
        ValueError: fewer than 2 images, or images of several sizes.
        OSError: nothing that can be read.
    """
    count, images = _images(source, split, column)
    _check_images(source, count, images, size)

    @cache
    def features() -> Tensor:
        rows, batch = [], []
        for i, (_, image) in enumerate(tqdm(images(), "reference", count), 1):
            image = image.convert("RGB")
            batch.append(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
            if len(batch) == batch_size or i == count:
                pixels = torch.from_numpy(np.stack(batch)).to(device).movedim(3, 1)
                rows.append(vectors(network, pixels / 127.5 - 1).cpu())
                batch.clear()
        return torch.cat(rows)

    return features, f"{count} images of {source}" + (f", {size} x {size}" if size else "")


def of_features(
    kinds: tuple[str, str],
    network: Features,
    name: str,
    source: str | None,
    value: Callable[[Tensor], float],
    influence: Callable[[Tensor], Tensor],
) -> Metric:
    """A metric of the images' features, whose rows also have those of the reference's images where these are compared.

    Args:
        kinds: the metric's name with Inception-v3, and what it begins with for any other network.
        source: what the images are compared with; None: the reference solver's images from the same noise.
    """
    kind = kinds[0] if name == "inception" else f"{kinds[1]}_{name}"

    def rows(sample: Sample) -> Tensor:
        images = [sample.images] if source else [sample.images, sample.need("reference_images", kind)]
        return torch.cat([vectors(network, 2 * x - 1) for x in images], 1)

    facts = {"network": f"{name}, the last map's mean over positions"}
    facts["reference"] = source or "the reference solver's images"
    return Metric(kind, rows, value, facts=facts, needs=() if source else ("reference_images",), influence=influence)


@torch.no_grad()
def vectors(network: Features, images: Tensor) -> Tensor:
    """(B, D) float32: the last map, its positions averaged: (B, D), tokens (B, T, D) or (B, D, H, W)."""
    last = network(images)[-1].float()
    return last.mean(1) if last.ndim == 3 else last.flatten(2).mean(2) if last.ndim > 3 else last


def _images(source: str | Path, split: str, column: str) -> tuple[int, Images]:
    """How many images a directory or a dataset has, and they."""
    if files := sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in SUFFIXES):
        return len(files), lambda: ((str(p), Image.open(p)) for p in files)
    try:
        import datasets

        data = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # of many kinds, none of which names the way out
        raise OSError(
            f"reference={str(source)!r} is neither a directory with images {SUFFIXES}, nor an .npz file, nor a dataset "
            f"with split {split!r}, which needs `pip install datasets`: {error}"
        ) from error
    if column not in (names := data.column_names or []):
        raise ValueError(f"Dataset {str(source)!r} has no column {column!r}: set column to one of {sorted(names)}.")
    data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def images() -> Iterator[tuple[str, Image.Image]]:
        for i, row in enumerate(data):
            kept = row[column]  # type: ignore[index]
            yield f"image {i}", Image.open(io.BytesIO(kept["bytes"]) if kept["bytes"] else kept["path"])

    return len(data), images


def _check_images(source: str | Path, count: int, images: Images, size: int | None) -> None:
    if count < 2:
        raise ValueError(f"reference={str(source)!r} has {count} images: at least 2 are needed.")
    if size is not None:
        return
    sizes: dict[tuple[int, int], str] = {}
    for name, image in images():
        sizes.setdefault(image.size, name)
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            raise ValueError(
                f"reference={str(source)!r} has images of several sizes, {first}: {a[0]} x {a[1]} and {second}: "
                f"{b[0]} x {b[1]}: set size= to resize and crop them all, or make them of one size."
            )
