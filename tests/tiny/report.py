"""What the tests of the rows found, written to docs/results/pipelines.json and docs/pipelines.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import dywspan

from .refused import REFUSED
from .registry import PIPELINES, Tiny, build, made

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "pipelines.json"
COMMAND = "DYWSPAN_WRITE_DOCS=1 pytest tests/test_pipelines.py"

Outcomes = Mapping[tuple[str, str, str], bool]  # (test, pipeline, scheduler) -> whether it passed


def expected(schedulers: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, scheduler) for name in (*PIPELINES, *REFUSED) for scheduler in schedulers]


def check(schedulers: Sequence[str]) -> None:
    """The committed list is the registry's: every row works or is refused, as it should."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [(r["pipeline"], r["scheduler"]) for r in data["rows"]] == expected(schedulers), f"Run: {COMMAND}"
    for r in data["rows"]:
        assert r["ok"] is (r["refused"] is None), r
        assert r["refused"] is not None or r["pipeline"] in PIPELINES, r
    table = (DOCS / "pipelines.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in (*PIPELINES, *REFUSED)), f"Run: {COMMAND}"


def write(outcomes: Outcomes, schedulers: Sequence[str]) -> None:
    """Raises KeyError unless every test of every row ran, in this process and with a diffusers that has all classes."""
    tinies = {name: build(name) for name in PIPELINES} | {name: made(make) for name, (make, _) in REFUSED.items()}
    rows = [_row(tinies[name], name, scheduler, outcomes) for name, scheduler in expected(schedulers)]
    modules = {"dywspan": dywspan, "diffusers": diffusers, "transformers": transformers, "torch": torch}
    data = {
        "command": COMMAND,
        "versions": {"python": platform.python_version(), **{k: m.__version__ for k, m in modules.items()}},
        "device": "cpu",
        "rows": rows,
    }
    replace(RESULTS, json.dumps(data, indent=2) + "\n")
    replace(DOCS / "pipelines.md", "\n".join(_page(tinies, rows, schedulers)) + "\n")


def _row(tiny: Tiny, name: str, scheduler: str, outcomes: Outcomes) -> dict[str, Any]:
    """``ok``: it works; ``refused``: why it does not, in words, where the scheduler says so with an error."""
    if name in REFUSED:
        who = "DyWeightScheduler" if scheduler == "TimeLift" else scheduler
        ok, refused = False, tiny.exercises if outcomes["refused", name, who] else None
    elif scheduler == "SpanLiftScheduler" and tiny.unlifted:
        ok, refused = False, tiny.unlifted if outcomes["swap", name, scheduler] else None
    elif scheduler == "TimeLift":
        found = outcomes["time lift", name, "DyWeightScheduler"]
        ok, refused = found and not tiny.unmodulated, tiny.unmodulated if found and tiny.unmodulated else None
    else:
        tests = [("swap", scheduler), ("by hand", scheduler), ("exact", "DyWeightScheduler")]
        ok, refused = all([outcomes[test, name, which] for test, which in tests]), None
    return {"pipeline": name, "scheduler": scheduler, "ok": ok, "refused": refused}


def _page(tinies: Mapping[str, Tiny], rows: Sequence[dict[str, Any]], schedulers: Sequence[str]) -> list[str]:
    lines = [
        "# Pipelines",
        "",
        f"Tested with {len(PIPELINES)} pipelines and variants. Known incompatible: {len(REFUSED)},",
        "[listed below](#refused) with the reason.",
        "",
        "Each row is a diffusers pipeline class with tiny random networks, run on the CPU with diffusers",
        f"{diffusers.__version__}. `{COMMAND}` writes this page. A tick means that after",
        "",
        "```python",
        "pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler.config, ...)",
        "pipe.update_components(scheduler=DyWeightScheduler.from_config(pipe.scheduler.config, ...))  # modular",
        "```",
        "",
        "the pipeline runs unchanged with a learned table (order 2, time shifting and time scaling), with the same",
        "table lifted by a SpanLift operator, and with the classical solvers `dpmpp` and `ipndm`, and that",
        "",
        "- a batch equals its samples one by one, and dtypes stay;",
        "- the network is told exactly `scheduler.timesteps`, once per step and guidance branch;",
        "- every step of the learned table and of the lifted one equals the papers' equations evaluated by hand;",
        "- a lift of zero is its base, bit for bit;",
        "- TimeLift finds what to learn in its network; offsets of zero change nothing, bit for bit, and after a call",
        "  the network is as it was;",
        "- the classical solver in the third column gives the same result as the scheduler the pipeline came with.",
        "",
        f"| pipeline | what this row adds | equals own scheduler | {' | '.join(schedulers)} |",
        f"|---|---|---|{'---|' * len(schedulers)}",
    ]
    mark = {(r["pipeline"], r["scheduler"]): "✓" if r["ok"] else r["refused"] or "✗" for r in rows}
    for name in PIPELINES:
        exact = ", ".join(f"{k}={v!r}" for k, v in tinies[name].exact.items())
        marks = " | ".join(mark[name, s] for s in schedulers)
        lines.append(f"| {name} | {tinies[name].exercises} | `{exact}` | {marks} |")
    lines += [
        "",
        "Good to know:",
        "",
        "- Packed tokens (FLUX, Chroma, QwenImage) do not tell SpanLift their height and width. It infers a square.",
        "  For any other size, and for packed video (LTX), call `pipe = dywspan.bind(pipe)` once, or",
        "  `scheduler.set_latent_size(height, width)`. Without it most sizes are an error, but sides as 1 to 4 have",
        "  as many tokens as a square and are taken for one. A DyWeight scheduler needs neither.",
        "- SDXL base and refiner pass latents on in the middle of a run (`denoising_end`, `denoising_start`): give",
        "  both pipelines the same solver. Its latents are scaled as the network wants them, like DDIM's and unlike",
        "  EulerDiscreteScheduler's.",
        "- Solvers pass times on as they are. A pipeline's own scheduler may cut them to integers (SANA's); results",
        "  then differ by that rounding. Pipelines that round times to bfloat16 (Flux and others) still do.",
    ]
    lines += [
        "",
        "## Refused",
        "",
        "These pipelines run with the scheduler they came with. With one of ours they stop with an error, at the",
        "first step or earlier.",
        "",
        "| pipeline | its scheduler | why |",
        "|---|---|---|",
    ]
    for name in REFUSED:
        tiny = tinies[name]
        lines.append(f"| {name} | {type(tiny.pipe.scheduler).__name__} | {tiny.exercises} |")
    return lines


def replace(path: Path, text: str) -> None:
    """Write beside the file and rename, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
