"""Five steps with a learned solver: the pipeline is untouched but for its scheduler.

python examples/swap_one_line.py "red heart, noto" heart.png
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dywspan import DyWeightScheduler

here = Path(__file__).parent
prompt, output = sys.argv[1:] or ("red heart, noto", "heart.png")

pipe: Any = DiffusionPipeline.from_pretrained(here / "emoji-sd").to(torch.float32)
pipe.scheduler = DyWeightScheduler.from_pretrained(here / "emoji-sd-solvers")

image = pipe(prompt, num_inference_steps=5, guidance_scale=1, generator=torch.manual_seed(0)).images[0]
image.resize((256, 256)).save(output)
