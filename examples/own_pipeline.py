"""Learn a solver for a pipeline that is built in Python, whatever it is made of; then sample with it.

    python examples/own_pipeline.py

Compiled, quantised or offloaded pipelines, and such with a LoRA, are learned from in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from dywspan.distill import DistillConfig, SolverTrainer

ROOT = Path(__file__).parent
pipe: Any = DiffusionPipeline.from_pretrained(ROOT / "emoji-sd")
config = DistillConfig(
    prompts=str(ROOT / "prompts" / "emoji-train.txt"), steps=[3], optimizer="least_squares", updates=4,
    pairs=16, held_out=8, teacher_steps=20, output="build/own-pipeline",
)  # fmt: skip
pipe.scheduler = SolverTrainer(pipe, config).train()
pipe("a red apple", num_inference_steps=3).images[0].save("build/own-pipeline/apple.png")
