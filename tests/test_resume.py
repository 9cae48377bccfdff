"""Killed, repeated, damaged or shared out, a distillation ends in the same numbers: real processes, real files."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import dywspan.distill.trainer as trainer_module
from dywspan import DyWeightScheduler
from dywspan.cli import main
from dywspan.distill.checkpoints import Checkpoints
from dywspan.distill.config import LearningConfig
from dywspan.distill.student import initial_table
from dywspan.pipelines.teacher import Teacher
from dywspan.schedulers import configuration

REPO = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {
    "model": str(REPO / "examples" / "emoji-sd"),
    "prompts": str(REPO / "examples" / "prompts" / "emoji-train.txt"),
    "call": {"height": 32, "width": 32, "guidance_scale": 1.0},
    **dict(pairs=16, held_out=8, teacher_steps=8, teacher_batch_size=4),
    **dict(steps=[2], batch_size=4, updates=6, evaluate_every=2, checkpoint_every=1, keep_checkpoints=100, pictures=0),
}
# Float32 sums in another order, through a network and Adam's quotients: 4e-5 at most on any processor so far. What half
# of every batch teaches is 4e-3 away or more.
CLOSE = 3e-4
LEARNED: dict[str, dict[str, Any]] = {
    "dyweight": {},
    "spanlift": {"solver": "spanlift", "operator": {"width": 8}},
    "on_the_fly": {"on_the_fly": True},
    "least_squares": {"optimizer": "least_squares"},
}
# What a run need not make again: embeddings, teacher pairs, checkpoints.
PROMPTS, SHARDS, STATES = (f"{folder}/*.safetensors" for folder in ("cache/prompts", "cache/*[!s]", "state/*"))


def command(output: Path, settings: dict[str, Any]) -> list[str]:
    """What a user types; YAML files may be JSON."""
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps({**SETTINGS, "output": str(output), **settings}))
    return ["distill", "--config", str(file)]


def start(output: Path, processes: int = 1, **settings: Any) -> subprocess.Popen[bytes]:
    """The command in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    arguments = [*launcher, "training/distill.py", *command(output, settings)[1:]]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments], cwd=REPO, stdout=log, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[bytes], output: Path) -> str:
    """Wait for its end, which must be a good one; all that was printed."""
    try:
        assert run.wait(timeout=900) == 0, output.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(run)
    return output.with_suffix(".log").read_text()


def kill(run: subprocess.Popen[bytes]) -> None:
    """kill -9, the launcher's processes included."""
    if run.poll() is None:
        root = psutil.Process(run.pid)
        for process in [root, *root.children(recursive=True)]:
            process.kill()
        run.wait()


def here(output: Path, **settings: Any) -> int:
    """The command in this process: its exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(command(output, settings))


def learned(folder: Path) -> tuple[Any, ...]:
    """Artefact and last checkpoint, bit for bit: floats survive JSON. What it took is no part of them."""
    config = json.loads((folder / "scheduler_config.json").read_text())
    for part in (config["tables"] or config["lifts"]).values():
        spent = part["provenance"].get("evaluations", {})
        spent.pop("seconds", None)
        if "jacobian" in spent:  # least squares checks its replay each time it starts
            spent.clear()
    weights, state = folder / "spanlift.safetensors", load_file(max(folder.glob(STATES)))
    bits = {name: value.numpy().tobytes() for name, value in state.items()}
    return config, weights.read_bytes() if weights.exists() else b"", bits


def numbers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The learned numbers, and the held-out errors."""
    config, weights, _ = learned(folder)
    values, errors = [], []
    for part in (config["tables"] or config["lifts"]).values():
        values += [v for row in part.get("weights", []) for v in row]
        values += [v for name in ("time_scale", "alpha", "beta") for v in part.get(name, [])]
        errors += [part["provenance"]["held_out_error"][when] for when in ("before", "after")]
    operators = load_file(folder / "spanlift.safetensors").values() if weights else ()
    values = torch.cat([torch.tensor(values, dtype=torch.float64), *(v.flatten().double() for v in operators)])
    return values, torch.tensor(errors, dtype=torch.float64)


def assert_same_numbers(folder: Path, other: Path) -> None:
    for mine, theirs in zip(numbers(folder), numbers(other)):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE)


def finished(folder: Path) -> dict[Path, int]:
    """Every file that need not be made again, and when it was written."""
    return {file: file.stat().st_mtime_ns for part in (PROMPTS, SHARDS, STATES) for file in folder.glob(part)}


