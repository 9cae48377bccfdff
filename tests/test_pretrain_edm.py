"""training/pretrain_edm.py, from a handful of images to a pipeline that samples."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import data  # noqa: F401  # a fixture

from dywspan.core.prediction import EDM
from dywspan.edm import EDMPipeline, EDMUNet


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))
    return importlib.import_module("pretrain_edm")


def test_the_loss_is_the_weighted_error_of_the_denoised_image(script: Any) -> None:
    """lambda |D - y|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM eq. (2) and table 1."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    network = EDMUNet(sample_size=8, model_channels=8, channel_mult=(1, 1), layers_per_block=1).double().eval()
    torch.nn.init.normal_(network.out_conv.weight, std=0.1)
    sigma = torch.tensor([0.01, 0.3, 1.0, 20.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    prediction, x, found = EDM(0.5), images + sigma * noise, []
    for i, tau in enumerate(sigma.flatten()):
        output = network(prediction.input_scale(tau) * x[i : i + 1], prediction.timestep(tau)).sample
        found.append((prediction.denoised(x[i : i + 1], output, tau) - images[i]).square().mean())
    squares = torch.stack(found)
    expected = squares * ((sigma**2 + 0.25) / (0.25 * sigma**2)).flatten()
    torch.testing.assert_close(script.errors(network, images, sigma, noise), expected, rtol=1e-6, atol=1e-6)


def test_levels_are_lognormal(script: Any) -> None:
    sigma, noise = script.draws(20000, torch.Size([1, 1, 1]), torch.Generator().manual_seed(0))
    assert sigma.log().mean() == pytest.approx(-1.2, abs=0.03) and sigma.log().std() == pytest.approx(1.2, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.03)


@pytest.mark.weekly
@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(
    script: Any,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"updates": 4, "batch-size": 4, "checkpoint-every": 1, "pictures-every": 4, "pictures": 2, "channels": 4}

    def run(output: Path) -> Path:
        script.main([f"--data={data}", f"--output={output}", *(f"--{k}={v}" for k, v in options.items())])
        return output / "edm-emoji"

    whole = run(tmp_path / "whole")
    (line,) = map(json.loads, (tmp_path / "whole" / "edm" / "progress.jsonl").read_text().splitlines())
    assert line["update"] == 4 and line["held_out"] > 0 and (tmp_path / "whole" / "edm" / "000004.png").exists()
    save = script.Training._save

    def stop(training: Any) -> None:
        save(training)
        if training.update == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Training, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    again = run(tmp_path / "stopped")
    one, two = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    pipe = EDMPipeline.from_pretrained(again)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)
