"""How a solver's configuration is taken over from another scheduler, read and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..artifact import compact, write_atomically
from ..core.check import shown
from .files import broken_downloads_named
from .hosts import Host, parameters, taken_over

_OF_LOADING = {"dtype", "torch_dtype", "device_map", "low_cpu_mem_usage", "use_safetensors", "variant"}


class Configured(SchedulerMixin, ConfigMixin):
    """Abstract. A configuration that keeps its host's class and defaults, in files that are never half written."""

    _host: tuple[Any, Host] | None = None

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

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take over from another scheduler: its noise schedule, network convention and default grid.

        Args:
            config: a scheduler, or its configuration.
            kwargs: settings of this class to change.

        Raises:
            ValueError: no class of ``HOSTS``, or damaged settings.
        """
        if isinstance(config, SchedulerMixin | Mapping):
            config = taken_over(config, cls, kwargs.pop("host_scheduler", None))
            unknown = sorted(kwargs.keys() - parameters(cls) - config.keys() - _OF_LOADING)
            if unknown and not return_unused_kwargs:
                raise ValueError(f"{cls.__name__} has no settings {unknown}; it has {sorted(parameters(cls))}.")
        return super().from_config(config, return_unused_kwargs, **kwargs)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: Any,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As diffusers', and a connection that breaks is an ``OSError`` that names the repository, like its others."""
        source = pretrained_model_name_or_path
        with broken_downloads_named(source):
            try:
                found = super().load_config(
                    source, return_unused_kwargs, return_commit_hash=return_commit_hash, **kwargs
                )
            except RecursionError:
                raise ValueError(f"{source} is damaged: its values are nested too deeply. Download it again.") from None
        config = found[0] if isinstance(found, tuple) else found
        if not isinstance(config, Mapping):
            raise ValueError(f"{source} is damaged: it holds {shown(config)}, not settings by name. Download it again.")
        return found

    def to_json_string(self) -> str:
        return compact(super().to_json_string())

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Atomic, see :func:`dywspan.artifact.write_atomically`."""
        write_atomically(json_file_path, self.to_json_string().encode())
