"""TimeLift: what each layer is told, moved at each step; found, applied, undone, saved, refused and learned."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny as tp
import torch
from safetensors.torch import load_file, save_file
from test_distill import EMOJI
from test_pipelines import dyweight, modulation, random_table, spanlift, timelift
from torch import Tensor, nn

import dywspan
from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.artifact import provenances
from dywspan.core.time_lift import TimeLift
from dywspan.distill import DistillConfig, SolverTrainer
from dywspan.distill.time_lift import TimeStudent
from dywspan.distill.time_lift import modulation as find_modulation
from dywspan.evaluate.baselines import find_solvers, make_cells
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.conditioning import looking_for_modulation
from dywspan.pipelines.replay import Replay
from dywspan.pipelines.rollout import frozen, load_pipeline, rollout, sample
from dywspan.schedulers.apply import models
from dywspan.schedulers.merge import merge
from dywspan.schedulers.time_lifting import time_lifted

UNET, FLUX, NO_BIAS = "StableDiffusionPipeline", "FluxPipeline", "Flux2Pipeline"
FILE = DyWeightScheduler.time_lifts_name


@pytest.fixture
def fresh() -> Iterator[Any]:
    """Tiny pipelines of one's own: these tests change them."""
    tp.build.cache_clear()
    yield tp.build
    tp.build.cache_clear()


def arguments(tiny: tp.Tiny, **more: Any) -> dict[str, Any]:
    generator = [torch.Generator().manual_seed(1000)]
    return {"num_inference_steps": tiny.steps, "generator": generator, **tiny.inputs([0]), **more}


def sampled(tiny: tp.Tiny, scheduler: Any) -> Tensor:
    with torch.no_grad():
        return rollout(tiny.pipe, scheduler, **arguments(tiny))[0]


def parameter(tiny: tp.Tiny, name: str) -> tuple[nn.Module, str]:
    component, _, path = name.partition(".")
    owner, _, own = path.rpartition(".")
    return tiny.pipe.components[component].get_submodule(owner), own


# --------------------------------------------------------------------------------------------- what the network is told


