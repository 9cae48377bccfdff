"""The cache of teacher pairs: what is there is never computed again; and parts that become smaller with memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dywspan.pipelines import memory
from dywspan.pipelines.hashes import digest
from dywspan.pipelines.memory import Parts
from dywspan.pipelines.pairs import Pairs, fresh, make_pairs

PIPE = SimpleNamespace(components={})


class Stub:
    """In a teacher's place: endpoints that tell their prompt and seed, and a record of what was asked together."""

    num_inference_steps, substeps = 5, 0

    def __init__(self, room: int = 1000) -> None:
        self.room, self.asked = room, []

    def describe(self) -> dict[str, Any]:
        return {"steps": self.num_inference_steps}

    def endpoints(self, pipe: Any, inputs: Any, seeds: Sequence[int], call: Mapping[str, Any]) -> torch.Tensor:
        self.asked.append([*seeds])
        if len(seeds) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
        return torch.tensor([[float(seed), float(len(own["prompt"]))] for own, seed in zip(inputs, seeds)])


def inputs_of(seeds: Sequence[int]) -> list[dict[str, str]]:
    return [{"prompt": "x" * (seed % 7)} for seed in seeds]


def make(cache: Path | None, seeds: Sequence[int], batch_size: int = 4, room: int = 1000) -> tuple[Pairs, Any]:
    """The pairs, which must be right, and what was asked of the teacher."""
    teacher: Any = Stub(room)
    pairs = make_pairs(PIPE, teacher, inputs_of(seeds), seeds, call={}, batch_size=batch_size, cache=cache, model="m")
    expected = torch.tensor([[float(seed), float(seed % 7)] for seed in seeds])
    assert torch.equal(pairs.endpoints, expected) and len(pairs) == len(seeds)
    return pairs, teacher.asked


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 100])
def test_another_batch_size_computes_nothing_again(tmp_path: Path, batch_size: int) -> None:
    assert make(tmp_path, range(12))[1] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert make(tmp_path, range(12), batch_size)[1] == []


def test_only_what_is_missing_is_computed_and_together(tmp_path: Path) -> None:
    assert make(tmp_path, [0, 2, 4, 6])[1] == [[0, 2, 4, 6]]
    assert make(tmp_path, range(12))[1] == [[1, 3, 5, 7], [8, 9, 10, 11]]
    assert make(tmp_path, [11, 20, 3, 21, 0, 21])[1] == [[20, 21]], "in any order, and the same one once"
    assert make(tmp_path, [21, 5])[1] == []
    (folder,) = tmp_path.iterdir()
    assert len([*folder.glob("*.safetensors")]) == 14 and (folder / "key.json").exists()


def test_a_sample_is_found_by_its_own_inputs_and_seed(tmp_path: Path) -> None:
    teacher: Any = Stub()
    for inputs, seeds, expected in (
        ([{"prompt": "a"}, {"prompt": "b"}], [0, 1], [[0, 1]]),
        ([{"prompt": "b"}, {"prompt": "a"}], [0, 1], [[0, 1]]),
        ([{"prompt": "b"}, {"prompt": "a"}], [1, 0], []),
        ([{"prompt": "a", "latents": torch.zeros(1, 2)}], [0], [[0]]),
        ([{"prompt": "a", "latents": torch.ones(1, 2)}], [0], [[0]]),
        ([{"prompt": "a", "latents": torch.ones(1, 2)}], [0], []),
    ):
        teacher.asked.clear()
        make_pairs(PIPE, teacher, inputs, seeds, call={}, cache=tmp_path, model="m")
        assert teacher.asked == expected
    for call, model in (({"height": 8}, "m"), ({}, "n")):
        make_pairs(PIPE, teacher, [{"prompt": "a"}], [0], call=call, cache=tmp_path, model=model)
        assert teacher.asked.pop() == [0]


def test_files_of_batches_from_an_older_version_do_not_disturb(tmp_path: Path) -> None:
    make(tmp_path, [7])
    (folder,) = tmp_path.iterdir()
    for seeds in ([0], [0, 1]):  # as they were named, and what they held
        old = folder / f"{digest([inputs_of(seeds), seeds])}.safetensors"
        save_file({"targets": torch.full((len(seeds), 2), 99.0)}, old)
    assert make(tmp_path, range(2))[1] == [[0, 1]]


def test_only_damaged_files_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, _ = make(tmp_path, range(8))
    files: Any = pairs.targets.files  # type: ignore[union-attr]
    files[2].write_bytes(files[2].read_bytes()[:-3])
    files[5].write_bytes(b"")
    save_file({"other": torch.zeros(2)}, files[7])
    assert make(tmp_path, range(8))[1] == [[2, 5, 7]]
    assert capsys.readouterr().out.splitlines() == [f"{files[i]} is damaged: it is made again." for i in (2, 5, 7)]


