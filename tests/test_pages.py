"""What the pages tell a reader to type is typed, as it stands, in a folder of its own: minutes each."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:Save as `(\w+\.py)`:\n\n)?```(python|bash)\n(.*?)```", re.S)


@pytest.mark.slow
@pytest.mark.weekly
def test_extending_is_followed_as_written(tmp_path: Path) -> None:
    follow("extending", tmp_path)
    assert (tmp_path / "build" / "colour.json").exists()


@pytest.mark.slow
@pytest.mark.weekly
def test_a_stranger_gets_from_the_first_page_to_the_hub_and_the_app(tmp_path: Path) -> None:
    """A learned solver for a second pipeline, pushed, loaded by its name, and in the app's list of solvers."""
    follow("get-started", tmp_path)
    assert (tmp_path / "clown.png").exists()
    with Hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        online |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        follow("how-to/hub", tmp_path, online, {"push my-solvers": "push build/first-solver"}, PIPE)
        assert hub.repos["org/my-solvers"].private
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dywspan.cli", "app", "--no-browser", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}) as app:
        try:
            for _ in range(120):
                time.sleep(1)
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                    assert b"examples/emoji-sd" in answer.read()
                    return
        finally:
            app.terminate()
    raise AssertionError("the app did not answer")


PIPE = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained('examples/emoji-flow')\n"


def follow(
    page: str,
    where: Path,
    environment: Mapping[str, str] | None = None,
    said: Mapping[str, str] | None = None,
    before: str = "",
) -> None:
    """Types all commands and runs all snippets of a page, but ``import dance``'s.

    Args:
        environment: variables of the processes.
        said: what stands for names of the page.
        before: runs before each snippet.
    """
    if not (where / "examples").exists():
        (where / "examples").symlink_to(ROOT / "examples")
    content = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for name, language, text in BLOCK.findall(content):
        for old, new in (said or {}).items():
            text = text.replace(old, new)
        if name:
            (where / name).write_text(text, encoding="utf-8")
        elif language == "python" and "import dance" not in text:
            typed([sys.executable, "-c", before + text], where, environment)
        elif language == "bash":
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                if line.startswith("dywspan "):
                    typed([sys.executable, "-m", "dywspan.cli", *shlex.split(line)[1:]], where, environment)


# A tiny Dance Diffusion, its own scheduler and ours, many steps each.
HOST = """
import torch
from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D")}
blocks |= {"up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip")}
blocks |= {"block_out_channels": (32, 64), "extra_in_channels": 64, "flip_sin_to_cos": True}
unet = UNet1DModel(sample_size=512, sample_rate=16000, **blocks)
pipe = DanceDiffusionPipeline(unet, IPNDMScheduler())

def sound(n):
    call = {"num_inference_steps": n, "audio_length_in_s": 512 / unet.config.sample_rate}
    return torch.tensor(pipe(generator=torch.manual_seed(1), **call).audios)

reference = sound(200)
"""


@pytest.mark.slow
@pytest.mark.weekly
def test_the_host_of_the_page_ends_where_diffusers_does(tmp_path: Path) -> None:
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    blocks = {name or "swap": text for name, language, text in BLOCK.findall(page) if "dance" in (name or text)}
    (tmp_path / "dance.py").write_text(blocks["dance.py"], encoding="utf-8")
    check = "error = (sound(40) - reference).square().mean() / reference.square().mean()\nassert error < 1e-3, error"
    typed([sys.executable, "-c", "\n".join([HOST, blocks["swap"], check])], tmp_path)


def typed(command: list[str], where: Path, environment: Mapping[str, str] | None = None) -> None:
    own = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})}
    run = subprocess.run(command, cwd=where, env=own, capture_output=True, text=True)
    assert run.returncode == 0, (command, run.stderr[-2000:])
