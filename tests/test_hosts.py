"""Which schedulers a solver takes over from, and that their settings are honoured or refused, never dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import table_to_json
from dywspan.core.prediction import EDM
from dywspan.schedulers import hosts
from dywspan.schedulers.hosts import HOSTS, Kind

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
REFUSED = [
    "LCMScheduler", "TCDScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "MiniMaxH3Scheduler",
    "PiflowScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosScheduler",
    "HeliosDMDScheduler",
    "CMStochasticIterativeScheduler", "SCMScheduler", "RePaintScheduler", "UnCLIPScheduler", "KarrasVeScheduler",
    "DDPMWuerstchenScheduler", "IPNDMScheduler", "ScoreSdeVeScheduler",
]  # fmt: skip


def made(name: str, **settings: Any) -> Any:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    try:
        return getattr(diffusers, name)(**settings)
    except ImportError as error:  # DPMSolverSDE wants torchsde
        pytest.skip(str(error).strip().splitlines()[0])


def run(scheduler: Any, network: Any, x: Tensor, n: int = 5) -> list[Tensor]:
    scheduler.set_timesteps(n)
    x, states = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_is_known_as_an_object_from_memory_and_from_disk(name: str, tmp_path: Path) -> None:
    source = made(name)
    memory = dict(source.config)  # saving writes the class into it
    source.save_config(tmp_path)
    for given in (source, DyWeightScheduler.load_config(tmp_path), memory):
        if given is memory and name == "FlowMatchHeunDiscreteScheduler":
            with pytest.raises(ValueError, match=r"FlowMapEuler.* or FlowMatchHeun.*: pass the scheduler itself"):
                DyWeightScheduler.from_config(given)
            continue
        scheduler = DyWeightScheduler.from_config(given, solver="euler")
        found = hosts.HOSTS[scheduler.config["host_scheduler"]]
        assert found == HOSTS[name] and (given is memory or scheduler.config["host_scheduler"] == name)
        scheduler.set_timesteps(4)
        assert len(scheduler.timesteps) == 4 and bool(scheduler.timesteps.isfinite().all())


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_scheduler_is_refused_and_can_be_named_by_hand(name: str, tmp_path: Path) -> None:
    source = made(name)
    memory = dict(source.config)
    source.save_config(tmp_path)
    for given in (source, DyWeightScheduler.load_config(tmp_path), memory):
        with pytest.raises(ValueError, match=rf"({name}|These settings).*host_scheduler="):
            DyWeightScheduler.from_config(given)
    by_hand = DyWeightScheduler.from_config(source, host_scheduler="EDMEulerScheduler", prediction_type="epsilon")
    assert isinstance(by_hand.host.prediction, EDM)


def test_a_subclass_counts_as_its_nearest_known_ancestor() -> None:
    class Own(diffusers.EulerDiscreteScheduler):
        """Of a user."""

    source = Own(**SD, use_karras_sigmas=True)
    ours, theirs = (
        DyWeightScheduler.from_config(source, solver="euler"),
        diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    )
    for s in (ours, theirs):
        s.set_timesteps(5)
    assert ours.config["host_scheduler"] == "EulerDiscreteScheduler" and torch.equal(ours.sigmas, theirs.sigmas)

    class Foreign(diffusers.LCMScheduler):
        """Of nobody we know."""

    with pytest.raises(ValueError, match="'Foreign' is not one of the schedulers"):
        DyWeightScheduler.from_config(Foreign())


def test_a_new_host_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOSTS, "PiflowScheduler", Kind(lambda config, scheduler: EDM(2.0)))
    scheduler = DyWeightScheduler.from_config(
        made("PiflowScheduler"), grid={"sigmas": [9.0, 3.0, 1.0, 0.0]}, solver="euler"
    )
    scheduler.set_timesteps(3)
    assert scheduler.host.prediction.sigma_data == 2.0
    assert scheduler.timesteps.tolist() == pytest.approx([v / 4 for v in torch.tensor([9.0, 3.0, 1.0]).log().tolist()])


# ---------------------------------------------------------------------- from one to another


def test_the_last_scheduler_is_the_host_whatever_it_was_made_from() -> None:
    """DDIM -> ours -> Euler on Karras' grid -> ours; and a smaller class that was made from a larger one."""
    first = DyWeightScheduler.from_config(diffusers.DDIMScheduler(**SD).config, solver="ipndm")
    euler = diffusers.EulerDiscreteScheduler.from_config(first.config, use_karras_sigmas=True)
    ours = DyWeightScheduler.from_config(euler.config)
    for s in (ours, euler):
        s.set_timesteps(6)
    assert ours.config["host_scheduler"] == "EulerDiscreteScheduler" and torch.equal(ours.sigmas, euler.sigmas)
    smaller = diffusers.EulerDiscreteScheduler.from_config(diffusers.DPMSolverMultistepScheduler(**SD).config)
    assert DyWeightScheduler.from_config(smaller.config).config["host_scheduler"] == "EulerDiscreteScheduler"
    assert DyWeightScheduler.from_config(ours.config).config["host_scheduler"] == "EulerDiscreteScheduler"


