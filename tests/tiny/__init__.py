"""Tiny, randomly initialised pipelines of real diffusers classes: every network a few kilobytes, no download.

``PIPELINES`` maps a row's name to its builder; ``build`` caches what it makes. ``REFUSED`` are those that no solver
here can serve. Text encoders are left out wherever a pipeline takes embeddings: a scheduler never sees them.
"""

# ruff: noqa: F401, I001  (rows stand in this order)
from . import stable_diffusion, flow_images, flow_recent, flow_video, video_recent, others, others_recent
from . import one_sample, modular, variants
from .others import pixel_unet
from .parts import images, masks, normal, positive, sd_betas, text, vae
from .refused import REFUSED
from .registry import PIPELINES, Indices, Tiny, Trace, available, build, made, run