@pytest.mark.parametrize("name", [UNET, FLUX, NO_BIAS, "PixArtSigmaPipeline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_each_step_a_layer_computes_with_its_parameter_and_that_steps_offset(
    name: str, dtype: torch.dtype, fresh: Any
) -> None:
    tiny = fresh(name)
    scheduler = timelift(name, 0.3)
    tiny.pipe.to(dtype)
    offsets = scheduler.time_lifts[tiny.steps].offsets
    places = {k: parameter(tiny, k) for k in offsets}
    own = {k: getattr(module, p) for k, (module, p) in places.items()}
    assert (name == NO_BIAS) == any(value is None for value in own.values())
    before = {k: None if v is None else v.detach().clone() for k, v in own.items()}
    seen: list[dict[str, Tensor]] = []
    network = tiny.networks[0]
    handle = network.register_forward_pre_hook(
        lambda *_: seen.append({k: getattr(m, p).detach().clone() for k, (m, p) in places.items()})
    )
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in tiny.inputs([0]).items()
    }
    with torch.no_grad():
        rollout(tiny.pipe, scheduler, **arguments(tiny, **inputs))
    handle.remove()
    assert len(seen) == tiny.steps * tiny.branches
    for call, values in enumerate(seen):
        for k, value in values.items():
            start = torch.zeros_like(value) if before[k] is None else before[k]
            expected = (start.float() + offsets[k][call // tiny.branches]).to(dtype)
            assert torch.equal(value, expected), (k, call)
    for k, (module, p) in places.items():
        assert getattr(module, p) is own[k]
        assert own[k] is None or torch.equal(own[k], before[k])


@pytest.mark.parametrize("name", [UNET, NO_BIAS])
def test_an_exception_leaves_nothing_behind(name: str, fresh: Any) -> None:
    tiny, scheduler = fresh(name), timelift(name, 0.3)
    state = {k: v.clone() for k, v in tiny.networks[0].state_dict().items()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    layers = [m for m in tiny.networks[0].modules() if isinstance(m, nn.Linear)]
    handle = layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), dywspan.apply(tiny.pipe, scheduler):
        tiny.pipe(**arguments(tiny))
    handle.remove()
    after = tiny.networks[0].state_dict()
    assert after.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in after.items())
    with pytest.raises(ValueError, match="nothing has told this scheduler which network"):
        scheduler.set_timesteps(tiny.steps)


def test_a_cast_that_autocast_remembers_is_made_anew() -> None:
    """Its memory is of parameters that want a gradient, as those of a loaded pipeline do."""
    tiny, scheduler = tp.build(UNET), timelift(UNET, 0.3)
    tiny.networks[0].requires_grad_(True)
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            plain, found = (
                sampled(tiny, dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)),
                sampled(tiny, scheduler),
            )
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected = sampled(tiny, scheduler)
    finally:
        tiny.networks[0].requires_grad_(False)
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("how", ["module", "in place", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_compiled_network_keeps_its_graph(how: str, fresh: Any) -> None:
    tiny, scheduler = fresh(FLUX), timelift(FLUX, 0.3)
    expected = sampled(tiny, scheduler)
    network = tiny.pipe.transformer
    if how == "module":
        tiny.pipe.transformer = torch.compile(network, backend="aot_eager")
    elif how == "in place":
        network.compile(backend="aot_eager")
    else:
        network.compile_repeated_blocks(backend="aot_eager")
    sampled(tiny, dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(sampled(tiny, scheduler), expected, atol=1e-5)


def test_lora_around_a_modulated_layer_changes_no_name(fresh: Any) -> None:
    peft = pytest.importorskip("peft")
    tiny, scheduler = fresh(UNET), timelift(UNET, 0.3)
    expected = sampled(tiny, scheduler)
    tiny.pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["time_emb_proj", "to_q"]))
    assert torch.allclose(sampled(tiny, scheduler), expected, atol=1e-6), "an adapter starts as nothing"
    with looking_for_modulation(tiny.pipe) as found:
        sampled(tiny, DyWeightScheduler.from_config(tiny.pipe.scheduler))
    assert found.keys() == scheduler.time_lifts[tiny.steps].offsets.keys()


def test_model_offload_moves_what_was_changed(fresh: Any) -> None:
    tiny, scheduler = fresh(FLUX), timelift(FLUX, 0.3)
    expected = sampled(tiny, scheduler)
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(sampled(tiny, scheduler), expected)


def test_late_starts_take_the_rows_of_their_steps(fresh: Any) -> None:
    """Announced by the pipeline, or by ``bind``; refused where nobody does."""
    for name, announces in (("FluxImg2ImgPipeline", True), ("WanVideoToVideoPipeline", False)):
        tiny, scheduler = fresh(name), timelift(name, 0.0)
        lift = scheduler.time_lifts[tiny.steps]
        begin = tiny.steps - len(tiny.seen(torch.arange(tiny.steps)))
        assert begin > 0
        first = next(iter(lift.offsets))
        moved = {k: v.clone() for k, v in lift.offsets.items()}
        moved[first][:begin] = 0.5  # of steps that never come
        skipped = scheduler.with_time_lifts({tiny.steps: TimeLift(moved)})
        outputs = []
        for solver in (scheduler, skipped):
            with dywspan.apply(tiny.pipe, solver):
                outputs.append(tp.run(tiny, solver, [0]).output)
        assert torch.equal(*outputs), name
        if not announces:
            with pytest.raises(ValueError, match="needs set_begin_index"), time_lifted(tiny.pipe, scheduler):
                tp.run(tiny, scheduler, [0])


def test_a_network_in_use_in_another_thread_is_refused(fresh: Any) -> None:
    tiny, scheduler = fresh(UNET), timelift(UNET, 0.3)
    errors: list[BaseException] = []
    other = diffusers.StableDiffusionPipeline(**tiny.pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def elsewhere() -> None:
        try:
            other(**arguments(tiny))
        except BaseException as error:
            errors.append(error)

    def meanwhile(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i == 0:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return kwargs

    with dywspan.apply(tiny.pipe, scheduler):
        tiny.pipe(**arguments(tiny, callback_on_step_end=meanwhile))
    assert "in another thread" in str(errors[0])


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", [UNET, NO_BIAS])
def test_gradients_are_the_slopes_of_what_is_sampled(name: str) -> None:
    tiny, scheduler = tp.build(name), timelift(name, 0.1)
    given = scheduler.time_lifts[tiny.steps].offsets
    leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
    scheduler.time_lifts = {tiny.steps: TimeLift(leaves)}
    with torch.enable_grad():
        output, _ = rollout(tiny.pipe, scheduler, **arguments(tiny))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((output * direction).sum(), [*leaves.values()])
    assert torch.allclose(output.detach(), sampled(tiny, timelift(name, 0.1)), atol=1e-5)
    draw = torch.Generator().manual_seed(1)
    along = {k: torch.randn(v.shape, generator=draw) for k, v in given.items()}
    slope = sum(float((g * along[k]).sum()) for k, g in zip(leaves, found))

    def at(size: float) -> float:
        moved = TimeLift({k: v + size * along[k] for k, v in given.items()})
        return float((sampled(tiny, scheduler.with_time_lifts({tiny.steps: moved})) * direction).sum())

    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_that_is_computed_again_is_told_the_same(by_blocks: bool, compiled: bool, fresh: Any) -> None:
    tiny, scheduler = fresh(FLUX), timelift(FLUX, 0.1)
    leaves = {k: v.clone().requires_grad_() for k, v in scheduler.time_lifts[tiny.steps].offsets.items()}
    scheduler.time_lifts = {tiny.steps: TimeLift(leaves)}

    def slopes(**how: Any) -> tuple[Tensor, ...]:
        with frozen(tiny.pipe, **how), torch.enable_grad():
            output, _ = rollout(tiny.pipe, scheduler, **arguments(tiny))
            return torch.autograd.grad(output.square().sum(), [*leaves.values()])

    expected = slopes()
    assert all(bool(v.any()) for v in expected)
    if compiled:
        tiny.pipe.transformer.compile(backend="eager")
    for one, other in zip(slopes(recompute=True, by_blocks=by_blocks), expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_replay_sees_that_a_network_was_told_something_else() -> None:
    tiny, scheduler = tp.build(UNET), timelift(UNET, 0.1)
    replay = Replay(tiny.pipe)
    with replay.installed():
        with replay.recording() as tape:
            first = sampled(tiny, scheduler)
        with replay.playing(tape):
            assert torch.equal(sampled(tiny, scheduler), first) and replay.position == len(tape) == tiny.steps
        lift = scheduler.time_lifts[tiny.steps]
        later = {k: torch.cat([v[:-1], v[-1:] + 0.1]) for k, v in lift.offsets.items()}
        moved = scheduler.with_time_lifts({tiny.steps: TimeLift(later)})
        with replay.playing(tape):
            found = sampled(tiny, moved)
            assert torch.equal(found, sampled(tiny, moved)) and not torch.equal(found, first)


# -------------------------------------------------------------------------------------------------- files, and refusals


def test_a_solver_with_a_time_lift_is_saved_loaded_applied_and_undone(tmp_path: Path, fresh: Any) -> None:
    for name, lifted in ((UNET, False), (FLUX, True)):
        tiny = fresh(name)
        offsets = {k: v.half() for k, v in timelift(name, 0.3).time_lifts[tiny.steps].offsets.items()}
        base = spanlift(tiny) if lifted else dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)
        scheduler = base.with_time_lifts({tiny.steps: TimeLift(offsets, {"base_model": "org/model"})})
        expected = sampled(tiny, scheduler)
        scheduler.save_pretrained(tmp_path / name)
        assert {f.name for f in (tmp_path / name).iterdir()} >= {FILE, "scheduler_config.json"}
        loaded = dywspan.load(tmp_path / name)
        assert type(loaded) is type(scheduler) and "org/model" in models(loaded)
        assert all(v.dtype == torch.float16 for v in load_file(tmp_path / name / FILE).values())
        for solver in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded.with_tables([])):
            assert torch.equal(sampled(tiny, solver), expected)
        kind, own = type(tiny.pipe), tiny.pipe.scheduler
        with dywspan.apply(tiny.pipe, tmp_path / name):
            tiny.pipe(**arguments(tiny))
        assert type(tiny.pipe) is kind and tiny.pipe.scheduler is own
        plain = type(loaded).from_config(loaded.config, time_lifts=None)
        if lifted:
            plain.operators = loaded.operators
        assert torch.equal(sampled(tiny, plain), sampled(tiny, base))


def _remove(folder: Path) -> None:
    (folder / FILE).unlink()


def _cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-7])