def copied(whole: Path, folder: Path, *parts: str) -> Path:
    """A new output folder with these parts of a finished one."""
    for part in parts:
        shutil.copytree(whole / part, folder / part)
    return folder


Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The output of an uninterrupted run, made once for all tests that compare with it."""
    made: dict[str, Path] = {}

    def run(name: str = "dyweight", processes: int = 1, **settings: Any) -> Path:
        key = json.dumps([name, processes, settings])
        if key not in made:
            made[key] = output = tmp_path_factory.mktemp("whole") / "out"
            finish(start(output, processes, **LEARNED[name], **settings), output)
        return made[key]

    return run


# ---------------------------------------------------------------------- one process or many


@pytest.mark.slow
def test_accumulated_batches_and_processes_learn_the_same_table(whole: Whole, tmp_path: Path) -> None:
    """1 process x 4 samples = 4 accumulated ones = 2 processes x 2: two mains would quarrel about the folder's lock."""
    cache, two = str(whole() / "cache"), tmp_path / "two"
    run = start(two, processes=2, cache=cache)
    assert here(tmp_path / "accumulated", cache=cache, micro_batch_size=1) == 0
    finish(run, two)
    assert_same_numbers(tmp_path / "accumulated", whole())
    assert_same_numbers(two, whole())
    assert here(tmp_path / "half", cache=cache, batch_size=2) == 0
    with pytest.raises(AssertionError):
        assert_same_numbers(tmp_path / "half", whole())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dyweight", "spanlift"])
def test_processes_with_their_own_teacher_pairs_learn_the_same(whole: Whole, tmp_path: Path, name: str) -> None:
    options = LEARNED[name] | {"batch_size": 8}
    one, two = tmp_path / "one", tmp_path / "two"
    assert here(one, **options, cache=str(whole() / "cache")) == 0
    assert here(tmp_path / "accumulated", **options, cache=str(whole() / "cache"), micro_batch_size=1) == 0
    finish(start(two, processes=2, **options), two)
    assert len(list(two.glob(SHARDS))) == 24 and len(list(two.glob(PROMPTS))) == 24
    assert_same_numbers(tmp_path / "accumulated", one)
    assert_same_numbers(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_a_sharded_network_learns_the_same_table(whole: Whole, tmp_path: Path, recompute: bool) -> None:
    output = tmp_path / "out"
    printed = finish(start(output, processes=2, fsdp=True, recompute=recompute), output)
    assert printed.count("saved to") == 1
    assert_same_numbers(output, whole())


def test_one_process_has_nobody_to_share_a_network_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert here(tmp_path / "out", fsdp=True) == 2
    assert "accelerate launch --num_processes" in capfd.readouterr().err


def test_processes_that_do_not_see_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As under torchrun on a CPU, unless Accelerate is told."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert here(tmp_path / "out") == 2
    assert "2 processes were started" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_does_not_inherit_the_precision_of_an_earlier_one_in_its_process(whole: Whole, tmp_path: Path) -> None:
    output = copied(whole(), tmp_path / "out", "cache", "state")
    assert here(tmp_path / "other", cache=str(output / "cache"), mixed_precision="bf16", updates=1) == 0
    assert main(command(output, {})) == 0
    assert learned(output) == learned(whole())


# ---------------------------------------------------------------------- kill -9


def _killed_and_repeated(reference: Path, output: Path, kills: int, processes: int = 1, **settings: Any) -> None:
    """Kill at random moments of each phase, every time after something more was finished; then run to the end."""
    draw = random.Random(0)
    counts = [len(list(reference.glob(part))) for part in (PROMPTS, SHARDS, STATES)]
    moments: list[int] = []
    for phase in range(3):
        files = range(sum(counts[:phase]) + 1, sum(counts[: phase + 1]) - 1)
        moments += sorted(draw.sample(files, min(len(files), kills)))
    made: dict[Path, int] = {}
    for moment in moments:
        before, run = len(made), start(output, processes, **settings)
        while len(made := finished(output)) < max(moment, before + 1):
            assert run.poll() is None, output.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.003)
        time.sleep(draw.uniform(0, 0.1))
        kill(run)
        now = finished(output)
        assert made.items() <= now.items()
        made = now
    finish(start(output, processes, **settings), output)
    assert made.items() <= finished(output).items(), "what was finished is never made again"
    assert learned(output) == learned(reference)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_ends_in_the_same_bits(whole: Whole, tmp_path: Path) -> None:
    """The lock of the killed run does not keep the next out."""
    _killed_and_repeated(whole(), tmp_path / "out", 1)


