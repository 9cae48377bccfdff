"""Names for the command line's help, which does not wait for torch. The tests compare them with the registries."""

from __future__ import annotations

import re

LAYOUTS = ("audio", "image", "packed", "packed_video", "video", "video_channels_last", "video_frames_first")
LOSSES = ("mse", "rmse", "l1", "huber", "cauchy")
FEATURES = ("dinov2", "efficientnet-lite0", "encoder", "inception", "lpips")
METRICS = (
    "latent_mse",
    "latent_rmse",
    "feature_distance",
    "psnr",
    "lpips",
    "fid",
    "kid",
    "clip_score",
    "image_reward",
    "hps",
)
BASELINES = (
    *("DDIM", "Euler", "Heun", "DPM-Solver-2", "PNDM", "DEIS"),
    *("DPM-Solver++(2M)", "DPM-Solver++(2M), Karras", "DPM-Solver++(2M), AYS", "DPM-Solver++(3M)"),
    *(
        "UniPC",
        "RES(2M)",
        "CAB-2",
        "CAB-3",
        "Adams(2M)",
        "Adams(3M)",
        "iPNDM(2M)",
        "iPNDM(3M)",
        "iPNDM(4M)",
        "NeuralSolver",
    ),
)


def slug(name: str) -> str:
    """A name as it is typed: "DPM-Solver++(2M), AYS" is ``dpmpp-2m-ays``."""
    short = name.lower().replace("dpm-solver", "dpm").replace("++", "pp")
    return re.sub(r"[^a-z0-9]+", "-", short).strip("-")
