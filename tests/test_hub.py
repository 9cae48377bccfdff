"""The Hub, through the real client: it reads HF_ENDPOINT when imported, so clients run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Hub, Repo

from dywspan import DyWeightScheduler, SolverTable

CLIENT = """
import contextlib, io, json, os, sys, time
from dywspan import DyWeightScheduler, SolverTable

def tables(scheduler):
    return {n: [t.weights.tolist(), t.time_scale.tolist(), dict(t.grid), t.afs] for n, t in scheduler.tables.items()}

def load(*args, **kwargs):
    return tables(DyWeightScheduler.from_pretrained(*args, **kwargs))

# A command's exit status, and what it prints.
def command(token, *arguments):
    from dywspan.cli import main
    os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(arguments)
    del os.environ["HF_TOKEN"]
    return [status, out.getvalue()]

for name, call in json.load(sys.stdin):
    start = time.monotonic()
    try:
        result = {"value": eval(call)}
    except Exception as error:
        result = {"error": type(error).__name__, "os": isinstance(error, OSError), "message": str(error)}
    print("RESULT", json.dumps({"name": name, "seconds": time.monotonic() - start, **result}), flush=True)
"""


def client(hub: Hub | str, home: Path, calls: dict[str, str], **env: str) -> dict[str, dict[str, Any]]:
    """Evaluate expressions in a fresh process whose Hub is ``hub``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    url = hub if isinstance(hub, str) else hub.url
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-W", "ignore", "-c", CLIENT]
    run = subprocess.run(
        command, input=json.dumps(list(calls.items())), env=clean, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["name"]: line for line in lines}


def solver(seed: int) -> DyWeightScheduler:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64).tril()
    scale = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    grid = {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.0}
    return DyWeightScheduler().with_tables([SolverTable(weights, scale, grid)])


def numbers(scheduler: DyWeightScheduler) -> dict[str, Any]:
    tables = scheduler.tables
    return {str(n): [t.weights.tolist(), t.time_scale.tolist(), dict(t.grid), t.afs] for n, t in tables.items()}


OLD, NEW, DEEP, SECRET, PUSHED = (solver(seed) for seed in range(5))
NAME = "scheduler_config.json"
ONES = torch.ones(4, 1, dtype=torch.float64)
EULER = DyWeightScheduler().with_tables(
    [SolverTable(ONES, ONES[:, 0], {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.0})]
)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        solvers = server.repos["org/solvers"] = Repo()
        solvers.refs["v1"] = solvers.commit(**{NAME: OLD.to_json_string().encode()})
        solvers.commit(**{NAME: NEW.to_json_string().encode(), f"sd/cfg7/{NAME}": DEEP.to_json_string().encode()})
        secret = server.repos["org/secret"] = Repo(private=True)
        secret.commit(**{NAME: SECRET.to_json_string().encode()})
        server.repos["org/empty"] = Repo()
        server.repos["org/empty"].commit(**{"README.md": b"nothing here"})
        cut = server.repos["org/cut"] = Repo(drop=True)
        cut.commit(**{NAME: NEW.to_json_string().encode()})
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> dict[str, dict[str, Any]]:
    """All that needs a server, in one process."""
    pushed = json.dumps(json.loads(PUSHED.to_json_string()))
    push = f"DyWeightScheduler.from_config(json.loads({pushed!r})).push_to_hub"
    first = hub.repos["org/solvers"].refs["v1"]
    pushed_folder = home / "my-solvers"
    EULER.save_pretrained(pushed_folder)
    return client(
        hub,
        home,
        {
            "main": "load('org/solvers')",
            "tag": "load('org/solvers', revision='v1')",
            "commit": f"load('org/solvers', revision={first!r})",
            "subfolder": "load('org/solvers', subfolder='sd/cfg7')",
            # Before anything is cached: the client falls back to its cache where it may not look any more.
            "private without token": "load('org/secret', token=False)",
            "private": f"load('org/secret', token={TOKEN!r})",
            "wrong revision": "load('org/solvers', revision='v9')",
            "wrong subfolder": "load('org/solvers', subfolder='sd/cfg9')",
            "no file": "load('org/empty')",
            "no repository": f"load('org/nothing', token={TOKEN!r})",
            "dropped": "load('org/cut')",
            "push": f"str({push}('org/mine', token={TOKEN!r}))",
            "pull": "load('org/mine')",
            "push private": f"str({push}('org/hidden', private=True, token={TOKEN!r}))",
            "pull hidden": "load('org/hidden', token=False)",
            "pull private": f"load('org/hidden', token={TOKEN!r})",
            "push without rights": f"str({push}('org/mine', token=False))",
            "push command": f"command({TOKEN!r}, 'push', {str(pushed_folder)!r}, 'org/command', '--private')",
            "push refused": f"command('hf_wrong', 'push', {str(pushed_folder)!r}, 'org/refused')",
            "pull command": f"load('org/command', token={TOKEN!r})",
            "list": f"command({TOKEN!r}, 'list')",
            "inspect": f"command({TOKEN!r}, 'inspect', 'org/solvers')",
            "local_files_only": "load('org/solvers', local_files_only=True)",
            "not cached": "load('org/other', local_files_only=True)",
        },
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [("main", NEW), ("tag", OLD), ("commit", OLD), ("subfolder", DEEP), ("private", SECRET), ("local_files_only", NEW)],
)
def test_download(online: dict[str, Any], call: str, expected: DyWeightScheduler) -> None:
    assert online[call]["value"] == numbers(expected)


