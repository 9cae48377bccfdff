"""One line for any pipeline: load, check, bind, swap, undo; and what a bound pipeline tells, and whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny as tp
import torch
from test_pipelines import dyweight, spanlift
from torch import Tensor

import dywspan
from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.core.continuous import FEATURES, ContinuousTable, guided

MODULAR = ["FluxModularPipeline", "StableDiffusionXLModularPipeline", "QwenImageModularPipeline", "WanModularPipeline"]


@pytest.fixture
def fresh() -> Iterator[Any]:
    """Tiny pipelines of one's own: binding changes them."""
    tp.build.cache_clear()
    yield tp.build
    tp.build.cache_clear()


def solvers(tiny: tp.Tiny, folder: Path) -> tuple[Path, Path]:
    config = tiny.pipe.scheduler.config
    dyweight(config, tiny.steps, tiny.flow).save_pretrained(folder / "table")
    spanlift(tiny).save_pretrained(folder / "lifted")
    return folder / "table", folder / "lifted"


def sampled(tiny: tp.Tiny) -> Tensor:
    """With the scheduler that is in it."""
    return tp.run(tiny, tiny.pipe.scheduler, [0]).output


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", *MODULAR])
def test_a_solver_is_applied_and_undone(name: str, tmp_path: Path, fresh: Any) -> None:
    tiny = fresh(name)
    kind, own = type(tiny.pipe), tiny.pipe.scheduler
    before = sampled(tiny)
    for folder, cls in zip(solvers(tiny, tmp_path), (DyWeightScheduler, SpanLiftScheduler)):
        with dywspan.apply(tiny.pipe, folder) as applied:
            assert type(tiny.pipe.scheduler) is cls is type(dywspan.load(folder)) and applied.pipe is tiny.pipe
            assert tiny.pipe.scheduler is applied.scheduler
            output = sampled(tiny)
            assert not torch.allclose(output, before, rtol=1e-2, atol=1e-2)
            assert torch.equal(output, tp.run(tiny, dywspan.load(folder), [0]).output)
        assert type(tiny.pipe) is kind and tiny.pipe.scheduler is own
        assert torch.equal(sampled(tiny), before)


def test_a_solver_of_other_networks_is_refused_and_one_of_another_model_is_said(tmp_path: Path, fresh: Any) -> None:
    sd, flux = fresh("StableDiffusionPipeline"), fresh("FluxPipeline")
    table, _ = solvers(sd, tmp_path)
    own = flux.pipe.scheduler
    with pytest.raises(ValueError, match=r"learned for Epsilon networks, and that of FluxPipeline is of kind Flow"):
        dywspan.apply(flux.pipe, table)
    assert flux.pipe.scheduler is own
    v = fresh("StableDiffusionPipeline (v-prediction)")
    with pytest.raises(ValueError, match="of kind Velocity"):
        dywspan.apply(v.pipe, table)
    config = json.loads((table / "scheduler_config.json").read_text())
    config["tables"]["3"]["provenance"] = {"base_model": "org/one"}
    (table / "scheduler_config.json").write_text(json.dumps(config))
    sd.pipe.register_to_config(_name_or_path="org/another")
    with pytest.warns(UserWarning, match="learned on org/one, and the pipeline is org/another"):
        dywspan.apply(sd.pipe, table).undo()


def test_what_is_no_solver_is_named(tmp_path: Path) -> None:
    diffusers.EulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'EulerDiscreteScheduler', which is no solver of dywspan"):
        dywspan.load(tmp_path)
    with pytest.raises(OSError):
        dywspan.load(tmp_path / "nothing")


def test_each_class_loads_its_own(tmp_path: Path, fresh: Any, caplog: pytest.LogCaptureFixture) -> None:
    table, lifted = solvers(fresh("StableDiffusionPipeline"), tmp_path)
    with pytest.raises(ValueError, match=r"holds a SpanLiftScheduler: load it with that class, or with dywspan\.load"):
        DyWeightScheduler.from_pretrained(lifted)
    with pytest.raises(ValueError, match="holds a DyWeightScheduler"):
        SpanLiftScheduler.from_pretrained(table)
    file = dywspan.load(lifted / "scheduler_config.json")  # as diffusers' own classes take it
    assert isinstance(file, SpanLiftScheduler) and file.operators
    base = DyWeightScheduler.from_config(dywspan.load(lifted).config)
    assert sorted(base.tables) == [3] and "lifts" not in base.config and not caplog.records


def test_a_file_of_a_newer_version_is_stamped_anew_when_saved(tmp_path: Path, fresh: Any) -> None:
    table, _ = solvers(fresh("StableDiffusionPipeline"), tmp_path)
    file = table / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dywspan_version": "99.0.0"}))
    with pytest.warns(UserWarning, match=r"written by dywspan 99\.0\.0, newer than the installed"):
        scheduler = dywspan.load(table)
    scheduler.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / file.name).read_text())["dywspan_version"] == dywspan.__version__