def test_settings_registered_after_first_use_count(tmp_path: Path) -> None:
    """Stable Diffusion's constructor rewrites ``steps_offset`` so."""
    scheduler = DyWeightScheduler.from_config(diffusers.DDIMScheduler(**SD, steps_offset=0).config, solver="euler")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 800
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict({**scheduler.config, "steps_offset": 1})
    scheduler.set_timesteps(5)
    scheduler.save_config(tmp_path)
    again = DyWeightScheduler.from_pretrained(tmp_path)
    again.set_timesteps(5)
    assert scheduler.timesteps[0] == 801 and torch.equal(again.timesteps, scheduler.timesteps)
    scheduler.register_to_config(prediction_type="v_prediction", solver="heun")
    assert type(scheduler.host.prediction).__name__ == "Velocity" and scheduler.order == 2
    table = SolverTable(torch.ones(2, 1), torch.ones(2), {"sigmas": [9.0, 1.0, 0.0]})
    scheduler.register_to_config(tables={"2": table_to_json(table)})
    assert sorted(scheduler.tables) == [2]
    with pytest.raises(ValueError, match="solver_order=7 is out of range for 'ipndm'"):
        scheduler.register_to_config(solver="ipndm", solver_order=7)


def test_the_order_is_the_hosts_unless_given() -> None:
    config = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=3).config
    assert DyWeightScheduler.from_config(config, solver="dpmpp").config["solver_order"] == 3
    assert (
        DyWeightScheduler.from_config(config, solver="ipndm", solver_order=4).host.name == "DPMSolverMultistepScheduler"
    )
    with pytest.raises(ValueError, match="solver_order=5 is out of range for 'ipndm': 1 to 4"):
        DyWeightScheduler(solver_order=5)  # of the solver that there is without tables
    with pytest.raises(ValueError, match=r"has no settings \['sovler'\]"):
        DyWeightScheduler.from_config(config, sovler="ipndm")


# ---------------------------------------------------------------------- options of hosts


