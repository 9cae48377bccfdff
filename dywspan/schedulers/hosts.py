"""Hosts: the diffusers schedulers that a solver may replace, and what they know of the network and the default grid.

Nothing of it is written again here: the pipeline's scheduler class is built from the configuration and asked.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..core.check import number, shown
from ..core.prediction import EDM, PREDICTIONS, Flow, Prediction, VariancePreserving

Config = Mapping[str, Any]


def _variance_preserving(config: Config, scheduler: Any) -> Prediction:
    kind = config["prediction_type"]
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # Stable Video Diffusion
        return EDM(1.0, velocity=True)
    if kind == "flow_prediction":
        if not config.get("use_flow_sigmas"):
            raise ValueError("prediction_type='flow_prediction' needs use_flow_sigmas=True, or a FlowMatch scheduler.")
        return _flow(config, scheduler)
    known = sorted(k for k, c in PREDICTIONS.items() if issubclass(c, VariancePreserving))
    if kind not in known:
        raise ValueError(f"prediction_type={shown(kind)} is not one of {[*known, 'flow_prediction']}.")
    alphas_cumprod = scheduler.alphas_cumprod
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2 or not bool(alphas_cumprod.isfinite().all()):
        raise ValueError(
            f"The betas make no noise schedule: their alphas_cumprod are {shown(alphas_cumprod.tolist())}."
        )
    return PREDICTIONS[kind](alphas_cumprod)  # type: ignore[call-arg]


def _edm(config: Config, scheduler: Any) -> Prediction:
    if config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type={shown(config['prediction_type'])} is not 'epsilon' or 'v_prediction'.")
    sigma_data = number("sigma_data", config.get("sigma_data", 0.5), 1e-6, 1e6)
    return EDM(sigma_data, velocity=config["prediction_type"] == "v_prediction")


def _flow(config: Config, scheduler: Any) -> Prediction:
    if number("sigma_max", config.get("sigma_max") or 1.0) > 1:  # as Cosmos' pipelines register
        raise ValueError(
            f"sigma_max={config['sigma_max']}: levels above 1 are no flow's, whatever the scheduler's class."
        )
    return Flow(config["num_train_timesteps"], inverted=bool(config.get("invert_sigmas")))


@dataclass(frozen=True)
class Kind:
    """What solvers need to know of one diffusers scheduler class.

    Attributes:
        prediction: the network's convention, from the configuration and a scheduler built from it.
        grid: the class whose default grid it is, where its own repeats timesteps (two stages, warm-up).
        refuses: settings that mean something no solver here does, with what that is.
    """

    prediction: Callable[[Config, Any], Prediction]
    grid: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)


_EULER = "EulerDiscreteScheduler"
_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
_NEW_NOISE = {"stochastic_sampling": "adds new noise at every step, as models distilled for it need"}

HOSTS: dict[str, Kind] = {
    "DDIMScheduler": Kind(_variance_preserving),
    "DDIMParallelScheduler": Kind(_variance_preserving),
    "DDPMScheduler": Kind(_variance_preserving),
    "DDPMParallelScheduler": Kind(_variance_preserving),
    "PNDMScheduler": Kind(_variance_preserving, grid=_EULER),
    "LMSDiscreteScheduler": Kind(_variance_preserving, grid=_EULER),
    "EulerDiscreteScheduler": Kind(_variance_preserving),
    "EulerAncestralDiscreteScheduler": Kind(_variance_preserving),
    "HeunDiscreteScheduler": Kind(_variance_preserving, grid=_EULER),
    "KDPM2DiscreteScheduler": Kind(_variance_preserving, grid=_EULER),
    "KDPM2AncestralDiscreteScheduler": Kind(_variance_preserving, grid=_EULER),
    "DPMSolverMultistepScheduler": Kind(_variance_preserving),
    "DPMSolverSinglestepScheduler": Kind(_variance_preserving),
    "DPMSolverSDEScheduler": Kind(_variance_preserving, grid=_EULER),
    "DEISMultistepScheduler": Kind(_variance_preserving),
    "UniPCMultistepScheduler": Kind(_variance_preserving),
    "SASolverScheduler": Kind(_variance_preserving),
    "CogVideoXDDIMScheduler": Kind(_variance_preserving),
    "CogVideoXDPMScheduler": Kind(_variance_preserving),
    "EDMEulerScheduler": Kind(_edm),
    "EDMDPMSolverMultistepScheduler": Kind(_edm),
    "FlowMatchEulerDiscreteScheduler": Kind(_flow, refuses=_NEW_NOISE),
    "FlowMatchHeunDiscreteScheduler": Kind(_flow, grid=_FLOW_EULER),
}


class Host:
    """The scheduler class a pipeline came with, asked for its noise schedule and its default grid.

    Args:
        config: any scheduler configuration that has ``host_scheduler`` and that class's own keys.

    Attributes:
        scheduler: a scheduler of that class.
        prediction: the network's convention.

    Raises:
        ValueError: no class of ``HOSTS``, or settings that it or no solver here can honour.
    """

    def __init__(self, config: Config) -> None:
        kind = config["prediction_type"]
        name = config["host_scheduler"] or (_FLOW_EULER if kind == "flow_prediction" else _EULER)
        known = _known(name)
        for key, meaning in known.refuses.items():
            if config.get(key):
                raise ValueError(
                    f"{key}={shown(config[key])}: {name} {meaning}, and no solver here does. Set it to False."
                )
        self.name, self.config = name, config
        self.scheduler = _build(name, config)
        self._grid_scheduler = _build(known.grid, config) if known.grid else self.scheduler
        self.prediction = known.prediction(config, self.scheduler)

    @property
    def clip(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to an estimate of x0: ``thresholding`` or ``clip_sample``; None: nothing."""
        if self.config.get("thresholding"):
            return self.scheduler._threshold_sample
        if self.config.get("clip_sample"):
            limit = self.config.get("clip_sample_range") or 1.0
            return functools.partial(torch.clamp, min=-limit, max=limit)  # can be copied, unlike a lambda
        return None

    def shift(self, mu: float | None) -> float | None:
        """mu of grid "flow", whose shift is e^mu, from what a pipeline calls mu."""
        if mu is None or self.config.get("time_shift_type") != "linear":
            return mu
        return math.log(mu) if mu > 0 else None

    def grid(
        self,
        n: int | None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        mu: float | None = None,
    ) -> Tensor:
        """The grid the pipeline's own scheduler would use: spacing, Karras or beta sigmas, shift, custom sigmas.

        Raises:
            ValueError: what the class itself refuses, or custom levels that do not decrease.
        """
        scheduler, custom = self._grid_scheduler, sigmas is not None or timesteps is not None
        known = inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is not None and isinstance(self.prediction, Flow) and len(sigmas) > 1 and float(sigmas[-1]) == 0:
            sigmas = sigmas[:-1]  # flow schedulers add the last level themselves
        given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {k: v for k, v in given.items() if v is not None}
        if refused := sorted(given.keys() - known.keys() - {"mu"}):
            raise ValueError(f"{type(scheduler).__name__} takes no custom {refused}: give num_inference_steps only.")
        if not custom:
            given["num_inference_steps"] = n
        try:
            scheduler.set_timesteps(**{k: v for k, v in given.items() if k in known})
        except Exception as error:
            raise ValueError(
                f"{type(scheduler).__name__} has no grid for {shown(given)}: {shown(str(error))}"
            ) from error
        levels, times = getattr(scheduler, "sigmas", None), scheduler.timesteps
        if levels is None or len(levels) != len(times) + 1:
            if not isinstance(self.prediction, VariancePreserving):
                raise ValueError(f"{type(scheduler).__name__} publishes no sigmas: give grid={{...}} instead.")
            levels = torch.cat([self.prediction.sigma(times), torch.zeros(1)])
        levels = torch.as_tensor(levels).detach().cpu().double()
        levels = 1 - levels if getattr(self.prediction, "inverted", False) else levels
        if custom and not (bool(levels.isfinite().all()) and bool((levels.diff() < 0).all())):
            raise ValueError(f"Custom sigmas and timesteps must be finite and decrease; they give {levels.tolist()}.")
        return levels


