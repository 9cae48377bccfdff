"""Offline, seeded, one thread, on the CPU: in child processes too."""

import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

torch.set_num_threads(1)
settings.register_profile("dywspan", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("dywspan")
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def pytest_configure(config: pytest.Config) -> None:
    """Only ``pytest -m gpu`` sees accelerators: numbers of two devices differ. ``BEFORE`` is what was asked for."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("BEFORE", json.dumps({name: os.environ.get(name) for name in ON_THE_CPU}))
        os.environ |= ON_THE_CPU


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With ``DYWSPAN_NO_SKIP=1`` a skip is a failure: for environments that have everything."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("DYWSPAN_NO_SKIP") == "1":
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr[-1]}"
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def network() -> Callable[..., Tensor]:
    """A network that is nonlinear in the sample and smooth in the time, so that an error in either shows."""

    def output(sample: Tensor, t: Tensor) -> Tensor:
        phase = t.to(sample.dtype) / 400
        return 0.6 * torch.tanh(1.3 * sample + torch.sin(phase)) + 0.3 * torch.cos(2 * phase) * sample

    return output
