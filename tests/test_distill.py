"""Rollouts through real pipelines, teacher pairs, and learning a table."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from tiny import build

from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.core.prediction import Flow
from dywspan.distill.config import LearningConfig
from dywspan.distill.gradients import learning_rate
from dywspan.distill.lift import LiftStudent
from dywspan.distill.losses import make_loss
from dywspan.distill.progress import endpoint_error
from dywspan.distill.student import TableStudent
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.features import dinov2, encoder, feature_distance
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.rollout import frozen, generators, load_pipeline, rollout
from dywspan.pipelines.teacher import Teacher

EMOJI = Path(__file__).parent.parent / "examples" / "emoji-sd"
CALL = {"guidance_scale": 4.0}
PROMPTS = ["red heart, noto", "grinning face, twemoji", "soccer ball, noto", "hash key, noto"]
INPUTS = [{"prompt": prompt} for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(str(EMOJI))


def _scheduler(pipe: Any, table: SolverTable) -> DyWeightScheduler:
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    scheduler.tables = {table.num_inference_steps: table}
    return scheduler


def _table(pipe: Any, n: int = 2) -> SolverTable:
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    return SolverTable.initial(n, 2, default_grid(scheduler), scheduler.host.prediction, base="euler")


def _student(pipe: Any, bounded: float = 0.0) -> TableStudent:
    return TableStudent(DyWeightScheduler.from_config(pipe.scheduler.config), _table(pipe), bounded)


def test_rollout_is_the_pipelines_own_sampling(pipe: Any) -> None:
    """The last sample before decoding is what output_type="latent" returns, for ours and for diffusers' schedulers."""
    config = pipe.scheduler.config
    for scheduler in (
        _scheduler(pipe, _table(pipe, 3)),
        DPMSolverMultistepScheduler.from_config(config),
        HeunDiscreteScheduler.from_config(config),  # two evaluations a step
    ):
        call = {"prompt": PROMPTS[:2], "num_inference_steps": 3, **CALL}
        with torch.no_grad():
            early, nothing = rollout(pipe, scheduler, generator=generators([5, 6]), **call)
            late, output = rollout(pipe, scheduler, decode=True, generator=generators([5, 6]), **call)
        own, pipe.scheduler = pipe.scheduler, scheduler
        latents = pipe(generator=generators([5, 6]), output_type="latent", **call).images
        pipe.scheduler = own
        assert nothing is None and len(output.images) == 2
        assert torch.equal(early, late) and torch.equal(early, latents)
        assert "step" not in vars(scheduler), "the watcher must be gone"


def test_rollout_restores_the_pipeline_after_an_error(pipe: Any) -> None:
    own, scheduler = pipe.scheduler, _scheduler(pipe, _table(pipe))
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        rollout(pipe, scheduler, prompt=PROMPTS[0], num_inference_steps=4)
    assert pipe.scheduler is own and "step" not in vars(scheduler)