def different_networks(own: Prediction, other: Prediction) -> list[str]:
    """What keeps two networks' conventions apart: their noise levels, and what their outputs mean."""
    if type(own) is not type(other):
        return ["prediction_type"]
    pairs = ((k, v, vars(other)[k]) for k, v in vars(own).items())
    return [k for k, a, b in pairs if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)]


# ---------------------------------------------------------------------------------------- which class a host is of


def taken_over(source: Any, own: type, host: str | None = None) -> dict[str, Any]:
    """The configuration of a scheduler that takes over from ``source``: defaulted keys, and the host's class, in it.

    Args:
        source: a scheduler, or the configuration of one.
        own: the class of the new scheduler.
        host: name of the host's class, where it is told by hand.

    Raises:
        ValueError: it is of no class of ``HOSTS``, or cannot be told from the configuration.
    """
    config = dict(source.config if isinstance(source, SchedulerMixin) else source)  # type: ignore[attr-defined]
    if host is not None:
        name = _ancestor(host)
    elif isinstance(source, SchedulerMixin):
        name = None if type(source) in solvers(own) else _ancestor(type(source))
    else:
        name = _recorded(source, own)
    config.pop("_use_default_values", None)
    if name is None:
        if "order" in config:  # what solver_order was called before 0.2
            config["solver_order"] = config.pop("order")
        others = set().union(*map(parameters, solvers(own))) - parameters(own)
        return {k: v for k, v in config.items() if k not in others}
    config = {**_defaults(name), **config, "host_scheduler": name}
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        config["prediction_type"] = "flow_prediction"
    return config


