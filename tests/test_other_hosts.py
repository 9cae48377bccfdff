"""Solvers in hosts other than diffusers' pipelines: ComfyUI's samplers, vLLM-Omni's and SD.Next's schedulers."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.artifact import table_to_json
from dywspan.core.table import SolverTable

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads(golden.FILE.read_text())
TABLES = [n for n, case in GOLDEN["cases"].items() if "tables" in case["config"]]
NOISE = torch.tensor(GOLDEN["noise"], dtype=torch.float64)
MEAN, STD = (torch.tensor(GOLDEN["data"][k], dtype=torch.float64) for k in ("mean", "std"))


# ---------------------------------------------------------------------------------------- ComfyUI


class KSAMPLER:
    """What a run asks of ComfyUI's ``comfy.samplers.KSAMPLER``: the noise scaled, the sampler function called."""

    def __init__(self, sampler_function: Callable[..., Tensor], extra_options: Any = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return float(sigmas[0]) >= float(model_wrap.inner_model.model_sampling.sigma_max) * (1 - 1e-5)

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, latent_image: Tensor
    ) -> Tensor:
        model_sampling, whole = model_wrap.inner_model.model_sampling, self.max_denoise(model_wrap, sigmas)
        x = model_sampling.noise_scaling(sigmas[0], noise, latent_image, whole)
        call = {"extra_args": extra_args, "callback": callback, "disable": True, **self.extra_options}
        return self.sampler_function(model_wrap, x, sigmas, **call)


class EPS:
    """Its VE frame; a whole run starts at sqrt(1 + sigma^2), unless a sampler says it is none."""

    sigma_max = 0.0  # every run is a whole one

    def noise_scaling(self, sigma: Any, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return latent + noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma)


class CONST:
    """Its flow frame."""

    sigma_max = 0.0

    def noise_scaling(self, sigma: Any, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return sigma * noise + (1 - sigma) * latent


class Guider:
    """``model(x, sigma, **extra)`` of ComfyUI: the estimate of x0, here that of the golden vectors."""

    def __init__(self, flow: bool) -> None:
        self.inner_model = types.SimpleNamespace(model_sampling=CONST() if flow else EPS())
        self.asked: list[Tensor] = []
        self.flow = flow

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        assert extra == {"model_options": {}, "seed": 7} and sigma.shape == (len(x),) and sigma.dtype == x.dtype
        self.asked.append(sigma)
        return torch.stack([golden.denoised(v, s, self.flow, MEAN, STD) for v, s in zip(x, sigma)]).to(x.dtype)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The node package, with stand-ins for the two modules of ComfyUI that it imports."""
    for name, members in [
        ("comfy", {}),
        ("comfy.samplers", {"KSAMPLER": KSAMPLER}),
        ("comfy.model_sampling", {"CONST": CONST}),
    ]:
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("comfyui_dywspan")
    for name in [n for n in sys.modules if n.partition(".")[0] == "comfyui_dywspan"]:
        del sys.modules[name]


def load(nodes: Any, folder: Path, config: dict[str, Any], steps: int, tokens: int = 4096) -> tuple[Any, Tensor]:
    """As ComfyUI calls a node."""
    node = nodes.NODE_CLASS_MAPPINGS["DywspanSolver"]
    inputs = node.INPUT_TYPES()["required"]
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    given = {"solver": str(folder), "steps": steps, "width": 256, "height": tokens}
    assert inputs.keys() == given.keys() and node.RETURN_TYPES == ("SAMPLER", "SIGMAS")
    assert node.IS_CHANGED(**given) == node.IS_CHANGED(**given)
    return getattr(node(), node.FUNCTION)(**given)


def comfy_config(name: str) -> dict[str, Any]:
    """A golden solver's; mu of its run is that of every size."""
    case = GOLDEN["cases"][name]
    sizes = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    return case["config"] | sizes | {"base_shift": case.get("mu", 0.0), "max_shift": case.get("mu", 0.0)}


def sample(sampler: Any, sigmas: Tensor, guider: Guider, latent: Tensor | None = None, **options: Any) -> Tensor:
    noise = NOISE.repeat(2, 1)
    extra = {"model_options": {}, "seed": 7}
    latent = torch.zeros_like(noise) if latent is None else latent.expand_as(noise)
    return sampler.sample(guider, sigmas, extra, options.get("callback"), noise, latent)


@pytest.mark.parametrize("name", TABLES)
def test_the_comfyui_node_reproduces_the_golden_vectors(nodes: Any, tmp_path: Path, name: str) -> None:
    case, seen = GOLDEN["cases"][name], []
    sampler, sigmas = load(nodes, tmp_path, comfy_config(name), case["steps"])
    begin = case.get("begin", 0)
    skipped = case["config"]["tables"][str(case["steps"])].get("afs", False) and not begin
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor(case["levels"]))
    guider = Guider(flow="flow" in name)
    sigmas = torch.tensor(case["levels"], dtype=torch.float64)  # ComfyUI's are float32, which would round the noise
    latent = MEAN if begin else None
    end = sample(sampler, sigmas[begin:], guider, latent, callback=seen.append)
    states = torch.tensor(case["states"], dtype=torch.float64)
    torch.testing.assert_close(end, states[-1].repeat(2, 1), rtol=1e-6, atol=1e-6)
    for found, expected, row in zip(seen, states, range(begin, len(case["queries"]))):
        torch.testing.assert_close(found["x"], expected.repeat(2, 1), rtol=1e-6, atol=1e-6)
        assert found["i"] == row - begin and float(found["sigma"]) == case["levels"][row]
        assert found["denoised"].shape == end.shape
    assert len(seen) == len(case["queries"]) - begin
    asked = torch.stack(guider.asked)
    expected = torch.tensor(case["queries"][begin + skipped :], dtype=torch.float64)
    torch.testing.assert_close(asked, expected[:, None].expand(-1, 2), rtol=1e-6, atol=0)
    assert len(asked) == len(case["queries"]) - begin - skipped


