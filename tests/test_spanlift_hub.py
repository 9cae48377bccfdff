"""SpanLift solvers on the Hub: configuration and weights are two files that must come from one commit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, Repo
from test_hub import client
from test_spanlift import CONFIG, WEIGHTS, lifted

from dywspan import SpanLiftScheduler

# One hash of all its numbers. (The client's process evaluates expressions.)
NUMBERS = (
    "(lambda s: __import__('hashlib')"
    ".sha256(b''.join(v.numpy().tobytes() for v in s.state_dict().values())).hexdigest()"
    " + str([(n, l.alpha.tolist(), l.beta.tolist()) for n, l in sorted(s.lifts.items())]))"
)
CLASS = "__import__('dywspan').SpanLiftScheduler"


def load(arguments: str) -> str:
    return f"{NUMBERS}({CLASS}.from_pretrained({arguments}))"


def numbers(scheduler: SpanLiftScheduler) -> str:
    weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in scheduler.state_dict().values())).hexdigest()
    lifts = sorted(scheduler.lifts.items())
    return weights + str([(n, lift.alpha.tolist(), lift.beta.tolist()) for n, lift in lifts])


OLD, NEW, DEEP, SECRET, PUSHED, PUSHED_AGAIN = (lifted("ipndm", seed=seed, beta=0.1 * seed) for seed in range(6))


def files(scheduler: SpanLiftScheduler, folder: Path, prefix: str = "") -> dict[str, bytes]:
    scheduler.save_pretrained(folder)
    return {prefix + name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


class Racing(Repo):
    """After ``patience`` answers somebody publishes another version."""

    patience, asked, next = 0, 0, {}

    def resolve(self, revision: str) -> str | None:
        self.asked += 1
        if self.asked == self.patience + 1:
            self.commit(**self.next)
        return super().resolve(revision)


class Cut(Repo):
    """The connection breaks in the weights: they are asked for by commit, the configuration by name."""

    def resolve(self, revision: str) -> str | None:
        self.drop = revision != "main"
        return super().resolve(revision)


RACES = range(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spanlift")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    with Hub() as server:
        old, new = files(OLD, folder / "old"), files(NEW, folder / "new")
        solvers = server.repos["org/solvers"] = Repo()
        solvers.refs["v1"] = solvers.commit(**old)
        solvers.commit(**new, **files(DEEP, folder / "deep", "sd/cfg7/"))
        server.repos["org/secret"] = Repo(private=True)
        server.repos["org/secret"].commit(**files(SECRET, folder / "secret"))
        for name, repo, content in (
            ("org/half", Repo(), {CONFIG: new[CONFIG]}),
            ("org/short", Repo(), {**new, WEIGHTS: new[WEIGHTS][:-9]}),
            ("org/swapped", Repo(), {**new, WEIGHTS: old[WEIGHTS]}),
            ("org/cut", Cut(), new),
            *((f"org/race-{n}", Racing(), old) for n in RACES),
        ):
            server.repos[name] = repo
            repo.commit(**content)
        for n in RACES:
            race = server.repos[f"org/race-{n}"]
            assert isinstance(race, Racing)
            race.patience, race.asked, race.next = n, 0, new
        yield server


@pytest.fixture(scope="module")
def online(hub: Hub, folder: Path) -> dict[str, dict[str, Any]]:
    """All that needs a server, in one process."""
    for name, solver in (("pushed", PUSHED), ("again", PUSHED_AGAIN)):
        solver.save_pretrained(folder / name)

    def push(name: str, target: str, options: str = "") -> str:
        return f"str({CLASS}.from_pretrained({str(folder / name)!r}).push_to_hub({target!r}, token={TOKEN!r}{options}))"

    first = hub.repos["org/solvers"].refs["v1"]
    return client(
        hub,
        folder / "home",
        {
            "main": load("'org/solvers'"),
            "tag": load("'org/solvers', revision='v1'"),
            "commit": load(f"'org/solvers', revision={first!r}"),
            "subfolder": load("'org/solvers', subfolder='sd/cfg7'"),
            "private without token": load("'org/secret', token=False"),
            "private": load(f"'org/secret', token={TOKEN!r}"),
            "half": load("'org/half'"),
            "short": load("'org/short'"),
            "swapped": load("'org/swapped'"),
            "cut": load("'org/cut'"),
            "wrong subfolder": load("'org/solvers', subfolder='sd/cfg9'"),
            "local_files_only": load("'org/solvers', local_files_only=True"),
            "not cached": load("'org/other', local_files_only=True"),
            "push": push("pushed", "org/mine"),
            "pull": load("'org/mine'"),
            "push again": push("again", "org/mine"),
            "pull again": load("'org/mine'"),
            "push deep": push("again", "org/mine", ", subfolder='flux/cfg3'"),
            "pull deep": load("'org/mine', subfolder='flux/cfg3'"),
            "push scheduler": push("again", "org/mine", ", subfolder='scheduler'"),
            **{f"race {n}": load(f"'org/race-{n}'") for n in RACES},
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "expected"),
    [("main", NEW), ("tag", OLD), ("commit", OLD), ("subfolder", DEEP), ("private", SECRET), ("local_files_only", NEW)],
)
def test_download(online: dict[str, Any], call: str, expected: SpanLiftScheduler) -> None:
    assert online[call].get("value") == numbers(expected), online[call]


@pytest.mark.slow
def test_push_then_pull(online: dict[str, Any], hub: Hub, folder: Path) -> None:
    assert online["pull"].get("value") == numbers(PUSHED), online["push"]
    assert online["pull again"].get("value") == numbers(PUSHED_AGAIN)
    assert online["pull deep"].get("value") == numbers(PUSHED_AGAIN)
    stored = hub.repos["org/mine"].files
    assert set(stored) == {CONFIG, WEIGHTS, "README.md", f"flux/cfg3/{CONFIG}", f"flux/cfg3/{WEIGHTS}"}
    assert stored[WEIGHTS] == (folder / "again" / WEIGHTS).read_bytes()
    refused = online["push scheduler"]
    assert refused["error"] == "ValueError" and "repository of its own" in refused["message"]


@pytest.mark.slow
def test_the_first_version_by_its_commit(online: dict[str, Any], hub: Hub, folder: Path) -> None:
    """Both files of the commit asked for, after a second version was pushed."""
    repo = hub.repos["org/mine"]
    commits = [sha for sha, snapshot in repo.history.items() if WEIGHTS in snapshot]
    assert len(commits) == 3 and repo.refs["main"] == commits[-1]
    calls = {sha: load(f"'org/mine', revision={sha!r}") for sha in commits[:2]}
    hub.requests.clear()
    loaded = client(hub, folder / "another home", calls)
    assert loaded[commits[0]].get("value") == numbers(PUSHED), loaded
    assert loaded[commits[1]].get("value") == numbers(PUSHED_AGAIN), loaded
    asked = {line.split()[1] for line in hub.requests if WEIGHTS in line}
    assert asked == {f"/org/mine/resolve/{sha}/{WEIGHTS}" for sha in commits[:2]}


@pytest.mark.slow
def test_a_push_in_the_middle_of_a_download(online: dict[str, Any], hub: Hub) -> None:
    """Whenever it comes: the old pair, the new pair, or an error that says they do not belong together."""
    pairs = {numbers(OLD): "old", numbers(NEW): "new"}
    ends = []
    for n in RACES:
        outcome = online[f"race {n}"]
        if "error" in outcome:
            incomplete = outcome["os"] and CONFIG in outcome["message"]
            assert incomplete or "from another save" in outcome["message"], outcome
        ends.append("error" if "error" in outcome else pairs[outcome["value"]])
    assert ends[0] == "new" and ends[-1] == "old"
    # Between the files: main had moved on already, and the weights came from the configuration's commit.
    assert any(end == "old" and hub.repos[f"org/race-{n}"].asked > n for n, end in zip(RACES, ends))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("private without token", "os", ["org/secret", "token"]),
        ("half", "os", ["org/half has a solver's configuration but no", WEIGHTS]),
        ("cut", "os", ["org/cut", "broke off", "local_files_only=True"]),
        ("wrong subfolder", "os", ["org/solvers", CONFIG]),
        ("not cached", "os", ["org/other"]),
        ("short", "ValueError", [WEIGHTS, "is damaged", "download it again"]),
        ("swapped", "ValueError", [WEIGHTS, "is not the file this configuration was saved with"]),
    ],
)
def test_failure_is_named_and_quick(online: dict[str, Any], call: str, kind: str, words: list[str]) -> None:
    result = online[call]
    assert result["os"] if kind == "os" else result["error"] == kind, result
    assert all(word in result["message"] for word in words), result["message"]
    assert result["seconds"] < 30


@pytest.mark.slow
def test_offline_from_the_cache(online: dict[str, Any], folder: Path) -> None:
    """With no server at all: what was downloaded loads, and half a solver says which half is missing."""
    nobody, home = "http://127.0.0.1:9", folder / "home"
    options = {"cached": "subfolder='sd/cfg7'", "tag": "revision='v1'"}
    calls = {name: load(f"'org/solvers', {option}") for name, option in options.items()}
    calls["half"] = load("'org/half'")
    told = client(nobody, home, calls, HF_HUB_OFFLINE="1")
    assert told["cached"].get("value") == numbers(DEEP), told
    assert told["tag"].get("value") == numbers(OLD), told
    assert told["half"]["os"] and f"no {WEIGHTS} beside it" in told["half"]["message"]
    assert all(result["seconds"] < 30 for result in told.values())
    # What the cache keeps is as checked as what came from the network.
    cached = next((home / "hub").glob(f"models--org--solvers/snapshots/*/sd/cfg7/{WEIGHTS}")).resolve()
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    os.chmod(cached, 0o644)
    cached.write_bytes(content)
    damaged = client(nobody, home, {"cached": calls["cached"]}, HF_HUB_OFFLINE="1")["cached"]
    assert damaged["error"] == "ValueError" and WEIGHTS in damaged["message"]