def test_a_full_disk_keeps_every_batch_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = Path.write_bytes, 6

    def full(self: Path, data: bytes) -> int:
        nonlocal room
        room -= ".safetensors" in self.name
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"4 of 12 files are kept. Make room"):
        patch.setattr(Path, "write_bytes", full)
        make(tmp_path, range(12))
    assert not [*tmp_path.rglob("*.tmp")] and make(tmp_path, range(12))[1] == [[4, 5, 6, 7], [8, 9, 10, 11]]


SCRIPT = """
import sys
from test_cache import PIPE, Stub, inputs_of
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.processes import _state

count, batch_size = map(int, sys.argv[2:])
teacher = Stub()
pairs = make_pairs(
    PIPE, teacher, inputs_of(range(count)), range(count), call={}, batch_size=batch_size, cache=sys.argv[1], model="m"
)
assert pairs.endpoints[:, 0].tolist() == [*range(count)]
print(f"[{_state().process_index}] {teacher.asked}\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_two_processes_and_one_share_a_cache(tmp_path: Path) -> None:
    """All make the same number of calls, each sample is computed once, and one process finds what two have made."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def two(count: int, batch_size: int) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*launcher, str(script), str(tmp_path / "cache"), str(count), str(batch_size)],
            capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        return sorted(line for line in run.stdout.splitlines() if line.startswith("["))

    make(tmp_path / "cache", [1, 4])
    assert two(10, 3) == ["[0] [[0, 2, 3], [8, 9]]", "[1] [[5, 6, 7], [0, 2, 3]]"]
    assert two(9, 4) == ["[0] []", "[1] []"]
    assert make(tmp_path / "cache", range(12), 2)[1] == [[10, 11]]


# ---------------------------------------------------------------------- memory


def test_out_of_memory_halves_the_batch_and_keeps_it_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = (
        "Out of memory with 8 teacher samples at a time: going on with 2. teacher_batch_size=2 does so from the start."
    )
    for cache in (tmp_path, None):
        _, asked = make(cache, range(12), 8, room=3)
        assert [len(seeds) for seeds in asked] == [8, 4, 2, 2, 2, 2, 2, 2]
        assert [s for part in asked[2:] for s in part] == [*range(12)]
        assert capsys.readouterr().out.splitlines() == [said]
    assert make(tmp_path, range(12), 8, room=0)[1] == []


@pytest.mark.parametrize("named", ["teacher_batch_size cannot be lower", "resolution", "bfloat16", "offload", "2.00 G"])
def test_out_of_memory_with_one_sample_names_the_ways_out(tmp_path: Path, named: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Out of memory with 1 teacher samples at a time") as error:
        make(tmp_path, range(4), room=0)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_fresh_pairs_are_made_in_parts_too() -> None:
    teacher: Any = Stub(room=2)
    source = fresh(PIPE, teacher, inputs_of(range(3)), 10, {})
    for positions in (range(4), range(4, 7)):
        assert source(positions).endpoints[:, 0].tolist() == [10.0 + p for p in positions]
    assert [len(seeds) for seeds in teacher.asked] == [4, 2, 2, 2, 1]


def limited(room: int, asked: list[list[int]]) -> Callable[[Sequence[int]], int]:
    def compute(part: Sequence[int]) -> int:
        asked.append([*part])
        if len(part) > room:
            raise torch.OutOfMemoryError("full")
        return sum(part)

    return compute


@pytest.mark.parametrize(
    ("size", "samples", "room", "parts", "left"),
    [
        (None, 5, 9, [[0, 1, 2, 3, 4]], None),
        (2, [7, 5, 3], 9, [[7, 5], [3]], 2),
        (None, 7, 3, [[*range(7)], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6]], 2),
        (16, 3, 2, [[0, 1, 2], [0, 1], [2]], 2),
        (4, 0, 0, [], 4),
        (2, 3, 1, [[0, 1], [0], [1], [2]], 1),
    ],
)
def test_parts(size: int | None, samples: Any, room: int, parts: list[list[int]], left: int | None) -> None:
    asked: list[list[int]] = []
    own = Parts(size, "samples", "batch_size")
    results = own.run(samples, limited(room, asked))
    assert asked == parts and own.size == left
    assert results == [sum(part) for part in parts if len(part) <= room]


def test_what_failed_is_freed_before_the_next_try() -> None:
    alive: list[int] = []

    class Held:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def compute(part: Sequence[int]) -> None:
        assert not alive
        held = Held()
        if len(part) > 1:
            raise torch.OutOfMemoryError("full")
        del held

    Parts(4, "samples", "batch_size").run(4, compute)


def test_processes_that_share_a_network_do_not_halve_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Parts(4, "samples", "batch_size", sharded=True).run(4, limited(2, [])) == [1, 5], "alone it may"
    monkeypatch.setattr(memory, "count", lambda: 2)
    assert Parts(4, "samples", "batch_size").run(4, limited(2, [])) == [1, 5], "each with a whole one"
    asked: list[list[int]] = []
    with pytest.raises(torch.OutOfMemoryError, match="lower batch_size, for all processes alike"):
        Parts(4, "samples", "batch_size", sharded=True).run(4, limited(2, asked))
    assert asked == [[0, 1, 2, 3]]
