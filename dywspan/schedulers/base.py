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
from .hosts import HOSTS
from .outputs import Factor, answer
from .plan import Plan, State, advance, make_plan, noised, noising, without_variance
from .sources import LateStart, Request, Source, asked


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
        self.source, self.state, self.num_inference_steps = source, State(), request.steps
        self._publish(self._plan(0, device))

    def _publish(self, plan: Plan) -> None:
        """What pipelines read of a plan."""
        levels = plan.schedule.levels[plan.skipped :].detach().float()
        self.plan, self.timesteps = plan, plan.timesteps
        self.sigmas = 1 - levels if getattr(self.host.prediction, "inverted", False) else levels

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to become the first sample; a tensor's product carries its gradient."""
        if self.plan is None or self.state.step is not None:
            return 1.0  # to pipelines that ask before set_timesteps, the last run is nothing
        return Factor.of(self.plan.start, self._scaled)

    def _scaled(self) -> None:
        if self.state.step is None:
            self.state = self.state._replace(scaled=True)

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

    step_index = property(lambda self: self.state.step)
    begin_index = property(lambda self: self.state.begin)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step the run will begin at.

        Raises:
            LateStart: a continuous solver is another one there, with other ``timesteps``: see :meth:`begin_at`.
        """
        self.state = self.state._replace(begin=begin_index)
        if self._is_another(begin_index):
            raise LateStart(begin_index)

    def begin_at(self, begin_index: int) -> None:
        """Plan the run anew, to begin at this step. ``timesteps`` is another tensor then: take it again."""
        if self.plan is not None:
            self.state = self.state._replace(begin=begin_index)
            self._publish(self._plan(begin_index, self.plan.timesteps.device))

    def _is_another(self, begin: int) -> bool:
        """Whether a run that begins at this step is of a solver that the present plan is not made of."""
        plan, source = self.plan, self.source
        return (
            plan is not None
            and source is not None
            and source.written_for
            and begin != plan.begin
            and 0 <= begin < len(plan.times)
        )

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
        i, plan = self.index_for_timestep(timestep), self.plan
        assert plan is not None and self.request is not None
        if not 0 <= i < len(plan.times):
            raise ValueError(f"Step {i} is past the end of {len(plan.times)} steps: call set_timesteps again.")
        if i != self.state.step:  # a first step, or a jump: the past derivatives are not this state's past
            plan, self.state = self._starting(i), self.state.remember((), (), None)
            if self.request.latent_size != self.latent_size:
                self.request = replace(self.request, latent_size=self.latent_size)
        self.plan = plan = plan.on(sample.device)
        if per_token_timesteps is not None:
            model_output = -model_output  # their velocity has the other sign
        output = without_variance(model_output, sample)
        prev_sample, self.state, estimate = advance(plan, self.state, i, output, sample, self.request.latent_size)
        if i + 1 == len(plan.times):
            self._ended()
        return answer(prev_sample, estimate, return_dict)

    def _ended(self) -> None:
        """What a run remembers ends with it: nothing stays on a device that the pipeline leaves."""
        self.state = self.state.remember((), (), self.state.step)

    def _starting(self, i: int) -> Plan:
        """The plan for a run that begins at step ``i``, with the same levels and times."""
        plan, source = self.plan, self.source
        assert plan is not None and source is not None
        if self._is_another(i):
            raise LateStart(i)
        if i == plan.begin or not source.builds_up:
            return plan
        return replace(self._plan(i, plan.timesteps.device), timesteps=plan.timesteps)

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples to the levels of ``timesteps``: alpha * x0 + sigma * noise, in the network's frame.

        Elements of the schedule mean its calibrated levels; all others, integers among them, those of the network's
        own noise schedule.
        """
        self._scaled()
        at = noising(self.host.prediction, self.plan, self.state.expected, timesteps)
        return noised(original_samples, noise, *at)

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
