"""The YAML files in training/configs say what the papers say, and fit their pipelines; the pages list what there is.

``DYWSPAN_WRITE_DOCS=1 pytest tests/test_configs.py`` writes their generated tables.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from tiny import build, pixel_unet

from dywspan.cli import main
from dywspan.commands.learn import DISTILL
from dywspan.core.bases import BASES
from dywspan.core.grid import GRIDS
from dywspan.core.layout import LAYOUTS
from dywspan.distill.config import DistillConfig, LearningConfig
from dywspan.distill.losses import LATENT
from dywspan.distill.setup import prepare
from dywspan.edm import EDMPipeline, EDMUNet
from dywspan.pipelines.features import FEATURES, NETWORKS
from dywspan.pipelines.inputs import OWN, SETS
from dywspan.settings import add_arguments, make_config
from dywspan.text import markdown
from dywspan.tuning.config import TuneConfig

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))}
PAPERS = [name for name in CONFIGS if not name.startswith("emoji")]
DOCS = ROOT / "docs"
# The pages about learning.
PAGES = [DOCS / f"{name}.md" for name in ("training", "least-squares", "continuous", "losses", "settings", "papers")]
PAGES += [DOCS / "how-to" / f"{name}.md" for name in ("memory", "prompts", "runs", "several-gpus")]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

# What the papers say, and their reference code where they are silent.
POLYNOMIAL = {"name": "polynomial", "rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0}
LSUN_RANGE = {"name": "discrete", "sigma_min": 0.03876, "sigma_max": 83.82}
SD_RANGE = {"name": "discrete", "sigma_min": 0.029167532920837402, "sigma_max": 14.614641189575195}
TABLE = dict(solver="dyweight", optimizer="adam", init="ipndm", afs=False, bounded=0.0, weight_decay=0.0, clip=1.0)
LIFT = dict(solver="spanlift", operator={"width": 64, "blocks": 2, "kernel": 3})
EQ_16 = dict(loss="mse", features="dinov2", latent_weight=0.1)
EDM = dict(teacher="ipndm", teacher_steps=35, teacher_grid=POLYNOMIAL, pairs=10_000, order=3, features="inception")
PIXELS = dict(EDM, **TABLE | dict(afs=True, steps=[*range(3, 10)], batch_size=16, grid=POLYNOMIAL))
SANA = dict(EQ_16, model="Efficient-Large-Model/Sana_600M_512px_diffusers", steps=[3, 5, 7], pairs=5_000)
SANA |= dict(teacher="ipndm", teacher_steps=20, teacher_order=2)
SANA |= dict(call={"height": 512, "width": 512, "guidance_scale": 4.5})
FLUX = dict(model="black-forest-labs/FLUX.1-dev", order=2, layout="packed", pairs=5_000)
FLUX |= dict(teacher="FlowMatchEulerDiscreteScheduler", teacher_steps=28)
FLUX |= dict(call={"height": 512, "width": 512, "guidance_scale": 3.5})
SD15 = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", call={"guidance_scale": 7.5}, pairs=5_000)
SD15 |= dict(teacher="ipndm", teacher_steps=50, teacher_order=2, teacher_grid=SD_RANGE, grid=SD_RANGE)
LATENT_MSE = dict(loss="mse", features=None)
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10_dyweight": dict(PIXELS, lr=3e-2),
    "ffhq_dyweight": dict(PIXELS, lr=1e-2),
    "afhqv2_dyweight": dict(PIXELS, lr=1e-2),
    "imagenet64_dyweight": dict(PIXELS, lr=5e-3),
    "lsun_bedroom_dyweight": dict(
        PIXELS, lr=1e-2, batch_size=4, latent_weight=0.0, grid=LSUN_RANGE, teacher_grid=LSUN_RANGE
    ),
    "sd15_dyweight": dict(TABLE, **SD15, **LATENT_MSE, order=2, steps=[4, 6, 8, 10], batch_size=2, lr=5e-4),
    "flux_dyweight": dict(
        dict(TABLE, **FLUX, **LATENT_MSE, steps=[3, 5, 7, 9], lr=1e-3, grid={"name": "flow"}),
        **dict(optimizer="adamw", weight_decay=5e-2, init="euler", bounded=0.5),
    ),
    "sana_dyweight": dict(TABLE, **SANA, order=2),
    "cifar10_spanlift": dict(EDM, **LIFT, steps=[3, 4, 5, 6]),
    "ffhq_spanlift": dict(EDM, **LIFT, steps=[3, 4, 5, 6]),
    "afhqv2_spanlift": dict(EDM, **LIFT, steps=[3, 4, 5, 6]),
    "imagenet64_spanlift": dict(EDM, **LIFT, steps=[3, 4, 5, 6]),
    "sana_spanlift": dict(SANA, **LIFT),
    "flux_spanlift": dict(FLUX, **LIFT, **EQ_16, steps=[5, 9]),
}


@functools.cache
def read(name: str) -> DistillConfig:
    """An unknown key or a value of the wrong kind is an error."""
    return make_config({"config": str(CONFIGS[name])}, DistillConfig)


# ------------------------------------------------------------------------------------------------------ configurations


def test_every_experiment_of_the_papers_has_a_file() -> None:
    assert sorted(PUBLISHED) == sorted(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_values_are_the_papers(name: str) -> None:
    config = read(name)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    if config.solver == "dyweight":
        assert config.updates * config.batch_size == config.pairs, "one pass over the pairs"


@pytest.mark.parametrize("name", PAPERS)
def test_every_hyper_parameter_names_its_source(name: str) -> None:
    own = {"model", "output", "cache", "prompts", "prompt_column", "prompt_split", "solver", "layout"}
    lines = CONFIGS[name].read_text().splitlines()
    for above, line in zip(["", *lines], lines):
        key = line.partition(":")[0]
        if line and not line.startswith("#") and key not in own:
            comment = line.partition(" # ")[2] or above * above.startswith("#")
            assert re.search(r"(Sec|Tab|Fig|App)\. \S|eq\. \(|reference code|our choice", comment), f"{name}: {key}"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("spanlift")])
def test_a_lift_finds_its_base_and_its_teacher_pairs(name: str) -> None:
    lift, base = read(name), read(name.replace("spanlift", "dyweight"))
    assert lift.base == base.output and {*lift.steps} <= {*base.steps}
    shared = (
        "model",
        "revision",
        "dtype",
        "call",
        "prompts",
        "prompt_column",
        "prompt_split",
        "held_out_prompts",
        "cache",
    )
    shared += ("teacher", "teacher_steps", "teacher_order", "teacher_grid", "teacher_batch_size", "pairs", "held_out")
    assert {k: getattr(lift, k) for k in shared} == {k: getattr(base, k) for k in shared}


def _unconditional(**network: Any) -> Any:
    unet = EDMUNet("ddpm++", 8, model_channels=8, channel_mult=(1, 1), layers_per_block=1, **network)
    return EDMPipeline(unet, diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))


def _labelled() -> Any:
    return _unconditional(num_class_embeds=1000)


def _latent() -> Any:
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
    return diffusers.LDMPipeline(diffusers.VQModel(), pixel_unet(), diffusers.DDIMScheduler(**betas))


# Tiny networks in the class each file is for, with the scheduler it asks for.
TINY: dict[str, Any] = {
    **dict.fromkeys(("cifar10", "ffhq", "afhqv2"), _unconditional),
    "imagenet64": _labelled,
    "lsun": _latent,
    "sd15": lambda: build.__wrapped__("StableDiffusionPipeline").pipe,
    "sana": lambda: build.__wrapped__("SanaPipeline").pipe,
    "flux": lambda: build.__wrapped__("FluxPipeline").pipe,
}


@pytest.mark.parametrize("name", PAPERS)
def test_settings_fit_the_pipeline_and_each_other(name: str, tmp_path: Path) -> None:
    """What a run checks before it computes: call, teacher, grids, and a start for every number of steps."""
    config, pipe = read(name), TINY[name.partition("_")[0]]()
    own: dict[str, Any] = {"prompts": None, "features": None, "latent_weight": None}  # not here: files and weights
    if config.prompts is not None:
        own["prompts"] = [{"class_labels": 207}] * 2 if config.prompts.endswith(".jsonl") else ["a cat"] * 2
    own |= {"pairs": 1, "held_out": 1, "output": str(tmp_path), "base": "euler"}
    setup = prepare(pipe, replace(config, **own))
    steps = setup.teacher.num_inference_steps
    ends_above_zero = config.teacher_grid is not None
    assert steps == config.teacher_steps + ends_above_zero, "a last evaluation denoises where the grid ends above 0"
    for n in config.steps:
        untrained = setup.untrained(n)
        untrained.set_timesteps(n, **({"mu": 0.63} if name.startswith("flux") else {}))
        assert len(untrained.timesteps) == n
        if config.solver == "dyweight":
            assert len(untrained.tables[n].weights) == n + config.afs


@pytest.mark.parametrize(
    "options", [["emoji_sd_dyweight.yaml"], ["emoji_sd_spanlift.yaml", "--base", "euler"]], ids=len
)
def test_the_embedded_pipelines_files_are_ready_to_run(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    file, *rest = options
    small = ["--micro-batch-size", "1", "--output", str(tmp_path)]
    assert main(["distill", "--config", f"training/configs/{file}", "--dry-run", *small, *rest]) == 0
    printed = capsys.readouterr().out
    config = read(Path(file).stem)
    pairs, samples = config.pairs + config.held_out, (config.updates or 0) * config.batch_size
    assert re.search(rf"\| teacher +\| {pairs} pairs +\| {pairs * 50} ", printed)
    for n in config.steps:
        assert re.search(rf"\| {n} steps, learning +\| {samples} samples +\| {samples * n} ", printed)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


# ------------------------------------------------------------------------------------------------------------ document


def settings(kind: type, but: type | None = None) -> str:
    """The table of a dataclass's settings."""
    known = {f.name for f in fields(but)} if but else set()
    rows = []
    for f in fields(kind):
        if f.name not in known:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            shown = "" if default in (None, "") else f"`{json.dumps(default).strip(chr(34))}`"
            choices = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace(", ", " or ").replace("'", ""), str(f.type))
            row = {
                "setting": f"`{f.name}`",
                "kind": choices.replace("|", "or").replace("None", "null").replace("dict[str, Any]", "mapping"),
            }
            rows.append({**row, "default": shown, "meaning": f.metadata["help"]})
    return markdown(rows)