def test_in_float32_the_comfyui_node_stays_close(nodes: Any, tmp_path: Path) -> None:
    case = GOLDEN["cases"]["flow, shipped"]
    sampler, sigmas = load(nodes, tmp_path, comfy_config("flow, shipped"), case["steps"])
    x = sampler.sampler_function(
        Guider(True),
        NOISE.float()[None],
        sigmas,
        extra_args={"model_options": {}, "seed": 7},
        callback=None,
        disable=False,
    )
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], torch.tensor(case["states"][-1]), rtol=1e-5, atol=1e-5)


def test_a_run_can_be_split_and_refuses_levels_of_another_solver(nodes: Any, tmp_path: Path) -> None:
    name = "flow, shipped"
    sampler, sigmas = load(nodes, tmp_path, comfy_config(name), 4)
    guider, extra = Guider(True), {"extra_args": {"model_options": {}, "seed": 7}}
    case = GOLDEN["cases"][name]
    x = NOISE[None]
    half = sampler.sampler_function(guider, x, sigmas[:3], **extra)
    torch.testing.assert_close(half[0], torch.tensor(case["states"][2], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert len(guider.asked) == 2
    sampler.sampler_function(guider, half, sigmas[2:], **extra)
    assert len(guider.asked) == 4
    with pytest.raises(ValueError, match=r"not the solver's: \[1.0, 0.5, 0.0\].*same Dywspan Solver node"):
        sampler.sampler_function(guider, x, torch.tensor([1.0, 0.5, 0.0]), **extra)
    with pytest.raises(ValueError, match="learned for a flow model, and the model is no flow model"):
        sample(sampler, sigmas, Guider(False))


def test_the_shift_of_a_flow_follows_the_size_of_the_image(nodes: Any, tmp_path: Path) -> None:
    config = json.loads((ROOT / "examples" / "emoji-flow-solvers" / "scheduler_config.json").read_text())
    config |= {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = DyWeightScheduler.from_config(config)
    for height, mu in [(256, 0.5), (4096, 1.15)]:
        scheduler.set_timesteps(3, mu=mu)
        _, sigmas = load(nodes, tmp_path, config, 3, tokens=height)
        assert scheduler.plan is not None
        torch.testing.assert_close(sigmas, scheduler.plan.schedule.levels.float())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nodes.DywspanSolver().load(str(tmp_path / "nowhere"), 3, 256, 256)


class CompVis(torch.nn.Module):
    """What ComfyUI asks of a Stable Diffusion model."""

    parameterization = "eps"
    model = types.SimpleNamespace(diffusion_model=types.SimpleNamespace(dtype=torch.float32))

    def __init__(self, alphas_cumprod: Tensor, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.alphas_cumprod, self.network = alphas_cumprod, network

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        (prompts,) = cond["c_crossattn"]
        return self.network(x, t[0]) * prompts.mean((1, 2)).reshape(-1, 1, 1, 1)


@pytest.fixture
def comfyui() -> Any:
    """ComfyUI's own samplers, of March 2023: the package comfylib. ComfyUI itself is not a package."""
    return pytest.importorskip("comfy.hazard.samplers")


def test_comfyui_samples_with_guidance_as_diffusers_does(
    comfyui: Any, nodes: Any, tmp_path: Path, network: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**golden.STABLE_DIFFUSION, "prediction_type": "epsilon"}
    config |= {"tables": {"4": GOLDEN["cases"]["epsilon, AFS"]["config"]["tables"]["4"]}}
    scheduler = DyWeightScheduler.from_config({"_class_name": "DyWeightScheduler", **config})
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    conds = [[[torch.full((2, 3, 5), v, dtype=torch.float64), {}]] for v in (1.0, 0.6)]  # a prompt and none
    model = CompVis(scheduler.alphas_cumprod.double(), network)
    sampler, _ = load(nodes, tmp_path, config, 4)
    monkeypatch.setattr(comfyui.k_diffusion_sampling, "sample_dywspan", sampler.sampler_function, raising=False)
    monkeypatch.setattr(comfyui.KSampler, "SAMPLERS", ["sample_dywspan"])
    monkeypatch.setattr(comfyui.model_management, "maximum_batch_area", lambda: 0)  # which asks a GPU
    run = comfyui.KSampler(model, 5, torch.device("cpu"), sampler="sample_dywspan")
    run.sigmas = torch.tensor(sampler.solver.levels)
    found = run.sample(noise.clone(), *conds, cfg=3.0)
    scheduler.set_timesteps(4)
    x, told = noise * scheduler.init_noise_sigma, run.model_wrap.sigma_to_t(torch.tensor(sampler.solver.queries[1:]))
    for t, nearest in zip(scheduler.timesteps, told):
        output = network(x, nearest) / (1 + 1e-5)  # as its count of overlapping areas has it
        x = scheduler.step(0.6 * output + 3.0 * (output - 0.6 * output), t, x, return_dict=False)[0]
    assert bool((told != scheduler.timesteps).all())
    torch.testing.assert_close(found, x.float(), rtol=1e-6, atol=1e-6)


def test_on_k_diffusion_the_comfyui_node_is_its_samplers_where_the_table_is_theirs(nodes: Any, tmp_path: Path) -> None:
    """ComfyUI's sampler functions are k-diffusion's; LMS there is Adams-Bashforth on the real grid."""
    sampling = pytest.importorskip("k_diffusion.sampling")
    sigmas = sampling.get_sigmas_karras(6, 0.03, 14.6).double()
    scheduler = DyWeightScheduler.from_config(golden.STABLE_DIFFUSION | {"prediction_type": "epsilon"})
    extra = {"extra_args": {"model_options": {}, "seed": 7}, "disable": True}
    for base, order, reference in [("euler", 1, sampling.sample_euler), ("adams", 3, sampling.sample_lms)]:
        grid = {"sigmas": sigmas.tolist()}
        table = SolverTable.initial(6, order, grid, scheduler.host.prediction, base=base)
        config = {**scheduler.with_tables([table]).config}
        sampler, _ = load(nodes, tmp_path, config, 6)
        found = sampler.sampler_function(Guider(False), sigmas[0] * NOISE[None], sigmas, **extra)
        options = {"order": order} if base == "adams" else {}
        expected = reference(Guider(False), sigmas[0] * NOISE[None], sigmas, **extra, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_on_k_diffusion_a_network_gives_what_it_gives_in_diffusers(
    nodes: Any, tmp_path: Path, network: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapper of an epsilon network: the frame, what the output means, and AFS, as in the scheduler's loop."""
    external = pytest.importorskip("k_diffusion.external")
    config = {**golden.STABLE_DIFFUSION, "prediction_type": "epsilon"}
    config |= {"tables": {"4": GOLDEN["cases"]["epsilon, AFS"]["config"]["tables"]["4"]}}
    scheduler = DyWeightScheduler.from_config({"_class_name": "DyWeightScheduler", **config})
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    scheduler.set_timesteps(4)
    sample_ = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample_ = scheduler.step(network(sample_, t), t, sample_, return_dict=False)[0]
    alphas = scheduler.alphas_cumprod.double()
    denoiser = external.DiscreteEpsDDPMDenoiser(lambda v, t, **_: network(v, t[0]), alphas, quantize=False).double()
    # Between the trained times it interpolates log sigma, and dywspan log alpha.
    monkeypatch.setattr(denoiser, "sigma_to_t", lambda sigma, quantize=None: scheduler.host.prediction.timestep(sigma))
    sampler, _ = load(nodes, tmp_path, config, 4)
    levels = torch.tensor(sampler.solver.levels)
    found = sampler.sampler_function(denoiser, x * levels[0], levels)
    torch.testing.assert_close(found, sample_, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------- vLLM-Omni


def entry_points() -> dict[str, Any]:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm_omni.schedulers"]
    return {name: EntryPoint(name, value, "vllm_omni.schedulers").load() for name, value in declared.items()}


def test_vllm_omni_finds_both_classes() -> None:
    assert entry_points() == {"dyweight": DyWeightScheduler, "spanlift": SpanLiftScheduler}


@pytest.mark.parametrize("keywords", ["solver", "tables", "spanlift"])
def test_vllm_omni_can_use_a_scheduler_as_it_uses_its_own(keywords: str, tmp_path: Path) -> None:
    """Made of the model's own folder and keywords, copied for each request, then driven as a diffusers scheduler."""
    shipped = DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-flow-solvers")
    options = {
        "solver": {"solver": "ipndm"},
        "tables": {"tables": {str(n): table_to_json(table) for n, table in shipped.tables.items()}},
        "spanlift": {},
    }[keywords]
    model, kind = ROOT / "examples" / "emoji-flow", entry_points()["spanlift" if keywords == "spanlift" else "dyweight"]
    if keywords == "spanlift":  # its weights are beside it: it is the scheduler folder of a local model
        model = tmp_path
        shutil.copytree(ROOT / "examples" / "emoji-flow-spanlift", tmp_path / "scheduler")
    scheduler = kind.from_pretrained(str(model), subfolder="scheduler", local_files_only=True, **options)
    assert {"sigmas", "timesteps", "device"} <= inspect.signature(scheduler.set_timesteps).parameters.keys()
    assert scheduler.config["num_train_timesteps"] == 1000 == scheduler.config.num_train_timesteps
    ends = []
    for one in (scheduler, copy.deepcopy(scheduler)):
        one.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), device="cpu", mu=0.4)
        one.set_begin_index(0)
        x = torch.arange(64.0).reshape(1, 4, 16) / 32
        for t in one.timesteps:
            x = one.step(0.5 * x, t, x, return_dict=False, generator=None)[0]
        ends.append(x)
    assert torch.equal(*ends)
    shipped.set_timesteps(4, mu=0.4)
    assert torch.equal(shipped.timesteps, one.timesteps) == (keywords != "solver")


# ---------------------------------------------------------------------------------------- SD.Next


@pytest.mark.parametrize("kind", [DyWeightScheduler, SpanLiftScheduler])
@pytest.mark.parametrize("model", ["emoji-sd", "emoji-flow"])
def test_sd_next_can_use_both_classes(kind: Any, model: str) -> None:
    """It makes a scheduler of the settings that its constructor names, or keeps a copy of the pipeline's own.

    Then it asks ``set_timesteps`` and the class for what FLUX and Stable Diffusion 3 need.
    """
    config = json.loads((ROOT / "examples" / model / "scheduler" / "scheduler_config.json").read_text())
    known = inspect.signature(kind, follow_wrapped=True).parameters.keys()
    assert {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "solver_order",
    } <= known
    assert {"timestep_spacing", "lower_order_final", "base_shift", "max_shift"} <= known
    kept = {k: v for k, v in config.items() if k in known}
    if model == "emoji-flow":
        kept["prediction_type"] = "flow_prediction"  # as it does for samplers of flows
    made, folder = kind(**kept), {DyWeightScheduler: "solvers", SpanLiftScheduler: "spanlift"}[kind]
    assert {k: made.config[k] for k in kept} == kept
    loaded = copy.deepcopy(kind.from_pretrained(ROOT / "examples" / f"{model}-{folder}"))
    x = torch.ones(1, 4, 8, 8) if model == "emoji-sd" else torch.ones(1, 16, 16)
    for scheduler in [loaded, made] if kind is DyWeightScheduler else [loaded]:
        scheduler.name = "a name"  # it writes the sampler's there
        assert {"sigmas", "timesteps"} <= inspect.signature(scheduler.set_timesteps).parameters.keys()
        scheduler.set_timesteps(5)
        assert scheduler.scale_noise(x, scheduler.timesteps[:1], x).shape == x.shape
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, return_dict=False)[0]
        assert bool(x.isfinite().all()) and len(scheduler.timesteps) == 5


# ---------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", ["format.md", "other-hosts.md"])
def test_the_examples_of_the_pages_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "docs/format.schema.json",
        *(f"examples/emoji-sd-{n}/scheduler_config.json" for n in ("solvers", "any-steps")),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "comfyui_dywspan"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    names: dict[str, Any] = {"network": lambda x, t: 0.3 * x + t / 1000, "noise": NOISE.numpy()}
    for block in blocks:
        exec(block, names)
    if page == "format.md":
        assert {*json.loads(Path("build/tables/scheduler_config.json").read_text())["tables"]} >= {"3", "7"}
        return
    scheduler = DyWeightScheduler.from_pretrained("examples/emoji-sd-solvers")
    scheduler.set_timesteps(3)
    x = NOISE * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(names["network"](x, float(t)), t, x, return_dict=False)[0]
    np.testing.assert_allclose(names["latent"], x.numpy(), rtol=1e-6, atol=1e-6)
