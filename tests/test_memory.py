"""Memory of learning: the measure is exact, and recomputing makes it flat in the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainable import fresh
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from dywspan.bench.memory import STUDENTS, memory
from dywspan.pipelines.memory import peak_bytes

EMOJI = str(Path(__file__).parent.parent / "examples" / "emoji-sd")
NUMBERS, BYTES = 1024, 4096  # a whole number of CUDA's blocks of 512


def _chain(y: Tensor, length: int) -> Tensor:
    for _ in range(length):
        y = y.sin()  # saves its input
    return y


def _gradient(device: str, length: int, pieces: int = 1, recompute: bool = False) -> Callable[[], None]:
    """Forward and backward through ``pieces`` chains of ``length`` operations, one after the other."""
    x, g = torch.randn(NUMBERS, device=device, requires_grad=True), torch.randn(NUMBERS, device=device)

    def run() -> None:
        y = x
        for _ in range(pieces):
            y = checkpoint(_chain, y, length, use_reentrant=False) if recompute else _chain(y, length)
        y.backward(g)

    return run


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_chain_needs_what_its_backward_pass_was_promised(length: int) -> None:
    """At the peak: every output, and cos(x) and the gradient that the last operation's backward pass makes of it."""
    assert peak_bytes(_gradient("cpu", length))[1] == (length + 2) * BYTES


@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_a_checkpoint_holds_one_piece_and_the_bounds_between_pieces(pieces: int) -> None:
    """At the peak, in the last piece: every piece's end, what is inside the last, cos(x) and the gradient."""
    length = 5
    plain, recomputed = (peak_bytes(_gradient("cpu", length, pieces, again))[1] for again in (False, True))
    assert plain == (pieces * length + 2) * BYTES
    assert recomputed == (pieces + (length - 1) + 2) * BYTES


def test_what_is_freed_is_subtracted_and_what_is_no_new_storage_not_added() -> None:
    x = torch.randn(NUMBERS)

    def temporaries() -> None:
        for _ in range(5):
            x.sin()

    def same_storage() -> Tensor:
        x.add_(1).view(8, -1)[2:].T.detach().mul_(2)
        return x.expand(3, -1)

    def one_part_of_a_storage_holds_it_all() -> Tensor:
        part = x.sin()[:1]
        x.cos()
        return part

    def peak(run: Callable[[], object]) -> int:
        return peak_bytes(run)[1]

    assert peak(temporaries) == BYTES
    assert peak(same_storage) == 0
    assert peak(one_part_of_a_storage_holds_it_all) == 2 * BYTES
    assert peak(lambda: x.double()) == 2 * BYTES, "bytes, not numbers"
    assert peak(lambda: torch.empty(NUMBERS).sin_().exp_()) == BYTES
    assert peak_bytes(lambda: x)[0] is x


def test_it_counts_what_the_allocator_hands_out() -> None:
    """The profiler's record of every allocation. Convolutions take much for themselves, on some processors."""
    subject = fresh("FluxPipeline")
    pairs = subject.pairs(range(4))
    student = subject.student("dyweight", pairs.endpoints.shape[1:])

    def run() -> None:
        subject.gradients(student, pairs)

    run()
    with profile(profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert 0.95 * peak < peak_bytes(run)[1] <= peak


def test_an_accelerator_is_asked_for_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    live, peak = [100], [900]  # an earlier peak

    def run() -> None:
        peak[0], live[0] = 350, 200

    statistics = {
        "reset_peak_memory_stats": lambda device: peak.__setitem__(0, live[0]),
        "memory_allocated": lambda device: live[0],
        "max_memory_allocated": lambda device: peak[0],
    }
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**statistics))
    assert peak_bytes(lambda: None, "cuda")[1] == 0
    assert peak_bytes(run, "cuda")[1] == 250


def test_a_device_whose_allocator_keeps_no_peak_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    with pytest.raises(ValueError, match=r"device='mps' .* measure on cpu, cuda"):
        peak_bytes(lambda: None, "mps")


@pytest.mark.weekly
@pytest.mark.slow
def test_recomputing_makes_memory_flat_in_the_number_of_steps() -> None:
    rows = memory(EMOJI, batch_size=1, device="cpu")
    ratios = {(r["solver"], r["recompute"]): r["ratio_to_3_steps"] for r in rows if r["num_inference_steps"] == 9}
    assert ratios.keys() == {(solver, again) for solver in STUDENTS for again in (False, True)}
    for (solver, again), ratio in ratios.items():
        assert ratio <= 1.15 if again else ratio > 2.5, f"{solver}: 9 steps need {ratio:.2f} of what 3 need"
    beside_sampling = {(r["optimizer"], r["recompute"]): r["ratio_to_sampling"] for r in rows}
    assert 1 < beside_sampling["least_squares", None] < 1.4 < 4 < beside_sampling["adam", True]