def _another(folder: Path) -> None:
    save_file({k: v + 1 for k, v in load_file(folder / FILE).items()}, folder / FILE)


def _changed(change: Any) -> Any:
    """Offsets that are changed, and a configuration that says nothing of it."""

    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / FILE)), folder / FILE)
        file = folder / "scheduler_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "timelift_sha256": None}), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_remove, OSError, "is not there: this solver is a configuration and this file"),
        (_cut, ValueError, "timelift_sha256 differs"),
        (_another, ValueError, "timelift_sha256 differs"),
        (
            _changed(lambda f: {k.replace("3.", "4.", 1): v for k, v in f.items()}),
            ValueError,
            "must come from the same save",
        ),
        (_changed(lambda f: {k: v * float("nan") for k, v in f.items()}), ValueError, "not finite"),
        (_changed(lambda f: {k: v.long() for k, v in f.items()}), ValueError, "offsets are floating-point numbers"),
        (
            _changed(lambda f: {k: v[: 1 + i % 2] for i, (k, v) in enumerate(f.items())}),
            ValueError,
            r"\[1, 2\] evaluations",
        ),
    ],
)
def test_damaged_files_are_named(damage: Any, kind: Any, message: str, tmp_path: Path) -> None:
    timelift(UNET, 0.3).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        dywspan.load(tmp_path)