def test_estimates_are_clipped_where_the_host_clips(network: Any) -> None:
    x = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loud = lambda sample, t: 4 * network(sample, t)  # noqa: E731
    for limit in (1.0, 2.0):
        source = diffusers.DDIMScheduler(**SD, clip_sample=True, clip_sample_range=limit)
        free = DyWeightScheduler.from_config(diffusers.DDIMScheduler(**SD, clip_sample=False), solver="ipndm")
        assert float(run(free, loud, x)[-1].abs().max()) > 5 * limit
        table = SolverTable.initial(
            5, 2, {"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6}, free.host.prediction
        )
        for solver in ("euler", "ipndm", "dpmpp", "heun", None):
            ours = DyWeightScheduler.from_config(source, solver=solver)
            ours = ours if solver else ours.with_tables([table])
            assert float(run(ours, loud, x)[-1].abs().max()) <= limit * 1.5, solver
        euler = DyWeightScheduler.from_config(source, solver="euler")
        euler.set_timesteps(5)
        found = euler.step(loud(x, euler.timesteps[0]), euler.timesteps[0], x)
        assert float(found.pred_original_sample.abs().max()) == pytest.approx(limit)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_dynamic_thresholding_is_the_hosts(kind: str, network: Any) -> None:
    """DPM-Solver++ works on the estimate that it thresholds: equal in every step."""
    settings: dict[str, Any] = {"prediction_type": kind, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, thresholding=True, **settings)
    ours = DyWeightScheduler.from_config(theirs, solver="dpmpp")
    x = 2 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a, b in zip(run(ours, network, x), run(theirs, network, x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_settings_that_no_solver_here_has_are_refused() -> None:
    source = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match=r"stochastic_sampling=True: FlowMatchEuler.* adds new noise"):
        DyWeightScheduler.from_config(source, solver="euler").set_timesteps(4)
    upscaler = DyWeightScheduler.from_config(diffusers.EulerDiscreteScheduler(**SD), solver="euler")
    with pytest.raises(ValueError, match="StableDiffusionLatentUpscalePipeline"):
        upscaler.scale_model_input(torch.tensor(3.0), torch.tensor(500.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "cosmic"}, {"algorithm_type": "sde"}, {"beta_start": "low"}, {"trained_betas": [[0.1]]},
        {"trained_betas": 0.1}, {"timestep_spacing": "wide"}, {"prediction_type": ["epsilon"]},
        {"final_sigmas_type": "one"}, {"prediction_type": "flow_prediction"},
    ],
    ids=str,
)  # fmt: skip
def test_unknown_values_of_the_hosts_settings_are_named(wrong: dict[str, Any]) -> None:
    config = dict(diffusers.DPMSolverMultistepScheduler(**SD).config)
    with pytest.raises(
        ValueError, match=next(iter(wrong.values())) if isinstance(next(iter(wrong.values())), str) else "."
    ):
        DyWeightScheduler.from_config({**config, **wrong}, solver="ipndm").set_timesteps(4)


def test_a_flow_shift_that_is_linear_in_mu() -> None:
    source = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    ours = DyWeightScheduler.from_config(source, solver="euler", grid={"name": "flow"})
    ours.set_timesteps(4, mu=3.0)
    t = torch.linspace(1, 0, 5)
    torch.testing.assert_close(ours.sigmas, 3 * t / (3 * t + 1 - t))


def test_noise_schedules_are_there_where_the_host_has_them() -> None:
    """Training scripts read them."""
    source = diffusers.DDPMScheduler(**SD)
    ours = DyWeightScheduler.from_config(source)
    assert torch.equal(ours.alphas_cumprod, source.alphas_cumprod) and torch.equal(ours.betas, source.betas)
    flow = DyWeightScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler())
    assert not hasattr(flow, "alphas_cumprod") and not hasattr(flow, "betas")


# ---------------------------------------------------------------------- what a table is for


def test_a_table_is_of_one_convention(tmp_path: Path) -> None:
    sources = {
        "vp": diffusers.DDIMScheduler(**SD),
        "edm": diffusers.EDMEulerScheduler(),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    grids = {
        "vp": {"name": "logsnr", "sigma_min": 0.03, "sigma_max": 14.0},
        "edm": {"name": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0},
        "flow": {"name": "flow", "shift": 2.0},
    }
    for kind, source in sources.items():
        own = DyWeightScheduler.from_config(source)
        table = SolverTable.initial(3, 2, grids[kind], own.host.prediction)
        assert table.convention == kind
        own.with_tables([table]).save_pretrained(tmp_path / kind)
        again = DyWeightScheduler.from_pretrained(tmp_path / kind).tables[3]
        assert again.convention == kind and table_to_json(again) == table_to_json(table)
        for other, host in sources.items():
            if other == kind:
                continue
            theirs = DyWeightScheduler.from_config(host)
            with pytest.raises(
                ValueError, match=f"learned for networks of convention '{kind}', and this one is of '{other}'"
            ):
                theirs.with_tables([table])
            data = {"3": table_to_json(table)}
            with pytest.raises(ValueError, match=f"convention '{kind}'"):
                DyWeightScheduler.from_config(host, tables=data).set_timesteps(3)
            del data["3"]["convention"]  # a file before 0.2: its grid tells flow from the rest
            if "flow" in (kind, other):
                with pytest.raises(ValueError, match=r"convention|levels|noise level"):
                    DyWeightScheduler.from_config(host, tables=data).set_timesteps(3)
    with pytest.raises(ValueError, match="convention='ve' is not one of"):
        SolverTable(torch.ones(1, 1), torch.ones(1), {"name": "flow"}, convention="ve")
