"""What every solver here shares: diffusers' scheduler interface around a :class:`Plan` and a :class:`State`.

A subclass says which sources of schedules it has (``_sources``) and may add to a plan (``_plan``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..core.layout import Size
from .configuration import Configured
from .hosts import HOSTS, Host
from .outputs import Factor, SolverOutput, SolverTuple
from .plan import Plan, State, advance, make_plan, noising, without_variance
from .sources import Request, Source, asked


class SolverScheduler(Configured):
    """Abstract. Between steps the sample is kept scaled as the network wants it, so that pipelines which never call
    ``scale_model_input`` work; the levels told to the network depend on the schedule alone and are the ``timesteps``.

    Attributes:
        plan: of the run that ``set_timesteps`` prepared; None before.
        state: where that run is; a step replaces it.
        request, source: what the plan was made for, and from.
    """

    _compatibles = sorted(HOSTS)

    def _prepare(self) -> None:
        """The attributes before ``set_timesteps``."""
        self.plan: Plan | None = None
        self.state = State()
        self.request: Request | None = None
        self.source: Source | None = None
        self.guidance_scale: float | None = None
        self.latent_size: Size | None = None
        self.whole: int | None = None  # steps of a whole run, if the next ones are to be the end of one
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.config["num_train_timesteps"] - 1, -1, -1, dtype=torch.float32)
        self.sigmas = torch.zeros(0)
        self._host: tuple[Any, Host] | None = None

    # ------------------------------------------------------------------ configuration

    @property
    def host(self) -> Host:
        """The pipeline's own scheduler class, built of the present configuration when needed."""
        if self._host is None or self._host[0] is not self.config:
            self._host = self.config, Host(self.config)
        return self._host[1]

    # Of the host's noise schedule, which training scripts read; no attributes where it has none, as on flow models.
    betas = property(lambda self: self.host.scheduler.betas)
    alphas_cumprod = property(lambda self: self.host.scheduler.alphas_cumprod)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # ------------------------------------------------------------------ the plan

    @abstractmethod
    def _sources(self, steps: int) -> Iterable[Source]:
        """Those that have a schedule of ``steps`` steps, best first.

        Raises:
            ValueError: there are none.
        """

    def _plan(self, begin: int, device: str | torch.device | None) -> Plan:
        """The plan of a run that begins at a step."""
        assert self.request is not None and self.source is not None
        host, schedule = self.request.host, self.source.schedule(self.request, begin)
        options: dict[str, Any] = {"as_diffusers": self.source.as_diffusers, "clip": host.clip}
        return make_plan(schedule, host.prediction, begin=begin, device=device, **options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the number of steps; a new run begins.

        Args:
            num_inference_steps: network evaluations (steps, for two-stage solvers).
            device: where ``timesteps`` lives.
            timesteps, sigmas: a custom grid. A learned table has its own: only their number counts then.
            mu: the pipeline's resolution-dependent shift.

        Raises:
            ValueError: no table for this number of steps and no classical solver to fall back on, ``timesteps`` and
                ``sigmas`` given together, or values that are no grid.
        """
        request = asked(self.host, num_inference_steps, timesteps, sigmas, mu)
        source = next(iter(self._sources(request.steps)))
        self.request = replace(request, guidance_scale=self.guidance_scale, whole=self.whole)
        self.source, self.num_inference_steps = source, request.steps
        self.state = State()
        self._publish(self._plan(0, device))

    def _publish(self, plan: Plan) -> None:
        """What pipelines read of a plan."""
        levels = plan.schedule.levels[plan.skipped :].detach().float()
        self.plan, self.timesteps = plan, plan.timesteps
        self.sigmas = 1 - levels if getattr(self.host.prediction, "inverted", False) else levels

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to become the first sample: start level, input scale and AFS in one.

        The product carries a gradient where the first step's time scale and, with AFS, weight have one.
        """
        if self.plan is None or self.state.index is not None:
            return 1.0  # to pipelines that ask before set_timesteps, the last run is nothing
        return Factor.of(self.plan.start, self._scaled)

    def _scaled(self) -> None:
        if self.state.index is None:
            self.state = replace(self.state, scaled=True)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Identity: the sample is kept as the network wants it.

        Raises:
            ValueError: what is to be scaled is no sample.
        """
        if isinstance(sample, Tensor) and sample.ndim == 0:
            raise ValueError(
                "This pipeline asks how levels are scaled, to make its network's prediction itself (as "
                "StableDiffusionLatentUpscalePipeline does): no solver here can replace its scheduler."
            )
        return sample

    # ------------------------------------------------------------------ where in the plan

    step_index = property(lambda self: self.state.index)
    begin_index = property(lambda self: self.state.begin)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step the run will begin at.

        A continuous solver is written anew, for the levels that are left. The pipeline has its part of ``timesteps`` by
        then, so they change in place: any other time would be that of another level.
        """
        plan, source, self.state = self.plan, self.source, replace(self.state, begin=begin_index)
        if plan is None or source is None or not source.written_for:
            return
        if begin_index != plan.begin and 0 <= begin_index < len(plan.times):
            late = self._plan(begin_index, plan.timesteps.device)
            with torch.no_grad():
                plan.timesteps.copy_(late.timesteps)
            self._publish(replace(late, timesteps=plan.timesteps))

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Index of a timestep in ``timesteps``, see :meth:`Plan.index`.

        Raises:
            ValueError: it is not in the schedule, or there is none yet.
        """
        if self.plan is None:
            raise ValueError("Call set_timesteps before step: no number of inference steps was chosen.")
        return self.plan.index(timestep, self.state.expected)

    # ------------------------------------------------------------------ one step

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One solver step. Source: DyWeight algorithm 1.

        Args:
            model_output: the network's output at ``timestep`` (guidance applied); a learned variance is dropped.
            timestep: an element of ``timesteps``.
            sample: the current sample, same shape.
            generator: unused, there is no noise.
            per_token_timesteps: LTXCondition, SANA-WM: levels of tokens that they keep themselves.
            options: of other schedulers' steps; they must be off.

        Returns:
            ``prev_sample``, in ``sample.dtype``, and ``pred_original_sample``, the estimate of x0, made when asked for.

        Raises:
            ValueError: no such timestep, an output of another shape, or an option that no ODE solver has.
        """
        options.pop("use_clipped_model_output", None)  # the direction always follows the clipped estimate
        if on := {k: v for k, v in options.items() if isinstance(v, Tensor) or v not in (None, False, 0)}:
            raise ValueError(f"step has no {on}: it solves an ODE, without noise and without another estimate of x0.")
        i = self.index_for_timestep(timestep)
        plan = self.plan
        assert plan is not None and self.request is not None
        if not 0 <= i < len(plan.times):
            raise ValueError(f"Step {i} is past the end of {len(plan.times)} steps: call set_timesteps again.")
        if i != self.state.index:  # a first step, or a jump: the past derivatives are not this state's past
            plan, self.state = self._starting(i), replace(self.state, history=(), derivatives=())
            self.request = replace(self.request, latent_size=self.latent_size)
        if plan.lift is not None and plan.lift.conditions.device != sample.device:
            self.plan = plan = replace(plan, lift=plan.lift.to(sample.device))
        if per_token_timesteps is not None:
            model_output = -model_output  # their velocity has the other sign
        output = without_variance(model_output, sample)
        prev_sample, self.state, estimate = advance(plan, self.state, i, output, sample, self.request.latent_size)
        if i + 1 == len(plan.times):
            self._ended()
        if torch.compiler.is_compiling():  # a graph cannot hold what is made when asked for
            return SchedulerOutput(prev_sample) if return_dict else (prev_sample, estimate())
        return SolverOutput(prev_sample, estimate) if return_dict else SolverTuple(prev_sample, estimate)

    def _ended(self) -> None:
        """What a run remembers ends with it: nothing stays on a device that the pipeline leaves."""
        self.state = replace(self.state, history=(), derivatives=())

    def _starting(self, i: int) -> Plan:
        """The plan for a run that begins at step ``i``, with the same levels and times."""
        plan = self.plan
        assert plan is not None and self.source is not None
        if i == plan.begin or not self.source.builds_up:
            return plan
        self.plan = replace(self._plan(i, plan.timesteps.device), timesteps=plan.timesteps)
        return self.plan

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples to the levels of ``timesteps``: alpha * x0 + sigma * noise, in the network's frame.

        Elements of the schedule mean its calibrated levels; all others, integers among them, those of the network's
        own noise schedule.
        """
        self._scaled()
        factors = noising(self.host.prediction, self.plan, self.state.expected, timesteps)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        clean, rough = (f.to(original_samples.device, dtype).reshape(shape) for f in factors)
        return (clean * original_samples.to(dtype) + rough * noise.to(dtype)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """:meth:`add_noise` with the argument order of flow-matching pipelines."""
        if noise is None:
            raise ValueError("scale_noise needs the noise: pass noise=torch.randn_like(sample).")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the run's graph behind: only leaves can be copied."""
        plan, source = self.plan and self.plan.detach(), self.source and self.source.detach()
        state = self.__dict__ | {"plan": plan, "source": source, "state": self.state.detach(), "_host": None}
        return state | {"timesteps": self.timesteps.detach() if plan is None else plan.timesteps}