def test_a_rollout_that_does_not_end_at_the_last_step_is_an_error() -> None:
    tiny = build("StableDiffusionImg2ImgPipeline")
    scheduler = DDIMScheduler.from_config(tiny.pipe.scheduler.config)
    with pytest.raises(RuntimeError, match="without strength"):
        rollout(tiny.pipe, scheduler, num_inference_steps=3, **tiny.inputs((0,)))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_through_the_pipeline_are_those_of_central_differences(recompute: bool) -> None:
    # Time embeddings oscillate once per unit of time: small differences, and float64 to see them.
    pipe = load_pipeline(str(EMOJI))
    with torch.no_grad():  # not in float64: older CLIPs cannot
        prompt, negative = (e.double() for e in pipe.encode_prompt(PROMPTS[:2], "cpu", 1, True))
    pipe.to(torch.float64)
    table = _table(pipe)
    call = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "num_inference_steps": 2, **CALL}

    def loss(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scheduler = _scheduler(pipe, replace(table, weights=weights, time_scale=scale))
        x, _ = rollout(pipe, scheduler, generator=generators([1, 2]), **call)
        return x.square().mean()

    weights, scale = table.weights.clone().requires_grad_(), table.time_scale.clone().requires_grad_()
    with frozen(pipe, recompute):
        loss(weights, scale).backward()
    assert all(p.requires_grad for p in pipe.unet.parameters()), "frozen() must give the weights back as they were"
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert weights.grad is not None and scale.grad is not None
    eps = 5e-6
    for parameter, index in ((weights, (0, 0)), (weights, (1, 0)), (weights, (1, 1)), (scale, (1,))):
        values = []
        for sign in (1, -1):
            moved = {id(p): p.detach().clone() for p in (weights, scale)}
            moved[id(parameter)][index] += sign * eps
            with torch.no_grad():
                values.append(float(loss(moved[id(weights)], moved[id(scale)])))
        expected = (values[0] - values[1]) / (2 * eps)
        assert float(parameter.grad[index]) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_recomputing_changes_memory_not_gradients(pipe: Any) -> None:
    grads = []
    for recompute in (False, True):
        learned = _student(pipe)
        with frozen(pipe, recompute):
            scheduler = _scheduler(pipe, learned.table())
            x, _ = rollout(pipe, scheduler, prompt=PROMPTS[0], generator=generators([0]), num_inference_steps=2, **CALL)
            x.square().sum().backward()
        grads.append([p.grad for p in learned.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-5)


def _pairs(pipe: Any, cache: Path | None, seeds: range = range(2), steps: int = 4, **call: Any) -> Pairs:
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), steps)
    return make_pairs(pipe, teacher, INPUTS[: len(seeds)], seeds, call=CALL | call, cache=cache, batch_size=1)


