"""training/emoji64.py: how the data set is built, without a network, and what is held out."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TRUTH = ROOT.parent / "shared" / "emoji64" / "emoji64.json"
FOLDERS = {"noto": "google", "twemoji": "twitter"}
EMOJIS: list[dict[str, Any]] = [
    {"name": "HASH KEY", "short_name": "hash", "category": "Symbols", "image": "hash.png"},
    {
        "name": "HANDSHAKE",
        "short_name": "handshake",
        "category": "People & Body",
        "image": "hands.png",
        "skin_variations": {
            "1F3FC": {"image": "hands-c.png"},
            "1F3FD-1F3FD": {"image": "hands-dd.png"},
            "1F3FF-1F3FB": {"image": "hands-fb.png"},
        },
    },
    {"name": "Åland Islands Flag", "short_name": "flag-ax", "category": "Flags", "image": "ax.png"},
]
CAPTIONS = [
    "hash key",
    "handshake",
    "handshake, medium-light skin tone",
    "handshake, medium skin tone",
    "handshake, dark skin tone and light skin tone",
    "flag ax åland islands flag",
]


@pytest.fixture
def emoji64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, where no program is found but what a test puts into tmp_path / "bin"."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    import emoji64

    return emoji64


def _picture(number: int, palette: bool) -> tuple[bytes, np.ndarray]:
    """A PNG, clear above, half clear in the middle and opaque below, and what it is on white."""
    colour = np.array([number, 0, 255 - number])
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[16:32, :, 3], pixels[32:, :, 3] = 51, 255
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    (image.quantize(4, method=Image.Quantize.FASTOCTREE) if palette else image).save(buffer, "PNG")
    white = pixels[..., 3:] / 255 * colour + (255 - pixels[..., 3:].astype(float))
    return buffer.getvalue(), white


def _pack(folder: Path, **more: bytes) -> list[np.ndarray]:
    """Both packages, of six images each; returns what the images are on white."""
    folder.mkdir()
    seen: list[np.ndarray] = []
    for style in FOLDERS.values():
        files = {
            "package/emoji.json": json.dumps(EMOJIS).encode(),
            f"package/img/{style}/sheets/64.png": b"not a picture",
        }
        for emoji in EMOJIS:
            for variant in (emoji, *emoji.get("skin_variations", {}).values()):
                data, white = _picture(10 * len(seen), palette=style == "twitter")
                files[f"package/img/{style}/64/{variant['image']}"] = data
                seen.append(white)
        with tarfile.open(folder / f"emoji-datasource-{style}-16.0.0.tgz", "w:gz") as tar:
            for name, data in {**files, **more}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return seen


def _npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_images_are_on_white_and_captions_say_tones_and_styles(emoji64: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    seen = _pack(folder)
    images, captions = emoji64.load(folder)
    assert captions == [f"{text}, {style}" for style in FOLDERS for text in CAPTIONS]
    stored = np.load(folder / "emoji64.npz")["images"]
    assert stored.dtype == np.uint8 and stored.shape == (12, 64, 64, 3)
    assert np.abs(stored - np.stack(seen)).max() <= 1  # of rounding
    assert images.shape == (12, 3, 64, 64) and float((images[1, :, :16] - 1).abs().max()) == 0
    assert np.allclose(images.permute(0, 2, 3, 1), stored / 127.5 - 1, atol=1e-6)
    entries = json.loads((folder / "emoji64.json").read_text())
    assert entries[8] == {"text": f"{CAPTIONS[2]}, twemoji", "category": "People & Body", "style": "twemoji"}

    for archive in folder.glob("*.tgz"):
        archive.unlink()
    assert sorted(path.name for path in folder.iterdir()) == ["emoji64.json", "emoji64.npz"]
    assert emoji64.load(folder)[1] == captions  # built once


def test_npm_fetches_what_is_not_in_the_folder(emoji64: ModuleType, tmp_path: Path) -> None:
    _pack(tmp_path / "registry")
    copy = f"shutil.copy('{tmp_path}/registry/' + sys.argv[-1].replace('@', '-') + '.tgz', '.')"
    _npm(tmp_path / "bin", f"assert sys.argv[1] == 'pack'\n{copy}")
    emoji64.build(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["emoji64.json", "emoji64.npz"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "npm is not installed"),
        ("sys.exit('network unreachable')", "exited with 1: network unreachable"),
        ("", "exited with 0"),  # and left no file
    ],
)
def test_without_npm_the_error_names_the_ways_out(
    emoji64: ModuleType, tmp_path: Path, script: str | None, reason: str
) -> None:
    if script is not None:
        _npm(tmp_path / "bin", script)
    with pytest.raises(RuntimeError, match=reason) as caught:
        emoji64.load(tmp_path / "data")
    for way in ("Node.js", *(f"emoji-datasource-{style}-16.0.0.tgz" for style in FOLDERS.values()), str(tmp_path)):
        assert way in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_package_cannot_write_elsewhere(emoji64: ModuleType, tmp_path: Path) -> None:
    _pack(tmp_path / "data", **{"package/img/google/64/../../../../../evil.png": b"evil"})
    emoji64.build(tmp_path / "data")
    assert not list(tmp_path.rglob("evil*")) and (tmp_path / "data" / "emoji64.npz").exists()


def _captions(source: str) -> list[str]:
    if source == "made up":  # 90 in both styles, 10 in one only, and one name that two emoji share
        names = [*(f"emoji {i}" for i in range(90)), "man in tuxedo", "man in tuxedo"]
        return [f"{name}, {style}" for style in FOLDERS for name in names] + [f"rare {i}, noto" for i in range(10)]
    if not TRUTH.is_file():
        pytest.skip("needs the data set")
    return [entry["text"] for entry in json.loads(TRUTH.read_text())]


@pytest.mark.parametrize(("source", "count"), [("made up", 20), ("the data set", 200)])
def test_a_held_out_emoji_is_learned_in_its_other_style(emoji64: ModuleType, source: str, count: int) -> None:
    captions = _captions(source)
    learned, held_out = emoji64.split(captions, count)
    assert sorted(learned + held_out) == list(range(len(captions))) and len(held_out) == count
    assert (learned, held_out) == emoji64.split(captions, count)
    seen = {captions[i] for i in learned}
    styles: Counter[str] = Counter()
    for i in held_out:
        name, style = captions[i].rsplit(", ", 1)
        (other,) = FOLDERS.keys() - {style}
        assert f"{name}, {other}" in seen and captions[i] not in seen
        styles[style] += 1
    assert set(styles.values()) == {count // 2}