def test_files_of_the_first_version_are_read(tmp_path: Path, fresh: Any) -> None:
    """They call the order of the solver ``order``, beside a host's ``solver_order``, and say no convention."""
    tiny = fresh("PixArtSigmaPipeline")
    DyWeightScheduler.from_config(tiny.pipe.scheduler, solver="ipndm").save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "solver_order": 2, "order": 4, "dywspan_version": "0.1.0"}))
    scheduler = dywspan.load(tmp_path)
    assert scheduler.config["solver_order"] == 4 and scheduler.order == 1


# ---------------------------------------------------------------------- bound pipelines


def test_a_sibling_of_a_bound_pipeline_is_told_nothing(fresh: Any) -> None:
    """``from_pipe`` gives it the same scheduler: size and guidance of another's call would be wrong there."""
    tiny, other = fresh("FluxPipeline"), fresh("FluxImg2ImgPipeline")
    grid = {"name": "flow", "shift": 2.0}
    function = guided(ContinuousTable(0.02 * torch.ones(3, len(FEATURES)).double(), grid), 4.0)
    function.coefficients[:, len(FEATURES) :] = 0.02
    scheduler = DyWeightScheduler.from_config(tiny.pipe.scheduler).with_continuous(function)
    lifted = spanlift(tiny)
    applied = dywspan.apply(tiny.pipe, scheduler)
    tp.run(tiny, scheduler, [0], guidance_scale=9.0)
    assert scheduler.request.guidance_scale == 9 and scheduler.guidance_scale is None
    sibling = diffusers.FluxImg2ImgPipeline.from_pipe(tiny.pipe)
    assert sibling.scheduler is scheduler
    with pytest.raises(ValueError, match="bind the pipeline"):  # not bound, it cannot begin late
        tp.run(other, scheduler, [0], guidance_scale=1.0)
    assert scheduler.request.guidance_scale is None
    tp.run(tiny, lifted, [0], height=24, width=40)
    assert lifted.request.latent_size == (12, 20) and lifted.latent_size is None
    with pytest.raises(RuntimeError):  # and so after an error
        tp.run(tiny, lifted, [0], height=24, width=40, prompt_embeds=torch.zeros(1, 8, 3))
    assert lifted.latent_size is None
    applied.undo()


@pytest.mark.parametrize("size", [{"height": 96, "width": 160}, {"height": 160, "width": 96}])
def test_a_modular_pipeline_is_bound(size: dict[str, int], fresh: Any) -> None:
    """Height and width from its inputs, guidance from its guider."""
    tiny = fresh("FluxModularPipeline")  # no decoder: eight pixels are a latent's one
    lifted = spanlift(tiny)
    with pytest.raises(ValueError, match="60 tokens are not a square"):
        tp.run(tiny, lifted, [0], **size)
    dywspan.bind(tiny.pipe)
    output = tp.run(tiny, lifted, [0], **size).output
    assert lifted.request.latent_size == (size["height"] // 8, size["width"] // 8) and lifted.latent_size is None
    assert output.isfinite().all()
    sdxl = fresh("StableDiffusionXLModularPipeline")
    table = dyweight(sdxl.pipe.scheduler.config, sdxl.steps, sdxl.flow)
    dywspan.bind(sdxl.pipe)
    tp.run(sdxl, table, [0])
    assert table.request.guidance_scale == sdxl.pipe.guider.guidance_scale > 1
    assert type(sdxl.pipe).__name__ == "StableDiffusionXLModularPipeline"


def test_a_modular_pipeline_is_saved_and_loaded_with_its_solver(tmp_path: Path, fresh: Any) -> None:
    tiny = fresh("FluxModularPipeline")
    table, lifted = solvers(tiny, tmp_path)
    for folder in (table, lifted):
        with dywspan.apply(tiny.pipe, folder):
            output = sampled(tiny)
            target = tmp_path / f"pipe-{folder.name}"
            tiny.pipe.save_pretrained(str(target), overwrite_modular_index=True)
        again = diffusers.ModularPipeline.from_pretrained(str(target))
        again.load_components(names=["scheduler"])
        assert type(again.scheduler) is type(dywspan.load(folder))
        assert torch.equal(tp.run(tiny, again.scheduler, [0]).output, output)


def test_a_saved_pipeline_is_loaded_without_importing_dywspan(tmp_path: Path, fresh: Any) -> None:
    tiny = fresh("StableDiffusionPipeline")
    scheduler = dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)
    scheduler.remote_code = True
    with dywspan.apply(tiny.pipe, scheduler):
        tiny.pipe.save_pretrained(tmp_path / "pipe")
    shim = (tmp_path / "pipe" / "scheduler" / "dywspan.py").read_text()
    assert shim.count("\n") == 1 and shim.startswith("from dywspan import ")
    script = (
        "import diffusers\n"
        "how = {'text_encoder': None, 'tokenizer': None, 'trust_remote_code': True}\n"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / 'pipe')!r}, **how)\n"
        "print(type(pipe.scheduler).__name__, sorted(pipe.scheduler.tables))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip().endswith("DyWeightScheduler [3]"), done.stderr[-2000:]