def _recorded(config: Config, own: type) -> str | None:
    """The class that last made a configuration; None for one of ours, which has its host under ``host_scheduler``.

    A scheduler built in memory does not write its class into its configuration. Then it is the largest class all of
    whose parameters stand in it, and all of whose parameters those are that were left at their defaults.
    """
    family = solvers(own)
    if (name := config.get("_class_name")) is not None:
        return None if any(name == c.__name__ for c in family) else _ancestor(name)
    defaulted, ours = set(config.get("_use_default_values") or ()), set().union(*map(parameters, family))
    if "host_scheduler" in config and defaulted <= ours:
        return None
    found = [n for n, keys in _all_parameters().items() if keys <= config.keys() and defaulted <= keys]
    if not found:
        if {k for k in config if not k.startswith("_")} <= ours:
            return None
        raise ValueError(
            "These settings are those of no diffusers scheduler: pass the scheduler itself, "
            "from_config(pipe.scheduler), or name its kind, host_scheduler='EulerDiscreteScheduler'."
        )
    largest = max(len(_all_parameters()[n]) for n in found)
    alike = [n for n in found if len(_all_parameters()[n]) == largest]
    if len(alike) > 1 and not HOSTS.keys() >= {*alike}:
        raise ValueError(
            f"These settings may be those of {' or '.join(alike)}: pass the scheduler itself, "
            "from_config(pipe.scheduler), or name its kind, host_scheduler=..."
        )
    return min(map(_ancestor, alike), key=[*HOSTS].index)


def solvers(own: type) -> set[type]:
    """The schedulers of this package, ``own`` being one."""
    root = [c for c in own.__mro__ if issubclass(c, SchedulerMixin) and c.__name__ == "SolverScheduler"]
    found = root or [own]
    for c in found:
        found += c.__subclasses__()
    return {*found}


def _ancestor(kind: Any) -> str:
    """The nearest class of ``HOSTS``, of a class or the name of one in diffusers."""
    found = getattr(diffusers, kind, None) if isinstance(kind, str) else kind
    for c in getattr(found, "__mro__", ()):
        if c.__name__ in HOSTS:
            return c.__name__
    name = getattr(kind, "__name__", kind)
    _known(name)
    return name


def _known(name: Any) -> Kind:
    """The record of a class.

    Raises:
        ValueError: it is none of ``HOSTS``, or the installed diffusers lacks it.
    """
    if not isinstance(name, str) or name not in HOSTS:
        raise ValueError(
            f"{shown(name)} is not one of the schedulers that a solver here can replace: it is not known to integrate "
            "an ODE from noise to data. If its network is called and trained as that of one that is known, name that: "
            f"host_scheduler=..., one of {sorted(HOSTS)}."
        )
    if not isinstance(getattr(diffusers, name, None), type):
        raise ValueError(f"host_scheduler={name!r} is no scheduler of the installed diffusers: upgrade diffusers.")
    return HOSTS[name]


def _build(name: str, config: Config) -> Any:
    """A scheduler of a class, from those settings of a configuration that it has.

    Raises:
        ValueError: it refuses them.
    """
    known = parameters(getattr(diffusers, name)) - {"solver_order"}  # ours, which may be one that it lacks
    given = {k: config[k] for k in known if config.get(k) is not None}
    try:
        return getattr(diffusers, name)(**given)
    except Exception as error:  # diffusers raises whatever comes: NotImplementedError, IndexError, RuntimeError, ...
        said = isinstance(error, ValueError | NotImplementedError | ImportError)
        own, usual = (
            shown(str(error)) if said else "one of them has a type or size that it does not take",
            _defaults(name),
        )
        changed = ", ".join(f"{k}={shown(v)}" for k, v in sorted(given.items()) if v is not usual[k] and v != usual[k])
        raise ValueError(f"{name} cannot be made with {changed}: {own}") from error


def _defaults(name: str) -> dict[str, Any]:
    """What a class takes for settings that a configuration of it lacks, as those of older releases do."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def parameters(kind: Any) -> set[str]:
    """Names of the settings of a scheduler class."""
    return set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}


@functools.cache
def _all_parameters() -> dict[str, set[str]]:
    """Of every scheduler class of the installed diffusers."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    kinds = {n: getattr(diffusers, n, None) for n in names}
    kinds = {n: c for n, c in kinds.items() if isinstance(c, type) and issubclass(c, SchedulerMixin)}
    return {n: parameters(c) for n, c in kinds.items() if c is not SchedulerMixin}
