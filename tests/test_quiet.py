"""The example pipelines load without a warning that their files could avoid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOAD = """
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_another
disable_progress_bar(); disable_another()
for name in ("emoji-sd", "emoji-flow"):
    DiffusionPipeline.from_pretrained(f"examples/{name}")
"""
# Of the environment, of torchao where it is installed, and of the classes that diffusers' pipelines are annotated with:
# no file here can help it.
THEIRS = ("requires torchvision (not installed)", "Expected types for vae:", "torchao", "_pytree.py")


def test_example_pipelines_load_quietly() -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert [line for line in lines if not any(text in line for text in THEIRS)] == []