@pytest.mark.slow
def test_updates_that_are_taken_back_are_so_after_a_stop(whole: Whole, tmp_path: Path) -> None:
    settings = {"lr": 30.0, "evaluate_every": 3}
    reference = whole(**settings)
    assert "made no solver" in reference.with_suffix(".log").read_text()
    for kept in (2, 4):
        output = copied(reference, tmp_path / f"{kept}", "cache", "state")
        for file in sorted(output.glob(STATES))[kept:]:
            file.unlink()
        assert here(output, **settings) == 0
        assert learned(output) == learned(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "kills"),
    [("dyweight", 1, 4), ("spanlift", 1, 4), ("on_the_fly", 1, 3), ("least_squares", 1, 1), ("dyweight", 2, 1)],
)
def test_a_run_that_is_killed_many_times_ends_in_the_same_bits(
    whole: Whole, tmp_path: Path, name: str, processes: int, kills: int
) -> None:
    reference = whole(name, processes, updates=10)
    _killed_and_repeated(reference, tmp_path / "out", kills, processes, **LEARNED[name], updates=10)


@pytest.mark.slow
def test_an_operator_that_is_killed_between_its_two_files_is_learned_on(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    options = {**LEARNED["spanlift"], "cache": str(whole() / "cache"), "updates": 1}
    assert here(output, **options) == 0
    write = configuration.write_atomically

    def stop(path: Any, data: bytes) -> None:
        if Path(path).parent == output:
            raise KeyboardInterrupt("the weights are new, the configuration is old")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(configuration, "write_atomically", stop)
        assert here(output, **options, steps=[1]) == 130
    assert here(output, **options, steps=[1]) == here(other, **options, steps=[2, 1]) == 0
    assert learned(output)[:2] == learned(other)[:2]


@pytest.mark.slow
def test_patience_that_ran_out_before_a_kill_has_run_out_after_it(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache": str(whole() / "cache"), "lr": 0.2, "patience": 1, "evaluate_every": 1}
    output, expected, save = tmp_path / "out", tmp_path / "expected", Checkpoints.save

    def stop(self: Checkpoints, *args: Any) -> None:
        if args[-1]["after"] is not None:
            raise KeyboardInterrupt("in the final evaluation, with the last update's checkpoint written")
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        assert here(output, **options) == 130
    last = max(output.glob(STATES))
    assert last.stem < "update-0000006", "patience must end this run"
    assert here(output, **options) == here(expected, **options) == 0
    assert max(output.glob(STATES)) == last and learned(output) == learned(expected)


# ---------------------------------------------------------------------- damage


@pytest.mark.slow
def test_damaged_files_are_said_so_and_made_again(
    whole: Whole, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = copied(whole(), tmp_path / "out", "cache", "state")
    # All pairs: those of a batch that is not whole round differently.
    shards, state, prompt = [*output.glob(SHARDS)], max(output.glob(STATES)), min(output.glob(PROMPTS))
    for file in (*shards, state, prompt):
        file.write_bytes(file.read_bytes()[:-40])
    assert here(output) == 0
    printed = capfd.readouterr().out
    assert len(shards) == 24 and all(f"{shard} is damaged: it is made again" in printed for shard in shards)
    assert f"{state} is damaged" in printed and "going on from the one before" in printed
    for file in (*shards, prompt):
        own, good = load_file(file), load_file(whole() / file.relative_to(output))
        assert own.keys() == good.keys() and all(torch.equal(own[name], good[name]) for name in own)
    assert learned(output) == learned(whole())


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_checkpoint_cut_anywhere_falls_back_to_the_one_before(
    tmp_path: Path, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    checkpoints, optimizer = Checkpoints(tmp_path), torch.optim.AdamW([parameter])
    for update in (1, 2, 3):
        parameter.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
        checkpoints.save([parameter], [parameter.detach().clone()], optimizer, {"update": update, "before": {2: 0.5}})
    assert [f.name for f in sorted(tmp_path.iterdir())] == [f"update-000000{n}.safetensors" for n in (2, 3)]
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:left])
    saved = checkpoints.latest()
    assert saved is not None and saved.facts == {"update": 2, "before": {2: 0.5}}
    assert f"{newest} is damaged" in capsys.readouterr().out
    min(tmp_path.iterdir()).write_bytes(b"")
    assert checkpoints.latest() is None


# ---------------------------------------------------------------------- two at a time


@pytest.mark.slow
def test_a_second_run_on_the_folder_ends_at_once_and_the_first_goes_on(
    whole: Whole, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = copied(whole(), tmp_path / "out", "cache")
    first = start(output)
    try:
        while not (output / ".lock").exists():
            assert first.poll() is None, output.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.003)
        time.sleep(0.3)  # the file is there a moment before it is locked
        first.send_signal(signal.SIGSTOP)  # it will not be faster than the second
        assert here(output) == 2
        first.send_signal(signal.SIGCONT)
        message = f"dywspan: Another run is writing to {output}: wait for it, stop it, or choose another output."
        printed = capfd.readouterr().err
        assert message in printed.splitlines() and "Traceback" not in printed
        finish(first, output)
    finally:
        kill(first)
    assert learned(output) == learned(whole())
    made = finished(output)
    assert here(output) == 0
    assert finished(output) == made and learned(output) == learned(whole()), "a finished run has nothing left to do"


def test_what_another_run_saved_while_this_one_loaded_is_added_to(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = copied(whole(), tmp_path / "out", "cache", "state")
    scheduler = DyWeightScheduler.from_pretrained(whole())
    other = initial_table(scheduler, 3, LearningConfig(), None)

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        scheduler.with_tables([other]).save_pretrained(folder)
        yield

    monkeypatch.setattr(trainer_module, "locked", late)
    assert here(output) == 0
    assert sorted(learned(output)[0]["tables"]) == ["2", "3"]


# ---------------------------------------------------------------------- a full disk


def _fill_disk(patch: pytest.MonkeyPatch, folder: Path, names: str, room: int) -> None:
    """After ``room`` more of these files the disk is full, in the middle of a file."""
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        nonlocal room
        if folder in self.parents and names in self.name:
            if room == 0:
                write(self, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # write(2) names no file
            room -= 1
        return write(self, data)

    patch.setattr(Path, "write_bytes", full)


@pytest.mark.slow
def test_a_full_disk_keeps_the_pairs_that_are_finished(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = copied(whole(), tmp_path / "out", "cache")
    (cache,) = {file.parent for file in output.glob(SHARDS)}
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        _fill_disk(patch, cache, ".safetensors", 12)
        assert here(output) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dywspan: ")]
    assert len(lines) == 1 and str(cache) in lines[0] and "4 of 16 files are kept" in lines[0]
    assert os.strerror(errno.ENOSPC) in lines[0] and "Make room" in lines[0]
    assert len(list(cache.glob("*.safetensors"))) == 12 and not list(cache.glob("*.tmp"))
    own, calls = Teacher.endpoints, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return own(*args)

    monkeypatch.setattr(Teacher, "endpoints", counted)
    assert here(output) == 0
    assert calls == 3 and learned(output) == learned(whole())


@pytest.mark.parametrize(
    ("where", "names"), [("cache/prompts", ".safetensors"), pytest.param("state", "update-", marks=pytest.mark.slow)]
)
def test_a_full_disk_leaves_what_was_there_and_says_what_to_do(
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    names: str,
) -> None:
    output = copied(whole(), tmp_path / "out", "cache", "state")
    shutil.copy(whole() / "scheduler_config.json", output)
    shutil.rmtree(output / "cache" / "prompts")
    before = finished(output), learned(output)
    with monkeypatch.context() as patch:
        _fill_disk(patch, output / where, names, 2)
        assert here(output, steps=[1]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dywspan: ")]
    assert len(lines) == 1 and str(output / where) in lines[0] and os.strerror(errno.ENOSPC) in lines[0]
    assert "room" in lines[0], "the way out"
    assert before[0].items() <= finished(output).items() and learned(output) == before[1]
    assert len(list((output / where).rglob(f"*{names}*"))) == 2 + (len(before[0]) - 24 if where == "state" else 0)
    assert not list(output.rglob("*.tmp"))
    if where == "state":
        new = max(output.glob("state/1-*"))
        saved = Checkpoints(new).latest()
        assert saved is not None and saved.facts["update"] == 2
        assert here(output, steps=[1]) == 0
        assert sorted(learned(output)[0]["tables"]) == ["1", "2"]
        assert learned(output)[0]["tables"]["2"] == before[1][0]["tables"]["2"]
