"""Where samples come from, and prompts that are encoded once."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from tiny import available, build
from torch import Tensor, nn

from dywspan.distill.config import DistillConfig
from dywspan.distill.split import split_inputs
from dywspan.pipelines.embeddings import PromptMemory, remembered_prompts
from dywspan.pipelines.inputs import SETS, check_call, read_inputs
from dywspan.pipelines.rollout import sample


def texts(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str, encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


# ------------------------------------------------------------------------------------------------ files

PROMPTED = {"prompt": "a cat", "negative_prompt": "blurry"}


@pytest.mark.parametrize(
    ("name", "text", "column", "expected"),
    [
        ("p.txt", "  a cat \n\n\ta dog\n", None, texts("a cat", "a dog")),
        ("p.TXT", "a cat", None, texts("a cat")),
        ("p.jsonl", '"a cat"\n\n{"prompt": "a dog"}\n', None, texts("a cat", "a dog")),
        ("p.jsonl", json.dumps(PROMPTED), None, [PROMPTED]),
        ("p.jsonl", '{"text": "a cat", "n": 1}', "text", texts("a cat")),
        ("p.jsonl", '{"class_labels": 3}\n{"class_labels": 4}', None, [{"class_labels": 3}, {"class_labels": 4}]),
        ("p.jsonl", json.dumps("a\u2028cat", ensure_ascii=False), None, texts("a\u2028cat")),
        ("p.csv", 'n,prompt\n1,"a cat, ""black"""\n2,a dog\n', None, texts('a cat, "black"', "a dog")),
        ("p.csv", 'caption,prompt\n"two\nlines",x\n', "caption", texts("two\nlines")),
    ],
)
def test_files(write: Callable[..., Path], name: str, text: str, column: str | None, expected: Any) -> None:
    path = write(name, text)
    assert read_inputs(path, column) == read_inputs(str(path), column) == expected


def test_a_spreadsheets_mark_is_no_part_of_its_first_column(write: Callable[..., Path]) -> None:
    assert read_inputs(write("p.csv", "prompt\na cat\n", "utf-8-sig")) == texts("a cat")


def test_lists() -> None:
    assert read_inputs(["a cat", {"prompt": "a dog"}]) == texts("a cat", "a dog")
    assert read_inputs([{"class_labels": 3}]) == [{"class_labels": 3}]
    assert read_inputs([{"text": "a", "n": 1}], "text") == texts("a")
    assert read_inputs(None) is None


def test_only_what_is_needed_is_read(write: Callable[..., Path]) -> None:
    assert read_inputs(write("p.jsonl", '"a"\n"b"\nnot JSON'), limit=2) == texts("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "column", "said"),
    [
        ("p.txt", "\n \n", None, "p.txt') holds no prompts"),
        ("p.csv", "prompt\n", None, "holds no prompts"),
        ("p.csv", "text,n\na,1\n", None, "has no column 'prompt': set prompt_column to one of ['n', 'text']"),
        ("p.csv", "text,n\na,1\n", "caption", "has no column 'caption': set prompt_column to one of ['n', 'text']"),
        ("p.jsonl", '{"text": "a"}', "caption", "has no column 'caption': set prompt_column to one of ['text']"),
        ("p.jsonl", '"a"\n{"prompt": ', None, "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", "3", None, "must hold texts or mappings of arguments; got 3"),
        ("p.json", '["a"]', None, "must be one of ['.csv', '.jsonl', '.txt'], or a dataset's folder"),
    ],
)
def test_files_that_hold_no_prompts(
    write: Callable[..., Path], name: str, text: str, column: str | None, said: str
) -> None:
    with pytest.raises(ValueError) as error:
        read_inputs(write(name, text), column)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.CSV"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_inputs(tmp_path / name)


# ------------------------------------------------------------------------------------------------ datasets


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def test_a_dataset_on_disk(datasets: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,caption,n\na cat,cat,1\na dog,dog,2\n", encoding="utf-8")
    (folder / "test.csv").write_text("prompt,caption,n\na cow,cow,3\n", encoding="utf-8")
    assert read_inputs(folder) == texts("a cat", "a dog")
    assert read_inputs(str(folder), "caption", limit=1) == texts("cat")
    assert read_inputs(str(folder), split="test") == texts("a cow")
    with pytest.raises(ValueError, match=r"no column 'text': set prompt_column to one of \['caption', 'n', 'prompt'\]"):
        read_inputs(str(folder), "text")
    with pytest.raises(OSError, match=r"neither a file nor a dataset with split 'validation'.*\['train', 'test'\]"):
        read_inputs(str(folder), split="validation")


def test_a_dataset_in_parquet(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"], "image": ["x", "y"]})
    rows.to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    assert read_inputs(str(tmp_path / "data")) == texts("a cat", "a dog")


def test_a_hub_dataset_while_offline_fails_at_once(datasets: Any) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match="prompts='org/captions' is neither a file nor a dataset"):
        read_inputs("org/captions")
    assert time.monotonic() - start < 30


def test_without_the_datasets_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"'org/captions' is no file.*pip install datasets"):
        read_inputs("org/captions")


