"""Any pipeline that samples can be learned from: quantised, compiled, offloaded, modular, of classes of one's own.

For each, evaluations are counted as the network itself counts them, replay is on and exact, the hash of the weights
holds still, and gradients are those of the plain pipeline, or refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from test_distill import EMOJI, INPUTS
from test_trainable import Subject
from test_trainable import fresh as fresh_subject
from tiny import Tiny, build
from torch import Tensor, nn

from dywspan import DyWeightScheduler
from dywspan.distill.config import LearningConfig
from dywspan.distill.least_squares import Problem
from dywspan.distill.losses import latent_mse
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.pipelines.decode import decode
from dywspan.pipelines.gradients import check_gradients
from dywspan.pipelines.hashes import fingerprint
from dywspan.pipelines.inputs import check_call
from dywspan.pipelines.networks import denoisers, dtype_of, place
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.precision import autocast
from dywspan.pipelines.replay import Meter
from dywspan.pipelines.rollout import frozen, load_pipeline, sample
from dywspan.pipelines.teacher import Teacher

CONFIG = LearningConfig(optimizer="least_squares", order=2, init="euler", batch_size=2, updates=1)
EMOJI_FLOW = EMOJI.parent / "emoji-flow"


def _torchao(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def _bitsandbytes(bits: int) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        for module in [*pipe.transformer.modules()]:
            for name, own in [*module.named_children()]:
                if type(own) is nn.Linear:
                    size = own.in_features, own.out_features, own.bias is not None
                    new = (
                        layers.Linear8bitLt(*size, has_fp16_weights=False)
                        if bits == 8
                        else layers.Linear4bit(*size, quant_type="nf4", compute_dtype=torch.float32)
                    )
                    new.load_state_dict(own.state_dict(), strict=False)
                    setattr(module, name, new.to("cpu").requires_grad_(False))

    return quantise


def _gguf(pipe: Any) -> None:
    """The pipeline's transformer, through a file."""
    gguf = pytest.importorskip("gguf")
    own, kind = pipe.transformer, gguf.GGMLQuantizationType.Q8_0
    with tempfile.TemporaryDirectory() as folder:
        own.save_config(folder)
        writer = gguf.GGUFWriter(f"{folder}/flux.gguf", "flux")
        for name, tensor in own.state_dict().items():
            packed = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
            data = gguf.quants.quantize(tensor.numpy(), kind) if packed else tensor.numpy()
            writer.add_tensor(name, data, raw_dtype=kind if packed else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        options: dict[str, Any] = {"config": folder, "quantization_config": config, "torch_dtype": torch.float32}
        pipe.transformer = type(own).from_single_file(f"{folder}/flux.gguf", **options).requires_grad_(False)
    assert any(type(m).__name__ == "GGUFLinear" for m in pipe.transformer.modules())
    for module in pipe.transformer.modules():  # as the other's
        if isinstance(module, Timesteps):
            module.scale *= 0.01


def _dynamic(pipe: Any) -> None:
    pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8)