def test_what_it_cannot_modulate_is_refused_before_anything_is_sampled(fresh: Any) -> None:
    tiny, scheduler = fresh(UNET), timelift(UNET, 0.3)
    n = tiny.steps
    offsets = scheduler.time_lifts[n].offsets
    name, offset = next(iter(offsets.items()))

    def with_(found: dict[str, Tensor]) -> Any:
        return scheduler.with_time_lifts({n: TimeLift(found)})

    refused = {
        "it has no unet.nowhere.bias": with_({"unet.nowhere.bias": offset}),
        "it has no transformer": with_({"transformer.x.bias": offset}),
        "has shape": with_({name: torch.cat([offset, offset], 1)}),
    }
    for message, solver in refused.items():
        with pytest.raises(ValueError, match=message):
            dywspan.apply(tiny.pipe, solver)
    short = with_({k: v[:-1] for k, v in offsets.items()})
    with pytest.raises(ValueError, match=f"has {n - 1} rows; its solver takes {n}"):
        sampled(tiny, short)
    with pytest.raises(ValueError, match="is not part of a configuration"):
        sampled(tiny, DyWeightScheduler.from_config(with_({}).config, time_lifts={str(n): {}}))
    with pytest.raises(ValueError, match="never loaded, so there is only half"):
        DyWeightScheduler.from_config(scheduler.config, time_lifts={str(n): {}}).save_pretrained("nowhere")
    assert not Path("nowhere").exists()
    scheduler.set_timesteps = None  # what is refused has not come so far
    tiny.pipe.unet.to("meta")
    with pytest.raises(ValueError, match="not in memory between calls"):
        dywspan.apply(tiny.pipe, scheduler)


def test_group_offload_and_storage_in_8_bits_are_refused(fresh: Any) -> None:
    tiny, scheduler = fresh(FLUX), timelift(FLUX, 0.3)
    cpu = torch.device("cpu")
    tiny.pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match="offloaded by groups"):
        dywspan.apply(tiny.pipe, scheduler)
    tiny = fresh.__wrapped__(FLUX) if hasattr(fresh, "__wrapped__") else tp.made(tp.PIPELINES[FLUX])
    tiny.pipe.transformer.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="in which offsets would be lost"):
        dywspan.apply(tiny.pipe, scheduler)


