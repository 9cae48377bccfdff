"""What the pages tell a reader to type is typed, as it stands, in a folder of its own: minutes each."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:Save as `(\w+\.py)`:\n\n)?```(python|bash)\n(.*?)```", re.S)


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize(("page", "made"), [("get-started", "clown.png"), ("extending", "build/colour.json")])
def test_a_page_is_followed_as_written(page: str, made: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, language, text in BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif language == "python" and "import dance" not in text:
            typed([sys.executable, "-c", text], tmp_path)
        elif language == "bash":
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                if line.startswith("dywspan "):
                    typed([sys.executable, "-m", "dywspan.cli", *shlex.split(line)[1:]], tmp_path)
    assert (tmp_path / made).exists()


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


def typed(command: list[str], where: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (command, run.stderr[-2000:])