def _compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def _compiled_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def _compiled_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def _model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _sequential_offload(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does; but Accelerate confuses weights on the CPU with those kept there."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            accelerate.cpu_offload(module, torch.device("cpu"), bool(module._parameters), kept)


def _group_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def _lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.transformer.requires_grad_(False)


def _own_class(pipe: Any) -> None:
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type("Own", (kind,), {"__module__": "nowhere"})


def _own_network(pipe: Any) -> None:
    class Wrapper(nn.Module):
        """Nothing of diffusers, and its time has another name."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network, self.config, self.dtype = network, network.config, network.dtype
            self.device = network.device
            self.cache_context = network.cache_context

        def forward(self, hidden_states: Tensor, **others: Any) -> Any:
            return self.network(hidden_states=hidden_states, **others)

    pipe.transformer = Wrapper(pipe.transformer)


KINDS: dict[str, Callable[[Any], None]] = {
    "torchao int8": _torchao,
    "bitsandbytes int8": _bitsandbytes(8),
    "bitsandbytes nf4": _bitsandbytes(4),
    "gguf": _gguf,
    "dynamic int8": _dynamic,
    "compiled": _compiled,
    "compiled in place": _compiled_in_place,
    "compiled blocks": _compiled_blocks,
    "model offload": _model_offload,
    "sequential offload": _sequential_offload,
    "group offload": _group_offload,
    "lora": _lora,
    "own class": _own_class,
    "own network": _own_network,
    "modular": lambda pipe: None,
}
OTHER_WEIGHTS = {"torchao int8", "bitsandbytes int8", "bitsandbytes nf4", "gguf", "dynamic int8", "lora"}
WITHOUT_GRADIENTS = {"dynamic int8"}


def make(kind: str) -> Subject:
    if kind == "modular":
        return Subject(kind, replace(tiny := fresh_subject("FluxModularPipeline").tiny, inputs=sized(tiny)))
    subject = fresh_subject("FluxPipeline")
    KINDS[kind](subject.pipe)
    return subject


def sized(tiny: Tiny) -> Callable[[Sequence[int]], dict[str, Any]]:
    """Without a decoder, blocks take latents for an eighth of the image."""
    return lambda i: {**tiny.inputs(i), "height": 128, "width": 128}


@contextmanager
def asked(pipe: Any) -> Iterator[Tensor]:
    """Samples that the network computes, counted inside it; by a tensor, which compiled networks count with too."""
    total = torch.zeros((), dtype=torch.long)

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        total.add_(len(output))

    inside = next(m for m in pipe.transformer.modules() if type(m).__name__ == "FluxTransformerBlock")
    handle = inside.attn.norm_q.register_forward_hook(count)
    yield total
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_learned_from_and_counted(kind: str) -> None:
    subject = make(kind)
    before = fingerprint(subject.pipe)
    # From the start: a compiled network does not see a hook that comes later.
    with asked(subject.pipe) as count, Meter(subject.pipe).running() as meter:
        pairs = subject.pairs(range(2))
        student = subject.student("dyweight", pairs.endpoints.shape[1:])
        problem = Problem(subject.pipe, student, [Term(3, subject.call, pairs, pairs)], config=CONFIG, loss=latent_mse)
        problem.check_replay()
        assert problem.replays
        sampled = problem.sample(problem.batch(0))
        problem.see(sampled)
        value = problem.value(sampled)
        student.move(problem.target(1.0))
        assert problem.value(problem.sample(problem.batch(0))) < value
    assert meter.counts["student"] == int(count) > 0
    assert fingerprint(subject.pipe) == before


# --------------------------------------------------------------------------------------------------- gradients


def gradients(subject: Subject, recompute: bool = True) -> list[Tensor]:
    target = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    pairs = replace(subject.pairs(range(2)), targets=target)
    return subject.gradients(subject.student("dyweight", target.shape[1:]), pairs, recompute)


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return gradients(fresh_subject("FluxPipeline"))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - OTHER_WEIGHTS))
def test_gradients_are_those_of_the_plain_pipeline(kind: str, recompute: bool, plain: list[Tensor]) -> None:
    subject = make(kind)
    moving = {name: p.requires_grad for name, p in subject.pipe.transformer.named_parameters()}
    check_gradients(subject.pipe, recompute)
    for found, expected in zip(gradients(subject, recompute), plain):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert {name: p.requires_grad for name, p in subject.pipe.transformer.named_parameters()} == moving


@pytest.mark.parametrize("kind", sorted(OTHER_WEIGHTS - WITHOUT_GRADIENTS))
def test_gradients_of_other_weights_are_those_of_differences(kind: str) -> None:
    """By recomputing and without, and along the gradient as large as it says."""
    subject = make(kind)
    check_gradients(subject.pipe)
    found, stored = gradients(subject), gradients(subject, recompute=False)
    for again, once in zip(found, stored):
        torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-6 * float(once.abs().max()))
    target = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    pairs = replace(subject.pairs(range(2)), targets=target)
    student = subject.student("dyweight", target.shape[1:])
    norm = torch.stack([g.norm() for g in found]).norm()
    ends = []
    for side in (1, -1):
        with torch.no_grad():
            for parameter, g in zip(student.parameters(), found):
                parameter += side * 0.05 * g / norm
            ends.append(float(subject.loss(student, pairs)))
            for parameter, g in zip(student.parameters(), found):
                parameter -= side * 0.05 * g / norm
    assert (ends[0] - ends[1]) / 0.1 == pytest.approx(float(norm), rel=0.1)


@pytest.mark.parametrize("kind", sorted(WITHOUT_GRADIENTS))
def test_gradients_that_are_not_there_are_refused(kind: str) -> None:
    subject = make(kind)
    with pytest.raises(ValueError, match=r"transformer\..*Linear.*what it returns has none.*least_squares"):
        check_gradients(subject.pipe)


def test_a_network_that_cuts_gradients_is_refused_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = fresh_subject("FluxPipeline")
    forward = subject.pipe.transformer.forward
    monkeypatch.setattr(subject.pipe.transformer, "forward", torch.no_grad()(forward))
    with pytest.raises(ValueError, match=r"Gradients do not pass through FluxPipeline.*step 1.*least_squares"):
        gradients(subject, recompute=False)


# ----------------------------------------------------------------------------------------- what is asked of a pipeline


def test_denoisers_are_what_is_told_the_time() -> None:
    pipe = load_pipeline(str(EMOJI))
    assert [*denoisers(pipe)] == ["unet"], "neither autoencoder, text encoder nor safety checker"
    assert [*denoisers(build("LTX2Pipeline").pipe)] == ["transformer"], "no connectors, no vocoder"
    both = build("WanPipeline (two experts)").pipe
    assert [*denoisers(both)] == ["transformer", "transformer_2"]

    class Own(nn.Module):
        def forward(self, z: Tensor, level: Tensor) -> Tensor:
            return z

    class Of(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.network(*args, **kwargs)

    some = SimpleNamespace(components={**pipe.components, "unet": None, "own": Own()})
    assert [*denoisers(some)] == ["own"], "there is nothing else that it could be"
    some.components |= {"own": Of(pipe.unet), "text_encoder": Of(pipe.text_encoder)}
    assert [*denoisers(some)] == ["own"]


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4", "gguf", "lora", "sequential offload"])
def test_the_hash_follows_the_weights(kind: str) -> None:
    subject, seen = make(kind), set()
    seen.add(fingerprint(subject.pipe))
    other = fresh_subject("FluxPipeline")
    with torch.no_grad():
        for own in other.pipe.transformer.parameters():
            own *= 1.5
    KINDS[kind](other.pipe)
    seen |= {fingerprint(other.pipe), fingerprint(fresh_subject("FluxPipeline").pipe)}
    assert len(seen) == (2 if kind == "sequential offload" else 3)


def test_the_hash_of_plain_pipelines_is_that_of_earlier_releases() -> None:
    """Caches are found by it."""
    assert fingerprint(load_pipeline(str(EMOJI))) == "5c9357ee7f454535"
    assert fingerprint(load_pipeline(str(EMOJI_FLOW))) == "759687b71868358c"


def test_the_hash_knows_how_strongly_a_lora_acts() -> None:
    subject = make("lora")
    one, network = fingerprint(subject.pipe), subject.pipe.transformer
    network.set_adapters(["default"], weights=[0.5])
    half = fingerprint(subject.pipe)
    network.disable_adapters()
    assert len({one, half, fingerprint(subject.pipe)}) == 3
    network.enable_adapters()
    network.set_adapters(["default"], weights=[1.0])
    assert fingerprint(subject.pipe) == one


def test_the_place_is_where_hooks_move_to_and_latents_go_there() -> None:
    """The meta device, of which nothing can be computed, in the part of an accelerator."""
    pipe = load_pipeline(str(EMOJI))
    assert place(pipe) == place(pipe, pipe.vae) == torch.device("cpu")
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload_with_hook(part, "meta")
    assert pipe.device.type == "cpu"
    assert place(pipe).type == place(pipe, pipe.unet).type == "meta"
    given: list[Tensor] = []

    def take(z: Tensor) -> Any:
        given.append(z)
        raise InterruptedError

    pipe.vae.decode = take
    with pytest.raises(InterruptedError):
        decode(pipe, torch.randn(1, 4, 8, 8))
    assert given[0].device.type == "meta"


def test_autocast_is_where_the_pipeline_computes() -> None:
    pipe = SimpleNamespace(device=torch.device("cpu"), _execution_device=torch.device("cuda:1"))
    assert autocast(pipe, "no").device == "cuda"  # type: ignore[attr-defined]


def test_decoders_that_overflow_decode_in_float32() -> None:
    """As the pipeline does; weights stay as they are, and gradients pass."""
    pipe = build.__wrapped__("StableDiffusionXLPipeline").pipe
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae = pipe.vae.half()
    vae.register_to_config(force_upcast=True)
    wide = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d)][-1]
    computed: list[torch.dtype] = []
    handle = wide.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    found = decode(pipe, z.requires_grad_())
    assert computed == [torch.float32] and vae.dtype == dtype_of(vae) == torch.float16
    (slope,) = torch.autograd.grad(found.square().sum(), z)
    vae.float()
    expected = decode(pipe, z)
    handle.remove()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.square().sum(), z)[0])


# ---------------------------------------------------------------------------------------------------------- modular


@pytest.fixture(scope="module")
def flow_pair() -> tuple[Any, Any]:
    """The same pipeline, and the same of blocks."""
    other = diffusers.ModularPipeline.from_pretrained(str(EMOJI_FLOW))
    other.load_components(torch_dtype=torch.float32)
    return load_pipeline(str(EMOJI_FLOW)), other


def test_modular_pipelines_sample_as_others_do(flow_pair: tuple[Any, Any]) -> None:
    call = {"height": 32, "width": 32, "guidance_scale": 0.0, "max_sequence_length": 16}
    made = []
    for pipe in flow_pair:
        check_call(pipe, INPUTS, call)
        own = pipe.scheduler
        scheduler = DyWeightScheduler.from_config(own.config, solver="ipndm")
        with torch.no_grad():
            end, output = sample(pipe, scheduler, 2, INPUTS[:1], [3], call)
        assert output is None and pipe.scheduler is own
        pairs = make_pairs(pipe, Teacher(scheduler, 3), INPUTS[:2], [5, 6], call=call)
        made.append((end, pairs.endpoints, fingerprint(pipe), decode(pipe, end, "packed")))
    (end, endpoints, model, image), other = made
    assert torch.equal(end, other[0]) and torch.equal(image, other[3]) and model == other[2]
    # Of more than one sample, blocks give the network one time for all, which rounds otherwise.
    torch.testing.assert_close(endpoints, other[1], rtol=1e-5, atol=1e-5)


def test_a_modular_call_that_is_wrong_is_refused(flow_pair: tuple[Any, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"FluxModularPipeline cannot be called with \['colour'\].*'max_sequence_length'"
    ):
        check_call(flow_pair[1], INPUTS, {"colour": "red"})


def test_a_modular_call_gives_what_it_returns() -> None:
    subject = make("modular")
    two = subject.inputs(range(2)), [0, 1], subject.call
    with torch.no_grad():
        end, output = sample(subject.pipe, subject.solver(), 2, *two, decode=True)
    assert output.ndim == 4 and torch.equal(end.flatten().sort()[0], output.flatten().sort()[0]), "unpacked"


def test_gradients_are_off_in_a_modular_call_of_ones_own() -> None:
    """A rollout leaves blocks as they were."""
    subject = fresh_subject("FluxModularPipeline")
    kinds = type(subject.pipe._blocks)
    with frozen(subject.pipe), torch.enable_grad():
        sample(subject.pipe, subject.solver(), 1, subject.inputs(range(1)), [0], subject.call)
    assert type(subject.pipe._blocks) is kinds


def test_a_saved_modular_pipeline_is_loaded(tmp_path: Path) -> None:
    index = {"_class_name": "FluxModularPipeline", "_blocks_class_name": "FluxAutoBlocks"}
    for name, value in json.loads((EMOJI_FLOW / "model_index.json").read_text()).items():
        if isinstance(value, list):
            spec = {"pretrained_model_name_or_path": str(EMOJI_FLOW), "subfolder": name, "type_hint": value}
            index[name] = [*value, spec]  # type: ignore[assignment]
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    pipe = load_pipeline(str(tmp_path))
    assert type(pipe).__name__ == "FluxModularPipeline"
    assert fingerprint(pipe) == fingerprint(load_pipeline(str(EMOJI_FLOW)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="model_index"):
        load_pipeline(str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["torchao int8", "modular"])
def test_a_whole_fit_learns(kind: str) -> None:
    subject = make(kind)
    train, held_out = subject.pairs(range(4)), subject.pairs(range(20, 22))
    term = Term(2, subject.call, train, held_out)
    table = distill(Task(subject.pipe, subject.teacher, [term], replace(CONFIG, updates=2))).tables[2]
    error = table.provenance["held_out_error"]
    assert error["after"] < error["before"]