def recipes() -> str:
    """The table of the files in training/configs."""
    rows = []
    for name in sorted(CONFIGS, key=lambda n: (n in PAPERS, n.endswith("spanlift"), n)):
        c = read(name)
        order = f" {c.teacher_order}" if c.teacher in BASES else ""
        rows.append(
            {
                "file": f"[{name}](../training/configs/{name}.yaml)",
                "model": c.model,
                "steps": ", ".join(map(str, c.steps)),
                "teacher": f"{c.teacher}{order}, {c.teacher_steps} steps",
                "pairs": c.pairs,
                "loss": f"{c.latent_weight:g} {c.loss} + {c.features}" if c.latent_weight else c.features or c.loss,
                "updates": f"{c.updates} of {c.batch_size}",
            }
        )
    return markdown(rows)


TABLES = {
    "what a run does": ("settings", lambda: settings(DistillConfig, but=LearningConfig)),
    "how a solver is learned": ("settings", lambda: settings(LearningConfig)),
    "recipes": ("papers", recipes),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_documents_tables_are_generated(name: str) -> None:
    page, make = TABLES[name]
    document, table = DOCS / f"{page}.md", make()
    text = document.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name} -->\n\n).*?(\n\n<!-- end -->)", re.S)
    if os.environ.get("DYWSPAN_WRITE_DOCS") == "1":
        document.write_text(marks.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
    assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in document.read_text(encoding="utf-8"), (
        "Run: DYWSPAN_WRITE_DOCS=1 pytest tests/test_configs.py"
    )


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def _commands() -> list[list[str]]:
    """The options of every distillation in the document, in bash blocks and in tables."""
    lines = "\n".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    shown = [re.split(r"dywspan distill|dywspan\.distill|training/distill\.py", line) for line in lines]
    cells = re.findall(r"^\|.*?\| `(--[^`]+)` \|", TEXT, re.M)
    return [shlex.split(parts[1]) for parts in shown if len(parts) > 1] + [shlex.split(cell) for cell in cells]


def test_every_command_of_the_document_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_arguments(parser, DistillConfig, DISTILL)
    commands = _commands()
    assert len(commands) > 15
    for options in commands:
        given = vars(parser.parse_args(options))
        if "config" in given and not Path(given["config"]).exists():
            given["config"] = "training/configs/emoji_sd_dyweight.yaml"  # stands for the user's own
        make_config({"model": "org/model", "output": "my-solvers", **given}, DistillConfig)


def test_every_yaml_of_the_document_is_understood() -> None:
    for block in _blocks("yaml"):
        given = yaml.safe_load(block)
        assert given and given.keys() <= {f.name for f in fields(DistillConfig)}, block
        DistillConfig(**{"model": "org/model", "output": "my-solvers", **given})


def test_every_setting_the_document_names_exists() -> None:
    """A word in code style is a setting or one of its choices, and so is what stands after its colon."""
    choices = {*BASES, *GRIDS, *LAYOUTS, *FEATURES, *NETWORKS, *LATENT, *SETS, OWN, "true", "false", "null"}
    choices |= {"adam", "adamw", "bf16", "fp16", "bfloat16", "least_squares"}
    known = {f.name for f in (*fields(DistillConfig), *fields(TuneConfig))}
    text = re.sub(r"```.*?```|<!-- .*?<!-- end -->", "", TEXT, flags=re.S)
    named = re.findall(r"`([a-z_0-9]+)(?:: ([a-z_]+|\d+))?`", text)
    assert len(named) > 60
    assert {name for name, _ in named} <= known | choices
    assert {value for _, value in named if value and not value.isdigit()} <= choices