def test_pairs_come_from_the_cache_only_when_all_that_matters_is_the_same(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _pairs(pipe, tmp_path).endpoints
    computed: list[Any] = []
    own = Teacher.endpoints

    def counted(self: Teacher, pipe: Any, inputs: Any, seeds: Any, call: Any) -> torch.Tensor:
        computed.extend(seeds)
        return own(self, pipe, inputs, seeds, call)

    monkeypatch.setattr(Teacher, "endpoints", counted)
    assert torch.equal(_pairs(pipe, tmp_path).endpoints, first) and computed == []
    _pairs(pipe, tmp_path, seeds=range(3))
    assert computed == [2], "a longer list reuses what a shorter one made"
    for change in ({"seeds": range(1, 3)}, {"steps": 5}, {"guidance_scale": 2.0}):
        computed.clear()
        assert not torch.equal(_pairs(pipe, tmp_path, **change).endpoints, first) and computed
    with torch.no_grad():
        computed.clear()
        weight = pipe.unet.conv_in.weight
        weight += 1e-3
        _pairs(pipe, tmp_path)
        weight -= 1e-3
    assert computed == [0, 1], "other weights, other endpoints, whatever the name"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_of_the_cache_is_made_again_and_said_so(
    pipe: Any, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _pairs(pipe, tmp_path).endpoints
    file = min(tmp_path.glob("*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes({"truncated": data[:-100], "flipped": data, "empty": b""}[damage])
    assert torch.equal(_pairs(pipe, tmp_path).endpoints, first)
    assert f"{file} is damaged: it is made again" in capsys.readouterr().out


def test_noise_does_not_depend_on_the_batch(pipe: Any) -> None:
    one_by_one = _pairs(pipe, None)
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 4)
    together = make_pairs(pipe, teacher, INPUTS[:2], range(2), call=CALL, batch_size=2)
    torch.testing.assert_close(one_by_one.endpoints, together.endpoints, rtol=1e-4, atol=1e-4)


def test_distilling_lowers_the_held_out_error_and_the_artefact_keeps_it(pipe: Any, tmp_path: Path) -> None:
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 12)
    train = make_pairs(pipe, teacher, INPUTS, range(4), call=CALL)
    held_out = make_pairs(pipe, teacher, INPUTS, range(10, 14), call=CALL)
    config = LearningConfig(updates=12, batch_size=4, lr=3e-2, init="euler", evaluate_every=4, recompute=False)
    table = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)).tables[2]
    error = table.provenance["held_out_error"]
    assert error["after"] < 0.97 * error["before"]
    DyWeightScheduler.from_config(pipe.scheduler.config).with_tables([table]).save_pretrained(tmp_path)
    loaded = DyWeightScheduler.from_pretrained(tmp_path)
    assert endpoint_error(pipe, loaded, 2, held_out, CALL) == pytest.approx(error["after"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_and_says_where(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Pairs(INPUTS[:2], range(7, 9), torch.full((2, 4, 16, 16), torch.nan))
    teacher, config = Teacher(pipe.scheduler, 50), LearningConfig(updates=1, batch_size=2, init="euler")
    with pytest.raises(FloatingPointError, match=r"update 0 of the 2-step solver.*teacher's endpoints.*seeds \[7, 8\]"):
        distill(Task(pipe, teacher, [Term(2, CALL, broken, broken)], config))
    whole = Pairs(INPUTS[:2], range(7, 9), torch.zeros(2, 4, 16, 16))
    forward, calls = pipe.unet.forward, 0

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(*args, **kwargs)
        return (output[0] / 0,) if calls % 2 == 0 else output

    monkeypatch.setattr(pipe.unet, "forward", overflowing)
    level = float(_table(pipe).schedule(DyWeightScheduler.from_config(pipe.scheduler.config).host.prediction).levels[1])
    with pytest.raises(FloatingPointError, match=rf"from sampling step 1 \(sigma {level:.4g}\) on.*Lower lr"):
        distill(Task(pipe, teacher, [Term(2, CALL, whole, whole)], replace(config, recompute=False)))


def test_bounded_time_scale_starts_at_the_table_and_stays_between_a_half_and_three_halves(pipe: Any) -> None:
    learned = _student(pipe, bounded=0.5)
    torch.testing.assert_close(learned.table().time_scale, torch.ones(2, dtype=torch.float64))
    for extreme, bound in ((50.0, 1.5), (-50.0, 0.5)):
        learned.phi.data.fill_(extreme)
        torch.testing.assert_close(learned.table().time_scale, torch.full((2,), bound, dtype=torch.float64))


def test_a_bounded_student_moves_in_the_time_scale_itself_and_stops_at_its_bounds(pipe: Any) -> None:
    learned = _student(pipe, bounded=0.1)
    learned.move(torch.tensor([1.1, 1.4, -0.4, 0.97, 3.0], dtype=torch.float64))
    expected = torch.tensor([1.1, 1.4, -0.4, 0.97, 1.1], dtype=torch.float64)
    torch.testing.assert_close(learned.vector(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(learned.table().time_scale, learned.vector()[3:], rtol=0, atol=0)
    at = learned.vector()
    learned.move(at)
    torch.testing.assert_close(learned.vector(), at, rtol=0, atol=1e-12)
    assert math.isfinite(float(learned.phi.sum()))  # so that gradients can go on from here


def test_entries_that_do_not_exist_are_never_learned(pipe: Any) -> None:
    learned = _student(pipe)
    learned.table().weights.sum().backward()
    assert learned.weights.grad is not None and float(learned.weights.grad[0, 1]) == 0


def test_learning_rate_is_the_papers() -> None:
    rates = [learning_rate(i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1.0 and rates[99] == pytest.approx(0.01, abs=1e-3)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_default_grid_follows_the_kind_of_network(pipe: Any) -> None:
    def grid(name: str, **change: Any) -> dict[str, Any]:
        return default_grid(DyWeightScheduler.from_config({**build(name).pipe.scheduler.config, **change}))

    assert grid("FluxPipeline", use_dynamic_shifting=True) == {"name": "flow"}
    assert grid("StableDiffusion3Pipeline", shift=3.0) == {"name": "flow", "shift": 3.0}
    sd = default_grid(DyWeightScheduler.from_config(pipe.scheduler.config))
    assert sd["name"] == "discrete" and sd["sigma_max"] == pytest.approx(14.6146, abs=1e-4)
    assert not isinstance(DyWeightScheduler.from_config(pipe.scheduler.config).host.prediction, Flow)


def test_spanlift_lowers_the_error_of_its_frozen_base_and_the_artefact_keeps_it(pipe: Any, tmp_path: Path) -> None:
    call = {"guidance_scale": 1.0}
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 12)
    train = make_pairs(pipe, teacher, INPUTS, range(4), call=call)
    held_out = train  # four pairs teach an operator nothing about others
    base = DyWeightScheduler.from_config(pipe.scheduler.config).with_tables([_table(pipe, 2), _table(pipe, 3)])
    config = LearningConfig(updates=16, batch_size=4, lr=3e-3, evaluate_every=4, recompute=False)
    terms = [Term(n, call, train, held_out) for n in (2, 3)]
    lifted = distill(Task(pipe, teacher, terms, config, solver="spanlift", base=base))
    lifted.save_pretrained(tmp_path)
    loaded = SpanLiftScheduler.from_pretrained(tmp_path)
    for n in (2, 3):
        error = loaded.lifts[n].provenance["held_out_error"]
        assert error["before"] == pytest.approx(endpoint_error(pipe, base, n, held_out, call), rel=1e-5)
        assert error["after"] < 0.97 * error["before"]
        assert endpoint_error(pipe, loaded, n, held_out, call) == pytest.approx(error["after"], rel=1e-5)
        assert torch.equal(loaded.tables[n].weights, base.tables[n].weights), "the base is frozen"


def test_an_unlearned_lift_is_its_base_and_every_parameter_gets_a_gradient_after_one_update(pipe: Any) -> None:
    base = DyWeightScheduler.from_config(pipe.scheduler.config).with_tables([_table(pipe)])
    student = LiftStudent(base, [2], (4, 16, 16), operator={"width": 8})
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **CALL}
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for update in range(2):
        with frozen(pipe):
            x, _ = rollout(pipe, student.scheduler, generator=generators([3]), **call)
        if update == 0:
            with torch.no_grad():
                assert torch.equal(x, rollout(pipe, base, generator=generators([3]), **call)[0])
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_features_loss_is_equation_16_and_reaches_the_latents(pipe: Any) -> None:
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    features = dinov2(model=Dinov2Model(Dinov2Config(**size)))
    target = torch.randn(2, 4, 16, 16)
    z = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    loss = make_loss(pipe, features=features)(pipe, z, target)
    images = [features(pipe.vae.decode(v / pipe.vae.config.scaling_factor).sample)[0] for v in (z, target)]
    expected = 0.1 * (z - target).square().mean() + (images[0] - images[1]).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert z.grad is not None and bool(z.grad.ne(0.2 * (z - target).detach() / z.numel()).any())


def test_encoder_distance_is_zero_for_the_same_grows_with_damage_and_is_one_number_per_image(pipe: Any) -> None:
    features = encoder(pipe)
    images, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 64, 64)
    distances = [feature_distance(features, images + s * noise, images) for s in (0.0, 0.05, 0.1, 0.3)]
    assert distances[0].tolist() == [0, 0]
    assert all(bool((b > 1.5 * a).all()) for a, b in pairwise(distances))
    alone = feature_distance(features, images[1:] + 0.1 * noise[1:], images[1:])
    torch.testing.assert_close(alone, distances[2][1:])
    assert not any(m._forward_hooks for m in pipe.vae.modules()), "hooks must be gone"