def test_push_then_pull(online: dict[str, Any], hub: Hub) -> None:
    assert "error" not in online["push"]
    assert online["pull"]["value"] == numbers(PUSHED)
    assert hub.repos["org/mine"].files[NAME] == PUSHED.to_json_string().encode()
    assert "README.md" in hub.repos["org/mine"].files  # a model card, tagged by diffusers
    assert hub.repos["org/hidden"].private
    assert online["pull private"]["value"] == numbers(PUSHED)
    assert "org/hidden" in online["pull hidden"]["message"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("private without token", ["org/secret", "token"]),
        ("wrong revision", ["v9", "org/solvers", "revision"]),
        ("wrong subfolder", ["org/solvers", NAME]),
        ("no file", ["org/empty", NAME]),
        ("no repository", ["org/nothing"]),
        ("dropped", ["org/cut"]),
        ("not cached", ["org/other"]),
    ],
)
def test_failure_is_named_and_quick(online: dict[str, Any], call: str, words: list[str]) -> None:
    result = online[call]
    assert result["os"], result  # an OSError, as for any file that cannot be read
    assert all(word in result["message"] for word in words), result["message"]
    assert result["seconds"] < 30


def test_the_push_command_makes_a_card_that_names_the_repository(online: dict[str, Any], hub: Hub, home: Path) -> None:
    status, said = online["push command"]["value"]
    assert status == 0 and said == f"Uploaded to {hub.url}/org/command\n"
    repository = hub.repos["org/command"]
    assert repository.private and {*repository.files} == {NAME, "README.md", "solver.png"}
    assert 'DyWeightScheduler.from_pretrained("org/command")' in repository.files["README.md"].decode()
    assert online["pull command"]["value"] == numbers(EULER)
    assert [file.name for file in (home / "my-solvers").iterdir()] == [NAME], "nothing is written beside the artefact"


def test_the_push_command_says_in_a_line_why_it_failed(online: dict[str, Any], hub: Hub) -> None:
    status, said = online["push refused"]["value"]
    assert status == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert said.startswith("dywspan: The upload to org/refused failed") and "hf auth login" in said


def test_list_and_inspect_know_the_hub(online: dict[str, Any]) -> None:
    status, said = online["list"]["value"]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in said.splitlines() if line.startswith("| ")}
    assert status == 0 and {"org/solvers", "org/solvers, subfolder sd/cfg7", "org/secret"} <= rows.keys()
    assert [cell.strip() for cell in rows["org/solvers"]] == ["DyWeightScheduler", "not said", "4 steps"]
    status, said = online["inspect"]["value"]
    assert status == 0 and said.startswith("DyWeightScheduler\n  for         4 steps\n")


def test_push_needs_rights(online: dict[str, Any], hub: Hub) -> None:
    assert "error" in online["push without rights"] and online["push without rights"]["seconds"] < 30


def test_offline_from_the_cache(online: dict[str, Any], home: Path) -> None:
    """With no server at all: what was downloaded loads, what was not says so."""
    nobody = "http://127.0.0.1:9"
    calls = {"cached": "load('org/solvers', subfolder='sd/cfg7')", "missing": "load('org/never')"}
    told = client(nobody, home, calls, HF_HUB_OFFLINE="1")
    assert told["missing"]["os"] and "org/never" in told["missing"]["message"] and told["missing"]["seconds"] < 30
    found_out = client(nobody, home, {"cached": calls["cached"]})
    for result in (told, found_out):
        assert result["cached"]["value"] == numbers(DEEP) and result["cached"]["seconds"] < 30
