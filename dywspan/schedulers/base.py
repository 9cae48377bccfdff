"""What every solver here shares: diffusers' scheduler interface around ``core.step``.

A subclass says which :class:`Schedule` a number of steps has (``set_timesteps``) and may add to a step (``_advance``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..artifact import compact, write_atomically
from ..core.prediction import Flow, VariancePreserving
from ..core.step import History, Schedule, analytical_derivative, combine, step
from ._host import Host, defaults, host_class_name


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """Abstract. Between steps the sample is kept scaled as the network wants it, so that pipelines which never call
    ``scale_model_input`` work; the levels told to the network depend on the schedule alone and are the ``timesteps``.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ]

    def _prepare(self, num_train_timesteps: int) -> None:
        """The state before ``set_timesteps``."""
        self.num_inference_steps: int | None = None
        self.timesteps = self._clock = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._times: list[float] = self.timesteps.tolist()
        self.sigmas = torch.zeros(0)
        self._host: Host | None = None
        self._schedule: Schedule | None = None
        self._grid: Tensor | None = None  # a classical solver's grid; None while a learned table runs
        self._reset()

    # ------------------------------------------------------------------ configuration

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from any scheduler's configuration, defaulted keys included, and remember which class it was."""
        if isinstance(config, Mapping):
            config = {k: v for k, v in config.items() if k != "_use_default_values"}
            if (name := host_class_name(config, cls)) is not None:
                config = {**defaults(name), **config, "host_scheduler": name}
                if Host.is_flow(name, config):
                    config["prediction_type"] = "flow_prediction"
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: Any,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As diffusers', and a connection that breaks is an ``OSError`` that names the repository, like its others."""
        with broken_downloads_named(pretrained_model_name_or_path):
            return super().load_config(
                pretrained_model_name_or_path, return_unused_kwargs, return_commit_hash=return_commit_hash, **kwargs
            )

    def to_json_string(self) -> str:
        return compact(super().to_json_string())

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Atomic, see :func:`dywspan.artifact.write_atomically`."""
        write_atomically(json_file_path, self.to_json_string().encode())

    @property
    def host(self) -> Host:
        """The pipeline's own scheduler class, built when first needed."""
        if self._host is None:
            self._host = Host(self.config)
        return self._host

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # ------------------------------------------------------------------ the schedule

    def _publish(self, schedule: Schedule, device: str | torch.device | None, begin: int = 0) -> None:
        """All ``step`` needs, as Python floats (0-dim tensors where a gradient is wanted): no device reads later.

        Args:
            begin: the step that its rows are made to begin at.
        """
        prediction = self.host.prediction
        self._schedule, self._skipped = schedule, int(schedule.afs)
        levels, queries = schedule.levels, schedule.queries
        learned, sigma_0, sigma_n = self._grid is None, levels[0], levels[-1:]
        # The network's own frame at each evaluation. A learned solver ends unscaled, at the paper's estimate of x0;
        # a classical one as diffusers' do, which matters only on a grid that ends above 0.
        keeps_frame = not learned and isinstance(prediction, VariancePreserving)
        end = prediction.input_scale(sigma_n) if keeps_frame else torch.ones_like(sigma_n)
        scales = torch.cat([prediction.input_scale(queries), end])
        # A learned table starts from sigma_0 * noise, as in the paper; a classical one at diffusers' unit variance.
        start = sigma_0 if learned and not isinstance(prediction, Flow) else 1 / prediction.input_scale(sigma_0)
        self._afs_factor = None
        if schedule.afs:
            if isinstance(prediction, Flow):
                raise ValueError("AFS is defined for VE and VP models only: distil this flow table without it.")
            # x_1 = x_0 * (1 + c_00 / sqrt(1 + sigma_0^2)): linear in x_0, so the noise is scaled and the call skipped.
            self._afs_factor = analytical_derivative(schedule.increments[0, 0], sigma_0) + 1
            start = start * self._afs_factor
        self._scales = scalars(scales)
        self._levels = scalars(levels)
        self._queries = scalars(queries)
        self._rows = list(schedule.increments) if schedule.increments.requires_grad else schedule.increments.tolist()
        start = start * scales[self._skipped]
        self._start = start if start.requires_grad else float(start)
        times = prediction.timestep(queries[self._skipped :])
        self._times: list[float] = times.detach().float().tolist()
        self.timesteps = self._clock = times.to(torch.float32).to(device)
        published = levels[self._skipped :].detach().float()
        self.sigmas = 1 - published if getattr(prediction, "inverted", False) else published
        self._rows_begin = begin
        self._reset()

    def _reset(self) -> None:
        self._history: History = ()
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._noise_is_raw = True

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """What unit noise is multiplied by to become the first sample: start level, input scale and AFS in one.

        A 0-dim tensor where a gradient is wanted: it depends on the first step's time scale and, with AFS, weight.
        """
        self._noise_is_raw = False
        # Some pipelines ask before set_timesteps: what the last run started from is nothing to them.
        return self._start if self._schedule is not None and self._step_index is None else 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Identity: the sample is kept as the network wants it."""
        return sample

    # ------------------------------------------------------------------ where in the schedule

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    @property
    def _expected_index(self) -> int | None:
        return self._step_index if self._step_index is not None else self._begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Index of a timestep in ``timesteps``, without reading from the device where it is a view of it.

        Raises:
            ValueError: it is not in the schedule.
        """
        if isinstance(timestep, Tensor):
            pointer = timestep.untyped_storage().data_ptr()
            if pointer != 0 and pointer == self._clock.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - self._clock.storage_offset())
        expected = self._expected_index
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and expected is not None:
            return expected  # reading the value would wait for the device
        value = float(timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep)
        if expected is not None and expected < len(self._times) and _close(value, self._times[expected]):
            return expected
        nearest = min(range(len(self._times)), key=lambda i: abs(value - self._times[i]))
        if not _close(value, self._times[nearest]):
            raise ValueError(f"timestep={value} is not in the schedule {self._times}: pass elements of `timesteps`.")
        return nearest

    # ------------------------------------------------------------------ one step

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One solver step. Source: DyWeight algorithm 1.

        Args:
            model_output: the network's output at ``timestep`` (guidance applied); a learned variance is dropped.
            timestep: an element of ``timesteps``.
            sample: the current sample, same shape.
            generator: unused, there is no noise.

        Returns:
            The next sample in ``sample.dtype``; arithmetic is float32 or wider.
        """
        if self._schedule is None:
            raise ValueError("Call set_timesteps before step: no number of inference steps was chosen.")
        i = self.index_for_timestep(timestep)
        if not 0 <= i < len(self._times):
            raise ValueError(f"Step {i} is past the end of {len(self._times)} steps: call set_timesteps again.")
        if i != self._step_index:  # a first step, or a jump: the past derivatives are not this state's past
            self._start_at(i)
        row = i + self._skipped
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, scale = sample.to(dtype), self._scales[row]
        if i == 0 and self._noise_is_raw and self._start != 1:
            x = x * self._start  # this pipeline does not scale its noise by init_noise_sigma
        if self._skipped and i == 0:
            self._history = (analytical_derivative(1 / (scale * self._afs_factor), self._levels[0]) * x,)
        if kwargs.get("per_token_timesteps") is not None:
            # LTXCondition, SANA-WM: tokens of other levels they keep themselves; the velocity has the other sign.
            model_output = -model_output
        if model_output.shape[1:2] != sample.shape[1:2]:
            model_output = model_output[:, : sample.shape[1]]
        # x stays in the network's frame: what leads out of it and into the next is in the coefficients.
        p, q = self.host.prediction.slope(self._levels[row], self._queries[row])
        d = combine((q, model_output.to(dtype)), (p / scale, x))
        prev_sample = self._advance(row, x, d).to(sample.dtype)
        self._step_index = i + 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def state(self, i: int, prev_sample: Tensor) -> Tensor:
        """x_{i+1} in the solver frame, of what the i-th ``step`` returned."""
        return prev_sample / self._scales[i + self._skipped + 1]

    def _advance(self, row: int, x: Tensor, d: Tensor) -> Tensor:
        """x_{i+1} from the state and the newest derivative, each state in its network's frame; keeps the history."""
        x, self._history = step(self._rows[row], x, d, self._history, *self._scales[row : row + 2])
        return x

    def _start_at(self, i: int) -> None:
        """Forget the past: this is the first step, or not the one after the last."""
        self._history = ()

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples to the levels of ``timesteps``: alpha * x0 + sigma * noise, in the network's frame.

        Timesteps of the schedule use its calibrated levels; any others the model's own noise schedule.
        """
        self._noise_is_raw = False
        alpha, sigma, scale = self._noising(timesteps)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        clean, rough = (f.to(original_samples.device, dtype).reshape(shape) for f in (alpha * scale, sigma * scale))
        return (clean * original_samples.to(dtype) + rough * noise.to(dtype)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """:meth:`add_noise` with the argument order of flow-matching pipelines."""
        if noise is None:
            raise ValueError("scale_noise needs the noise: pass noise=torch.randn_like(sample).")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def _noising(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, input scale) per timestep, on the CPU."""
        prediction = self.host.prediction
        # While a pipeline samples, they are one level repeated, and looking would wait for the device; in training
        # scripts, which may have sampled before, they may be any.
        expected = self._expected_index
        known = expected is not None and expected < len(self._times) and timesteps.device.type != "cpu"
        try:
            if self._schedule is None or not (known or timesteps.unique().numel() == 1):
                raise ValueError
            row = self.index_for_timestep(timesteps if known else timesteps.cpu()) + self._skipped
        except ValueError:
            sigma = tau = prediction.sigma(timesteps.detach().cpu().reshape(-1))
        else:
            row = min(row, len(self._queries) - 1)
            sigma = self._schedule.levels[row : row + 1].detach()
            tau = self._schedule.queries[row : row + 1].detach()
        return prediction.signal(sigma), sigma, prediction.input_scale(tau)

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the run's graph behind: only leaves can be copied."""
        state = self.__dict__.copy()
        state.update(_history=(), timesteps=self.timesteps.detach())
        if self._schedule is not None:
            s = self._schedule
            state["_schedule"] = replace(s, **{k: v.detach() for k, v in vars(s).items() if isinstance(v, Tensor)})
            state["_clock"] = state["timesteps"]
            for name in ("_scales", "_levels", "_queries"):
                state[name] = [_number(v) for v in getattr(self, name)]
            state["_rows"] = [[_number(c) for c in row] for row in self._rows]
            state["_afs_factor"] = None if self._afs_factor is None else _number(self._afs_factor)
            state["_start"] = _number(self._start)
        return state


@contextlib.contextmanager
def broken_downloads_named(source: Any) -> Iterator[None]:
    """huggingface_hub lets its HTTP library's errors through, and has changed libraries."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "requests")):
            raise
        raise OSError(
            f"The download of {source} broke off ({error}). Try again, or use what is in the cache: "
            "local_files_only=True."
        ) from error


def scalars(values: Tensor) -> list[Any]:
    return list(values) if values.requires_grad else values.tolist()


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _close(value: float, time: float) -> bool:
    """Equal up to what a bfloat16 pipeline makes of a timestep."""
    return abs(value - time) <= 2**-8 * abs(time) + 1e-6
