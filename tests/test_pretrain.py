"""training/pretrain_emoji.py, from a handful of images to a pipeline that samples."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

NETWORK = {"sd": "unet", "flow": "transformer"}
CALL = {
    "sd": {"guidance_scale": 4.0},
    "flow": {"negative_prompt": "", "true_cfg_scale": 4.0, "height": 48, "width": 48, "max_sequence_length": 28},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))
    return importlib.import_module("pretrain_emoji")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The form of emoji64: 300 emoji in two styles."""
    folder = tmp_path_factory.mktemp("emoji64")
    entries = [{"text": f"emoji {i}, {style}"} for style in ("noto", "twemoji") for i in range(210)]
    (folder / "emoji64.json").write_text(json.dumps(entries))
    images = np.random.default_rng(0).integers(0, 256, (len(entries), 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "emoji64.npz", images=images.repeat(16, 1).repeat(16, 2))
    return folder


@pytest.mark.parametrize("pipeline", ["sd", "flow"])
def test_a_pipeline_comes_out_and_a_stopped_run_goes_on_to_the_same_weights(
    script: Any, data: Path, tmp_path: Path, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"autoencoder-updates": 3, "updates": 4, "word-updates": 2, "batch-size": 4}
    options |= {"checkpoint-every": 1, "pictures-every": 4}
    numbers = [f"--{name}={value}" for name, value in {**options, "pictures": 1}.items()]

    def run(output: Path) -> Path:
        script.main([pipeline, "--data", str(data), "--output", str(output), *numbers])
        return output / f"emoji-{pipeline}"

    whole = run(tmp_path / "whole")
    for stage, updates in ((pipeline, 4), (f"{pipeline}-words", 2)):
        folder = tmp_path / "whole" / stage
        (line,) = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
        assert line["update"] == updates and line["held_out"] > 0
        assert (folder / f"{updates:06d}.png").exists()

    save, seen = script.Training._save, []
    stops = ("autoencoder", 2), (pipeline, 1), (f"{pipeline}-words", 1)

    def stop(training: Any) -> None:
        save(training)
        seen.append((training.folder.name, training.update))
        if seen[-1] in stops:
            raise KeyboardInterrupt

    for name in ("tokenizer", "tokenizer_2"):  # learned anew they would differ in how ties were broken
        if (tmp_path / "whole" / name).exists():
            shutil.copytree(tmp_path / "whole" / name, tmp_path / "stopped" / name)
    monkeypatch.setattr(script.Training, "_save", stop)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    again = run(tmp_path / "stopped")
    name = f"{NETWORK[pipeline]}/diffusion_pytorch_model.safetensors"
    one, two = load_file(whole / name), load_file(again / name)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert all(seen.count(stop) == 1 for stop in stops)

    pipe = DiffusionPipeline.from_pretrained(again, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("emoji 3, noto", num_inference_steps=2, output_type="pt", **CALL[pipeline]).images
    assert images.isfinite().all() and images.shape[-1] == CALL[pipeline].get("width", 64)
    told = (again / "README.md").read_text()
    assert type(pipe).__name__ in told and "4 updates of 4 images with their captions and 2 with parts" in told


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(script: Any, data: Path, tmp_path: Path) -> None:
    given = Path(__file__).parents[1] / "examples" / "emoji-sd"
    options = {"autoencoder": given, "updates": 1, "word-updates": 1, "batch-size": 2, "pictures": 1}
    options |= {"data": data, "output": tmp_path}
    script.main(["sd", *(f"--{name}={value}" for name, value in options.items())])
    for change in ({"seed": 1}, {"lr": 2e-3}, {"updates": 2}, {"batch-size": 4}):
        with pytest.raises(ValueError, match=r"was begun with .*: choose another --output"):
            script.main(["sd", *(f"--{name}={value}" for name, value in {**options, **change}.items())])


def test_another_pipelines_autoencoder_is_taken(script: Any, data: Path, tmp_path: Path) -> None:
    given = Path(__file__).parents[1] / "examples" / "emoji-sd"
    options = {"autoencoder": given, "updates": 1, "word-updates": 1, "batch-size": 2, "pictures": 1}
    options |= {"data": data, "output": tmp_path}
    script.main(["flow", *(f"--{name}={value}" for name, value in options.items())])
    name = "vae/diffusion_pytorch_model.safetensors"
    one, two = load_file(given / name), load_file(tmp_path / "emoji-flow" / name)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "autoencoder").exists()


def test_parts_of_captions_are_words_in_their_order(script: Any) -> None:
    captions = [f"a{i} b c d e, noto" for i in range(900)]
    generator = torch.Generator().manual_seed(0)
    whole = script.leave_out(captions, generator, words=False)
    assert 50 < whole.count("") < 130 and all(new in ("", old) for new, old in zip(whole, captions))
    parts = script.leave_out(captions, generator, words=True)
    assert 230 < sum(new == old for new, old in zip(parts, captions)) < 400  # 0.9 / 3, and a few by chance
    for new, old in zip(parts, captions):
        rest = iter(old.split())
        assert all(word in rest for word in new.split())