# ------------------------------------------------------------------------------------------------ by name


def test_the_packages_own_list_suffices_for_a_run_as_it_comes() -> None:
    settings = DistillConfig(model="m", output="o", prompts="default")
    training, held_out, _ = split_inputs(settings)
    assert len(training) == 256 and len(held_out) == 64
    found = read_inputs("default")
    assert found is not None and found[:320] == [*training, *held_out]
    prompts = [own["prompt"] for own in found]
    assert len(set(map(str.lower, prompts))) == len(prompts) == 352
    assert all(prompt == prompt.strip() and 10 < len(prompt) < 90 for prompt in prompts)
    assert read_inputs("default", "caption", "test", limit=3) == texts(*prompts[:3])


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").touch()
    with pytest.raises(ValueError, match="a file must be one of"):
        read_inputs("default")


@pytest.mark.parametrize("name", sorted(SETS))
def test_well_known_sets(datasets: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dataset, column = SETS[name]
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, split: str) -> Any:
        asked.append((path, split))
        return datasets.Dataset.from_dict({column: ["a cat", "a dog", "a cat", "a cow"], "other": [*"abcd"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_inputs(name) == texts("a cat", "a dog", "a cow"), "each once"
    assert read_inputs(name, limit=1) == texts("a cat")
    assert read_inputs(name, "other", "test") == texts(*"abcd")
    assert asked == [(dataset, "train"), (dataset, "train"), (dataset, "test")]


def test_an_unknown_name_is_told_those_that_are_known(datasets: Any) -> None:
    with pytest.raises(OSError, match="'parti-promts' is neither a file nor a dataset") as error:
        read_inputs("parti-promts")
    assert str(error.value).endswith(f"known by name: {sorted(['default', *SETS])}.")


# ------------------------------------------------------------------------------------------------ what a run gets


def configure(prompts: Any, held_out_prompts: Any = None, **settings: Any) -> DistillConfig:
    return DistillConfig(
        model="m", output="o", pairs=3, held_out=2, prompts=prompts, held_out_prompts=held_out_prompts, **settings
    )


def test_training_and_held_out_inputs_share_no_line() -> None:
    lines = list("abcdef")
    assert split_inputs(configure(lines)) == (texts("a", "b", "c"), texts("d", "e"), [])
    assert split_inputs(configure(lines, test=1)) == (texts("a", "b", "c"), texts("d", "e"), texts("f"))
    assert split_inputs(configure(lines, lines[::-1], test=3)) == (
        texts("a", "b", "c"),
        texts("f", "e"),
        texts("d", "c", "b"),
    )
    apart = configure(lines, test=2, test_prompts=["y", "z"])
    assert split_inputs(apart) == (texts("a", "b", "c"), texts("d", "e"), texts("y", "z"))
    assert split_inputs(configure(None, test=1)) == ([{}] * 3, [{}] * 2, [{}])


@pytest.mark.parametrize(
    ("prompts", "held_out", "said"),
    [
        (list("abcd"), None, "has 4 prompts, 5 are needed: add some, or lower pairs=3, held_out=2 or test=0"),
        (list("ab"), list("cd"), "has 2 prompts, 3 are needed"),
        (list("abc"), ["d"], r"held_out_prompts=\['d'\] has 1 prompts, 2 are needed"),
        ([PROMPTED, *"abcd"], None, r"same arguments: some have \['negative_prompt', 'prompt'\], some \['prompt'\]"),
        (list("abc"), [PROMPTED] * 2, "same arguments"),
    ],
)
def test_inputs_that_do_not_suffice(prompts: Any, held_out: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_inputs(configure(prompts, held_out))


def test_arguments_a_pipeline_does_not_take() -> None:
    sd, dit, ddpm = (build(f"{name}Pipeline").pipe for name in ("StableDiffusion", "DiT", "DDPM"))
    check_call(sd, texts("a"), {"height": 64, "guidance_scale": 4.0})
    check_call(dit, [{"class_labels": 3}], {"guidance_scale": 4.0})
    check_call(ddpm, [{}], {})
    for pipe, inputs, call, said in (
        (sd, texts("a"), {"hight": 64}, r"cannot be called with \['hight'\] here: it takes \[.*'height'"),
        (sd, [{"class_labels": 3}], {}, r"StableDiffusionPipeline cannot be called with \['class_labels'\]"),
        (sd, texts("a"), {"num_inference_steps": 3}, r"cannot be called with \['num_inference_steps'\] here"),
        (ddpm, texts("a"), {}, r"cannot be called with \['prompt'\]"),
        (dit, [{}], {}, r"DiTPipeline needs \['class_labels'\]: set prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            check_call(pipe, inputs, call)


# ------------------------------------------------------------------------------------------------ encoded once


def characters() -> Any:
    """A tokenizer of one token a character, and three marks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<s>", "?", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="?",
        model_max_length=16, chat_template="{% for message in messages %}u:{{ message['content'] }}{% endfor %}",
    )  # fmt: skip


VOCABULARY = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def clip(width: int, **changes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, **VOCABULARY, **changes,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if changes else CLIPTextModel)(config)


def t5(width: int, umt5: bool = False) -> Any:
    import transformers

    prefix = "UMT5" if umt5 else "T5"
    size = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    config = getattr(transformers, f"{prefix}Config")(**size)
    return getattr(transformers, f"{prefix}EncoderModel")(config)


def language_model(kind: str, width: int) -> Any:
    import transformers

    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 2048}
    config = getattr(transformers, f"{kind}Config")(**size, **heads, **VOCABULARY)
    return getattr(transformers, f"{kind}Model")(config)


SIZE: dict[str, Any] = {"height": 32, "width": 32}

# Pipeline -> its text encoders, and a call. What each returns from encode_prompt differs in structure.
ENCODED: dict[str, tuple[list[Callable[[], Any]], dict[str, Any]]] = {
    "StableDiffusionPipeline": ([lambda: clip(16)], SIZE),
    "StableDiffusionXLPipeline": ([lambda: clip(8), lambda: clip(8, projection_dim=16)], SIZE),
    "FluxPipeline": ([lambda: clip(16), lambda: t5(16)], {**SIZE, "max_sequence_length": 16}),
    "SanaPipeline": (
        [lambda: language_model("Gemma2", 8)],
        {"height": 256, "width": 256, "use_resolution_binning": False},
    ),
    "WanPipeline": ([lambda: t5(16, umt5=True)], {**SIZE, "num_frames": 5, "max_sequence_length": 16}),
    "ZImagePipeline": ([lambda: language_model("Qwen3", 8)], {**SIZE, "max_sequence_length": 32}),
    "QwenImagePipeline": ([lambda: language_model("Qwen2", 16)], {"height": 64, "width": 64, "true_cfg_scale": 4.0}),
}
PROMPTS = ["a cat", "two red dogs", "a cow", "one hen"]


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline whose text encoders are there, and arguments of its call."""
    if not available(name):
        pytest.skip(f"{name} is newer than the installed diffusers")
    make, call = ENCODED[name]
    parts = build(name).pipe.components
    torch.manual_seed(1)
    for suffix, encoder in zip(("", "_2"), make):
        parts |= {f"text_encoder{suffix}": encoder().eval(), f"tokenizer{suffix}": characters()}
        for parameter in parts[f"text_encoder{suffix}"].parameters():
            parameter.data.mul_(3)  # as initialised, all prompts are nearly the same to it
    pipe = type(build(name).pipe)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    found = {k: getattr(pipe, k) for k in pipe.config if k.startswith("text_encoder")}
    return {k: v for k, v in found.items() if v is not None}


@contextmanager
def counting(pipe: Any) -> Iterator[list[str]]:
    """The text encoders' calls."""
    calls: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, m in text_encoders(pipe).items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def endpoints(pipe: Any, inputs: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return sample(pipe, pipe.scheduler, 2, inputs, range(len(inputs)), call)[0]


@contextmanager
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*encoded anew")
        yield


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("name", [name for name in ENCODED if name != "QwenImagePipeline"])
def test_remembered_prompts_sample_as_before(name: str, tmp_path: Path) -> None:
    pipe, call = pipeline(name)
    inputs = texts(*PROMPTS)
    plain, swapped = endpoints(pipe, inputs, call), endpoints(pipe, inputs[::-1], call)
    assert not close(plain, swapped, 1e-2), "prompts matter"
    with no_fallback(), counting(pipe) as calls:
        endpoints(pipe, inputs[:2], call)
        of_a_batch = len(calls)
        for prompts in (len(inputs), 0):  # in the first run and the second
            with remembered_prompts(pipe, tmp_path) as memory:
                assert memory is not None
                calls.clear()
                memory.fill(inputs, call, 2)
                # In every run, one batch is also encoded as the pipeline does it.
                assert len(calls) == (prompts + 1) * of_a_batch
                calls.clear()
                assert close(endpoints(pipe, inputs, call), plain)
                assert close(endpoints(pipe, inputs[::-1], call), swapped)
                assert calls == []


def test_a_list_that_is_no_list_of_prompts_is_not_taken_apart(tmp_path: Path) -> None:
    """Sana's instruction before each prompt has eight lines: in a batch of eight they are not one for each prompt."""
    pipe, call = pipeline("SanaPipeline")
    inputs = texts(*PROMPTS, *map(str.upper, PROMPTS))
    plain = endpoints(pipe, inputs, call)
    with no_fallback(), remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        memory.fill(inputs, call, 3)
        with counting(pipe) as calls:
            assert close(endpoints(pipe, inputs, call), plain) and calls == []


def test_embeddings_padded_to_the_longest_prompt_are_not_remembered(tmp_path: Path) -> None:
    pipe, call = pipeline("QwenImagePipeline")
    inputs = texts(*PROMPTS)
    plain = endpoints(pipe, inputs, call)
    with remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        with pytest.warns(UserWarning, match="QwenImagePipeline's prompts are encoded anew.*lengths differ"):
            memory.fill(inputs, call, 4)
        memory.release()
        assert pipe.text_encoder is not None, "it is needed in every call"
        assert torch.equal(endpoints(pipe, inputs, call), plain)


def test_lengths_that_differ_later_bring_a_released_encoder_back(tmp_path: Path) -> None:
    pipe, call = pipeline("QwenImagePipeline")
    alike, mixed = texts("a cat", "a cow", "long cats", "long cows"), texts("a cat", "long cows")
    plain = endpoints(pipe, mixed, call)
    with remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        with no_fallback():
            memory.fill(alike, call, 2)
        memory.release()
        assert pipe.text_encoder is None
        with pytest.warns(UserWarning, match="lengths differ"):
            assert torch.equal(endpoints(pipe, mixed, call), plain)
        assert pipe.text_encoder is not None


@pytest.mark.parametrize("negative", ["per sample", "one for all"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "QwenImagePipeline"])
def test_negative_prompts(name: str, negative: str, tmp_path: Path) -> None:
    """Stable Diffusion encodes both in one call, Qwen-Image in two."""
    pipe, call = pipeline(name)
    own = ["dull", "grey", "dark", "flat"]
    inputs = [{"prompt": p, "negative_prompt": n} for p, n in zip(["a cat", "a dog", "a cow", "a hen"], own)]
    if negative == "one for all":
        inputs, call = texts("a cat", "a dog", "a cow", "a hen"), {**call, "negative_prompt": "dull"}
    plain = endpoints(pipe, inputs[:2], call)
    with no_fallback(), counting(pipe) as calls, remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        memory.fill(inputs, call, 2)
        memory.release()
        calls.clear()
        assert close(endpoints(pipe, inputs[:2], call), plain) and calls == [] and pipe.text_encoder is None
        if negative == "per sample":  # the memory keeps them apart
            exchanged = [{**a, "negative_prompt": b["negative_prompt"]} for a, b in zip(inputs, inputs[::-1])]
            expected = endpoints(pipeline(name)[0], exchanged[:2], call)
            assert not close(expected, plain) and close(endpoints(pipe, exchanged[:2], call), expected)


def test_released_text_encoders_are_gone_until_they_are_needed(tmp_path: Path) -> None:
    pipe, call = pipeline("StableDiffusionXLPipeline")
    inputs, unseen = texts(*PROMPTS), texts("a yak", "a cat")
    encoders = text_encoders(pipe)
    plain, other = endpoints(pipe, inputs, call), endpoints(pipe, unseen, call)
    with no_fallback(), remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        memory.release()
        assert text_encoders(pipe) == encoders, "nothing is encoded yet"
        memory.fill(inputs, call, 1)
        memory.release()
        assert pipe.components["text_encoder"] is None and pipe.components["text_encoder_2"] is None
        assert not {id(m) for m in pipe.components.values()} & {id(m) for m in encoders.values()}
        assert close(endpoints(pipe, inputs, call), plain) and text_encoders(pipe) == {}
        assert close(endpoints(pipe, unseen, call), other) and text_encoders(pipe) == encoders
        memory.release()
        assert text_encoders(pipe) == {}
    assert text_encoders(pipe) == encoders, "and back in the end"


def test_batches_that_are_encoded_differently_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = pipeline("StableDiffusionPipeline")
    encode = type(pipe).encode_prompt

    def whitened(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        prompt[:] = [p + "!" for p in prompt]  # as Z-Image does
        positive, negative = encode(self, prompt, *args, **kwargs)
        return positive - positive.mean(0), negative

    monkeypatch.setattr(type(pipe), "encode_prompt", whitened)
    plain = endpoints(pipe, texts(*PROMPTS), call)
    with remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        with pytest.warns(UserWarning, match="encoded anew in every call: a batch's embeddings differ"):
            assert torch.equal(endpoints(pipe, texts(*PROMPTS), call), plain)
        memory.release()
        assert torch.equal(endpoints(pipe, texts(*PROMPTS), call), plain)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    pipe, call = pipeline("StableDiffusionPipeline")
    inputs = texts(*PROMPTS)
    plain = endpoints(pipe, inputs, call)
    with remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        memory.fill(inputs, call, 4)
        assert len(list(tmp_path.iterdir())) == 4
        file = min(tmp_path.iterdir())
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[-3] ^= 64
        damaged = {"truncated": whole[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": b"no tensors" * 9}
        file.write_bytes(damaged[damage])
        with counting(pipe) as calls:
            assert close(endpoints(pipe, inputs, call), plain) and calls
            calls.clear()
            assert close(endpoints(pipe, inputs, call), plain) and not calls
        assert all(torch.equal(value, load(whole)[name]) for name, value in load(file.read_bytes()).items())


def test_other_weights_are_another_memory(tmp_path: Path) -> None:
    pipe, call = pipeline("StableDiffusionPipeline")

    def encodes() -> bool:
        with counting(pipe) as calls, remembered_prompts(pipe, tmp_path):
            endpoints(pipe, texts("a cat"), call)
        return bool(calls)

    assert encodes() and not encodes()
    with torch.no_grad():
        pipe.unet.conv_in.weight *= 2
        assert not encodes(), "text encoders do not know the denoiser"
        pipe.text_encoder.get_input_embeddings().weight *= 2
    assert encodes() and not encodes()


def test_embeddings_given_by_the_caller_are_left_alone(tmp_path: Path) -> None:
    tiny = build("StableDiffusionPipeline")
    pipe = tiny.pipe
    arguments = {
        "generator": None,
        "num_inference_steps": 1,
        **tiny.inputs((0, 1)),
        "latents": torch.ones(2, 4, 16, 16),
    }
    plain = pipe(**arguments)[0]
    with remembered_prompts(pipe, tmp_path):
        assert torch.equal(pipe(**arguments)[0], plain)
    assert list(tmp_path.iterdir()) == []


def test_encode_prompt_is_the_pipelines_own_afterwards_even_after_an_error(tmp_path: Path) -> None:
    pipe, call = pipeline("StableDiffusionPipeline")
    encoder, own = pipe.text_encoder, pipe.encode_prompt
    with pytest.raises(ZeroDivisionError), remembered_prompts(pipe, tmp_path) as memory:
        assert isinstance(memory, PromptMemory) and pipe.encode_prompt is memory
        memory.fill(texts(*PROMPTS), call, 2)
        memory.release()
        raise ZeroDivisionError
    assert pipe.encode_prompt == own and "encode_prompt" not in vars(pipe) and pipe.text_encoder is encoder
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules()), "hooks must be gone"


def test_a_pipeline_without_prompts_has_nothing_to_remember(tmp_path: Path) -> None:
    with remembered_prompts(build("DDPMPipeline").pipe, tmp_path) as memory:
        assert memory is None


def test_a_single_text_is_remembered_as_it_is_returned(tmp_path: Path) -> None:
    pipe, _ = pipeline("QwenImagePipeline")
    with torch.no_grad():
        plain, _ = pipe.encode_prompt("a cat")
    with counting(pipe) as calls, remembered_prompts(pipe, tmp_path) as memory:
        assert memory is not None
        for _ in range(2):
            assert torch.equal(memory("a cat")[0], plain)
        assert len(calls) == 1