def test_weights_stay_out_of_a_pipelines_folder_on_the_hub() -> None:
    with pytest.raises(ValueError, match="keep diffusers from downloading"):
        timelift(UNET, 0.3).push_to_hub("org/model", subfolder="scheduler")


def test_what_was_learned_on_another_solver_is_left_out() -> None:
    tiny, scheduler = tp.build(UNET), timelift(UNET, 0.3)
    n, table = tiny.steps, scheduler.tables[tiny.steps]
    assert scheduler.with_tables([table]).time_lifts.keys() == {n}
    assert scheduler.with_tables([random_table(n + 1, tiny.flow)]).time_lifts.keys() == {n}
    other = random_table(n, tiny.flow)
    other.weights.mul_(1.01)
    changed = scheduler.with_tables([other])
    assert not changed.time_lifts and scheduler.time_lifts.keys() == {n}
    merged, told = merge({"a": scheduler, "b": DyWeightScheduler.from_config(scheduler.config, time_lifts=None)})
    assert merged.time_lifts.keys() == {n} and not told
    merged, told = merge({"a": scheduler, "b": changed})
    assert not merged.time_lifts and any("TimeLift for 3 steps: left out" in line for line in told)
    lifted = spanlift(tiny)
    own = lifted.with_time_lifts(scheduler.time_lifts)
    assert own.with_lifts(own).time_lifts.keys() == {n}
    assert not own.with_lifts(spanlift(tiny)).time_lifts


# ------------------------------------------------------------------------------------------------------------- learning

PROMPTS = ["a cat", "a red apple", "a house", "a tree", "the sun", "a boat", "a fish", "a star"]
SMALL: dict[str, Any] = {
    "pairs": 8,
    "held_out": 4,
    "teacher_steps": 12,
    "batch_size": 8,
    "pictures": 0,
    "prompts": PROMPTS * 2,
    "steps": [2],
    "solver": "timelift",
    "optimizer": "adam",
    "updates": 8,
    "evaluate_every": 4,
    "recompute": False,
    "base": "euler",
    "call": {"guidance_scale": 1.0},
    "lr": 0.002,
}


@pytest.fixture(scope="module")
def emoji() -> Any:
    return load_pipeline(str(EMOJI))


