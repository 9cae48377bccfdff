"""Offline, seeded, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

torch.set_num_threads(1)
settings.register_profile("dywspan", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("dywspan")


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
