"""Text encoders are loaded, used and gone before the denoiser is loaded: the same numbers, once on a machine."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_inputs import counting
from torch import nn

from dywspan import DyWeightScheduler
from dywspan.distill import trainer
from dywspan.distill.config import DistillConfig
from dywspan.pipelines import encoders
from dywspan.pipelines.embeddings import remembered_prompts
from dywspan.pipelines.encoders import encode_apart, stand_ins
from dywspan.pipelines.hashes import fingerprint
from dywspan.pipelines.rollout import load_pipeline, sample

EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = ("emoji-sd", "emoji-flow")
HOW: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
INPUTS = [{"prompt": text} for text in ("a cat", "the sun behind a cloud", "a red heart")]
CALLS = [{"guidance_scale": g, "height": 64, "width": 64} for g in (1.0, 3.0)]


def bytes_of(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters() if not p.is_meta)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_sampled_without_text_encoders_is_what_is_sampled_with_them(model: str, tmp_path: Path) -> None:
    path = str(EXAMPLES / model)
    whole = load_pipeline(path)
    left_out = encode_apart(path, INPUTS, CALLS, tmp_path, 2, **HOW)
    assert {*left_out} == {name for name in whole.components if name.startswith("text_encoder")}
    pipe = load_pipeline(path, **HOW, parts=dict.fromkeys(left_out))
    assert not any(pipe.components[name] for name in left_out)
    assert fingerprint(pipe, left_out) == fingerprint(whole) != fingerprint(pipe)
    with torch.no_grad(), remembered_prompts(pipe, tmp_path, left_out):
        for call in CALLS:
            plain, found = (sample(p, p.scheduler, 2, INPUTS, range(3), call)[0] for p in (whole, pipe))
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), remembered_prompts(whole, tmp_path), counting(whole) as calls:
        sample(whole, whole.scheduler, 2, INPUTS[:1], range(1), CALLS[0])
    assert not calls, "the whole pipeline finds what the text encoders alone made"


@pytest.mark.parametrize("model", MODELS)
def test_no_denoiser_is_in_memory_while_prompts_are_encoded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, held = encoders.load_pipeline, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        pipe = load(*args, **kwargs)
        held.extend(bytes_of(m) for n, m in pipe.components.items() if n in ("unet", "transformer"))
        return pipe

    monkeypatch.setattr(encoders, "load_pipeline", watched)
    assert encode_apart(str(EXAMPLES / model), INPUTS, CALLS, tmp_path, **HOW)
    assert held == [0]


def test_a_stand_in_is_of_the_class_and_says_where_and_in_what_it_computes() -> None:
    (network,) = stand_ins(str(EXAMPLES / "emoji-flow"), torch.bfloat16, "cpu").values()
    whole = load_pipeline(str(EXAMPLES / "emoji-flow")).transformer
    assert type(network) is type(whole) and network.dtype == torch.bfloat16 and network.device == torch.device("cpu")


def write(folder: Path, **settings: Any) -> DistillConfig:
    call = {"guidance_scale": 1.0, "height": 64, "width": 64}
    given: dict[str, Any] = {"model": str(EXAMPLES / "emoji-flow"), "prompts": [own["prompt"] for own in INPUTS] * 2}
    given |= {"pairs": 4, "held_out": 2, "steps": [2], "updates": 2, "batch_size": 4, "optimizer": "least_squares"}
    given |= {"teacher_steps": 4, "call": call, "output": str(folder), "pictures": 1, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(given), encoding="utf-8")
    return DistillConfig(**given)


@pytest.mark.slow
def test_a_run_learns_the_same_and_never_holds_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer.run(write(tmp_path / "plain"))
    load, loaded = trainer.load_pipeline, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        pipe = load(*args, **kwargs)
        loaded.append({name for name, part in pipe.components.items() if isinstance(part, nn.Module)})
        return pipe

    monkeypatch.setattr(trainer, "load_pipeline", watched)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The text encoders")
        found = trainer.run(write(tmp_path / "apart", release_text_encoders=True))
    assert loaded == [{"transformer", "vae"}]
    torch.testing.assert_close(found.tables[2].weights, plain.tables[2].weights, rtol=1e-3, atol=1e-4)
    config = write(tmp_path / "dry", release_text_encoders=True, dry_run=True)
    assert trainer.run(config) is None and [file.name for file in (tmp_path / "dry").iterdir()] == ["run.yaml"]


def test_where_a_stand_in_does_not_do_all_is_loaded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        raise AttributeError("'Stand-in' has none")

    monkeypatch.setattr(encoders, "stand_ins", asked)
    with pytest.warns(UserWarning, match="together with the denoiser: AttributeError: 'Stand-in' has none"):
        assert encode_apart(str(EXAMPLES / "emoji-flow"), INPUTS, CALLS, tmp_path, **HOW) == {}


def test_a_prompt_that_was_not_encoded_is_named(tmp_path: Path) -> None:
    path = str(EXAMPLES / "emoji-flow")
    left_out = encode_apart(path, INPUTS, CALLS, tmp_path, **HOW)
    pipe = load_pipeline(path, **HOW, parts=dict.fromkeys(left_out))
    with remembered_prompts(pipe, tmp_path, left_out), pytest.raises(RuntimeError, match=r"'a dog'.*was not among"):
        sample(pipe, pipe.scheduler, 1, [{"prompt": "a dog"}], [0], CALLS[0])


@pytest.mark.slow
def test_of_two_processes_one_encodes_and_both_learn(tmp_path: Path) -> None:
    write(tmp_path / "out", release_text_encoders=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "dywspan.cli", "distill", "--config", str(tmp_path / "out" / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded together" not in done.stderr
    assert 2 in DyWeightScheduler.from_pretrained(tmp_path / "out").tables