@pytest.fixture(scope="module")
def tables(emoji: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the learning of tables starts, as a solver."""
    own = DyWeightScheduler.from_config(emoji.scheduler)
    made = [SolverTable.initial(n, 2, default_grid(own), own.host.prediction, base="ipndm") for n in (2, 3)]
    own.with_tables(made).save_pretrained(folder := tmp_path_factory.mktemp("tables"))
    return str(folder)


def train(pipe: Any, output: Path, **changes: Any) -> Any:
    return SolverTrainer(pipe, DistillConfig(output=str(output), **{**SMALL, **changes})).train()


@pytest.mark.slow
def test_a_time_lift_is_learned_and_found_again(emoji: Any, tables: str, tmp_path: Path) -> None:
    kind, own = type(emoji), emoji.scheduler
    state = {k: v.clone() for k, v in emoji.unet.state_dict().items()}
    learned = train(emoji, tmp_path / "a", steps=[2, 3], base=tables, held_out=8)
    assert (type(emoji), emoji.scheduler) == (kind, own)
    assert all(torch.equal(v, state[k]) for k, v in emoji.unet.state_dict().items())
    assert learned.time_lifts.keys() == learned.tables.keys() == {2, 3}
    for n, lift in learned.time_lifts.items():
        error = lift.provenance["held_out_error"]
        assert error["after"] < 0.99 * error["before"], n
        assert lift.evaluations == n and len(lift.offsets) == 11 + 2 * 22  # time projections, norms beside them
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "dywspan.apply(pipe, " in card and "For 2, 3 steps it has a TimeLift" in card
    again = train(emoji, tmp_path / "a", steps=[2, 3], base=tables, held_out=8)
    for n, lift in again.time_lifts.items():
        assert all(torch.equal(v, learned.time_lifts[n].offsets[k]) for k, v in lift.offsets.items())
    with dywspan.apply(emoji, tmp_path / "a"):
        assert len(emoji("a cat", num_inference_steps=3, output_type="np").images) == 1
    more = train(emoji, tmp_path / "b", base=str(tmp_path / "a"), updates=2, held_out=8)
    error = more.time_lifts[2].provenance["held_out_error"]
    assert error["before"] == pytest.approx(learned.time_lifts[2].provenance["held_out_error"]["after"], rel=1e-3)
    assert more.time_lifts.keys() == {2}
    with pytest.raises(ValueError, match="holds solvers on bases that differ in"):
        train(emoji, tmp_path / "a", base="euler")


def test_a_table_is_learned_together_with_its_time_lift(emoji: Any, tables: str, tmp_path: Path) -> None:
    learned = train(emoji, tmp_path, base=tables, learn_base=True)
    assert learned.time_lifts[2].provenance["learning"]["learn_base"]
    base = dywspan.load(tables)
    assert not torch.equal(learned.tables[2].weights, base.tables[2].weights)
    assert torch.equal(learned.tables[3].weights, base.tables[3].weights)
    assert dywspan.load(tmp_path).time_lifts.keys() == {2}
    with pytest.raises(ValueError, match=r"has no table for \[1\] steps, only for \[2, 3\]"):
        train(emoji, tmp_path / "none", base=tables, learn_base=True, steps=[1, 2])


@pytest.mark.slow
def test_a_time_lift_on_spanlift_and_on_a_classical_solver(emoji: Any, tmp_path: Path) -> None:
    lifted = train(emoji, tmp_path / "lifted", base=str(EMOJI.parent / "emoji-sd-spanlift"), steps=[3], updates=2)
    assert isinstance(lifted, SpanLiftScheduler) and lifted.time_lifts.keys() == {3} and 3 in lifted.lifts
    loaded = dywspan.load(tmp_path / "lifted")
    assert isinstance(loaded, SpanLiftScheduler) and loaded.lifts.keys() == lifted.lifts.keys()
    plain = train(emoji, tmp_path / "plain", steps=[1])
    error = plain.time_lifts[1].provenance["held_out_error"]
    assert error["after"] < 0.99 * error["before"]
    assert plain.time_lifts[1].evaluations == 1 and not plain.tables


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(emoji: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(emoji, tmp_path / "whole", checkpoint_every=2)
    apply, left = TimeStudent.apply, iter(range(7))

    def killed(self: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        apply(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TimeStudent, "apply", killed)
        train(emoji, tmp_path / "killed", checkpoint_every=2, cache=str(tmp_path / "whole" / "cache"))
    assert any((tmp_path / "killed").rglob("update-*.safetensors"))
    resumed = train(emoji, tmp_path / "killed", checkpoint_every=2, cache=str(tmp_path / "whole" / "cache"))
    for k, v in resumed.time_lifts[2].offsets.items():
        assert torch.equal(v, whole.time_lifts[2].offsets[k])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "least_squares"}, "timelift is learned by gradients"),
        ({"continuous": True}, "timelift is learned by gradients"),
        ({"path_substeps": 2}, "path_substeps supervises tables: leave it at 0 for timelift"),
        ({"solver": "dyweight", "learn_base": True}, "learn_base is for timelift"),
        ({"base": "nowhere"}, "nowhere"),
        ({"learn_base": True}, "base='euler' is a classical solver, which has no table"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, emoji: Any, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(emoji, tmp_path, **changes)


@pytest.mark.slow
def test_spanlift_on_a_time_lift_keeps_it(emoji: Any, tmp_path: Path) -> None:
    base, name = dywspan.load(EMOJI.parent / "emoji-sd-timelift"), str(EMOJI.parent / "emoji-sd-timelift")
    options: dict[str, Any] = {"solver": "spanlift", "steps": [2], "loss": "rmse", "lr": 1e-3, "updates": 6}
    learned = train(emoji, tmp_path / "out", base=name, **options)
    assert isinstance(learned, SpanLiftScheduler) and learned.lifts.keys() == learned.time_lifts.keys() == {2}
    for key, offset in base.time_lifts[2].offsets.items():
        assert torch.equal(learned.time_lifts[2].offsets[key], offset), "the network is told what it was"
    error = learned.lifts[2].provenance["held_out_error"]
    told = train(emoji, tmp_path / "told", base=name, loss="rmse", updates=1).time_lifts[2].provenance
    assert error["before"] == pytest.approx(told["held_out_error"]["before"], rel=1e-3), (
        "it starts where TimeLift ended"
    )
    assert provenances(learned)[2] == learned.lifts[2].provenance, "which was learned last"
    again = train(emoji, tmp_path / "more", base=str(tmp_path / "out"), **options)
    assert again.lifts.keys() == again.time_lifts.keys() == {2}
    end = again.lifts[2].provenance["held_out_error"]["before"]
    assert end == pytest.approx(error["after"], rel=1e-3), "and goes on from both"
    with dywspan.apply(emoji, tmp_path / "out"):
        assert len(emoji("a cat", num_inference_steps=2, output_type="np").images) == 1


def test_a_continuous_lift_on_a_time_lift_is_refused(emoji: Any, tmp_path: Path) -> None:
    base = dywspan.load(EMOJI.parent / "emoji-sd-any-steps")
    offset = {"unet.mid_block.resnets.0.time_emb_proj.bias": torch.zeros(2, 64)}
    base.with_time_lifts({2: TimeLift(offset)}).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"has a TimeLift for \[2\] steps, and a continuous lift is for every number"):
        train(emoji, tmp_path / "out", solver="spanlift", continuous=True, base=str(tmp_path / "base"))


def test_a_network_that_is_told_the_time_nowhere_is_refused(tmp_path: Path) -> None:
    """The time as a channel of the sample, as published score networks take it."""
    from test_solver_trainer import own_pipeline

    config = {**SMALL, "prompts": None, "call": {}, "base": "euler", "output": str(tmp_path)}
    with pytest.raises(ValueError, match="its unet has no layer that is told the time and nothing else"):
        SolverTrainer(own_pipeline(), DistillConfig(**config))
    pipe = tp.made(tp.PIPELINES[UNET]).pipe
    pipe.enable_model_cpu_offload(device="cpu")
    base, inputs = DyWeightScheduler.from_config(pipe.scheduler), tp.build(UNET).inputs([0])
    with pytest.raises(ValueError, match="is offloaded: learn without"):
        find_modulation(pipe, base, 2, [{}], {**inputs, "output_type": "latent"})


def test_modulation_is_that_of_time_and_of_nothing_else() -> None:
    """A UNet's blocks, FLUX's AdaLN without attention's text projections, and PixArt's tables."""
    unet = {name.rpartition(".")[0].rpartition(".")[2] for name in modulation(UNET)}
    assert unet == {"time_emb_proj", "norm1", "norm2"}
    assert {name.split(".")[-2] for name in modulation(FLUX)} == {"linear"}
    assert all("attn" not in name and "embed" not in name for name in modulation(FLUX))
    assert sum("scale_shift_table" in name for name in modulation("PixArtSigmaPipeline")) == 2


def test_it_is_measured_beside_the_solver_that_it_lifts(emoji: Any, tmp_path: Path) -> None:
    base = EMOJI.parent / "emoji-sd-solvers"
    layer = emoji.unet.mid_block.resnets[0].time_emb_proj
    offset = {"unet.mid_block.resnets.0.time_emb_proj.bias": torch.ones(2, layer.out_features)}
    dywspan.load(base).with_time_lifts({2: TimeLift(offset)}).save_pretrained(tmp_path)
    plain, lifted = find_solvers([str(base), str(tmp_path)])
    assert (plain.name, lifted.name) == ("DyWeight (learned)", "DyWeight + TimeLift (learned)")
    own, call = {"prompt": "a cat"}, {"guidance_scale": 1.0}
    cells, missing = make_cells(emoji, lifted, [2, 3], own, call)
    assert [cell.nfe for cell in cells] == [2] and "learned for [2] steps" in missing[0]
    ends = [
        sample(emoji, c.scheduler, 2, [own], [0], call)[0]
        for c in (*cells, *make_cells(emoji, plain, [2], own, call)[0])
    ]
    assert not torch.equal(*ends)
