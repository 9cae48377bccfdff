"""What diffusers' own scheduler of a pipeline knows: the network's convention and the default grid.

Nothing of it is written again here: the pipeline's scheduler class is built from the configuration and asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..core.prediction import PREDICTIONS, Prediction, VariancePreserving

# Not samplers of a probability-flow ODE in x: nothing here could replace them.
_REFUSED = ("SCM", "VQDiffusion", "Amused", "KarrasVe", "UnCLIP", "DDPMWuerstchen", "RePaint", "FlowMatchLCM")


def host_class_name(config: Mapping[str, Any], own: type) -> str | None:
    """The diffusers class that made a configuration; None for one of ours, which has it under ``host_scheduler``.

    A scheduler built in memory does not write its class into its configuration: then it is the class, of those we are
    compatible with, with the most parameters that all stand in it.
    """
    if "host_scheduler" in config:
        return None
    if isinstance(name := config.get("_class_name"), str) and hasattr(diffusers, name):
        return name
    parameters = {n: _parameters(n) for n in own._compatibles if hasattr(diffusers, n)}  # type: ignore[attr-defined]
    complete = [n for n, keys in parameters.items() if keys <= config.keys()]
    return max(complete, key=lambda n: len(parameters[n]), default=None)


class Host:
    """The scheduler class a pipeline came with, asked for its noise schedule and its default grid.

    Args:
        config: any scheduler configuration that has ``host_scheduler`` and that class's own keys.

    Attributes:
        prediction: the network's convention.

    Raises:
        ValueError: unknown class or prediction type, or a class that does not sample an ODE.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = config["prediction_type"]
        name = config["host_scheduler"] or _euler(kind)
        if not isinstance(name, str):
            raise ValueError(f"host_scheduler={name!r} must be the name of a diffusers scheduler.")
        if name.startswith(_REFUSED):
            raise ValueError(f"{name} does not integrate an ODE from noise to data, so no solver can replace it.")
        kind_of = getattr(diffusers, name, None)
        if not (isinstance(kind_of, type) and issubclass(kind_of, SchedulerMixin)):
            raise ValueError(f"host_scheduler={name!r} is no scheduler of the installed diffusers; upgrade diffusers.")
        self.scheduler = _build(name, config)
        # Two-stage and warm-up schedulers repeat timesteps: their grid is Euler's on the same spacing.
        repeats = self.scheduler.order > 1 or name == "PNDMScheduler"
        self.grid_scheduler = _build(_euler(kind), config) if repeats else self.scheduler
        self.prediction = self._prediction(kind, name, config)

    @staticmethod
    def is_flow(name: str, config: Mapping[str, Any]) -> bool:
        return name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))

    def _prediction(self, kind: str, name: str, config: Mapping[str, Any]) -> Prediction:
        if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # Stable Video Diffusion
            return PREDICTIONS["edm"](1.0, velocity=True)  # type: ignore[call-arg]
        if name.startswith("EDM"):
            return PREDICTIONS["edm"](config.get("sigma_data", 0.5), velocity=kind == "v_prediction")  # type: ignore[call-arg]
        if kind == "flow_prediction":
            return PREDICTIONS[kind](config["num_train_timesteps"], inverted=bool(config.get("invert_sigmas")))  # type: ignore[call-arg]
        if kind not in PREDICTIONS or kind == "edm":
            raise ValueError(f"prediction_type={kind!r} is not one of {sorted(set(PREDICTIONS) - {'edm'})}.")
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(f"{name} has no alphas_cumprod: prediction_type={kind!r} needs a discrete VP schedule.")
        return PREDICTIONS[kind](alphas_cumprod)  # type: ignore[call-arg]

    def grid(
        self, n: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[int] | None, mu: float | None
    ) -> Tensor:
        """The grid the pipeline's own scheduler would use: spacing, Karras or beta sigmas, shift, custom sigmas."""
        scheduler = self.grid_scheduler
        known = inspect.signature(scheduler.set_timesteps).parameters
        given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {k: v for k, v in given.items() if v is not None}
        if refused := sorted(given.keys() - known.keys() - {"mu"}):
            raise ValueError(f"{type(scheduler).__name__} takes no custom {refused}: give num_inference_steps only.")
        if sigmas is None and timesteps is None:
            given["num_inference_steps"] = n
        scheduler.set_timesteps(**{k: v for k, v in given.items() if k in known})
        levels = getattr(scheduler, "sigmas", None)
        times = scheduler.timesteps
        if levels is None or len(levels) != len(times) + 1:
            if not isinstance(self.prediction, VariancePreserving):
                raise ValueError(f"{type(scheduler).__name__} publishes no sigmas: give grid={{...}} instead.")
            levels = torch.cat([self.prediction.sigma(times), torch.zeros(1)])
        levels = torch.as_tensor(levels).detach().cpu().double()
        return 1 - levels if getattr(self.prediction, "inverted", False) else levels


def _euler(prediction_type: str) -> str:
    return "FlowMatchEulerDiscreteScheduler" if prediction_type == "flow_prediction" else "EulerDiscreteScheduler"


def _build(name: str, config: Mapping[str, Any]) -> Any:
    return getattr(diffusers, name)(**{k: config[k] for k in _parameters(name) if config.get(k) is not None})


def defaults(name: str) -> dict[str, Any]:
    """What a diffusers class takes for settings that a configuration of it lacks, as those of older releases do."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
