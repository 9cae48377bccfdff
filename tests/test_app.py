"""The compare app: its comparisons, and the page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dywspan import DyWeightScheduler
from dywspan.app.compare import Subject, numbers_picture, packed_size
from dywspan.app.config import CompareConfig
from dywspan.pipelines.decode import to_images
from dywspan.pipelines.rollout import sample

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


# --------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solvers": ["a", "b", "c", "d", "e"]}, "at most 4 solvers; 5 are chosen"),
        ({"solvers": ["euler", "euler"]}, "must name each solver once"),
        ({"seed": -1}, "seed=-1 must lie between 0"),
        ({"steps": 51}, "steps=51 must lie between 1 and the 50 evaluations of the reference"),
        ({"guidance_scale": -2.0}, "guidance_scale=-2.0 must lie between 0 and 1000"),
        ({"prompt": 3}, "prompt=3 must be str"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        CompareConfig(**settings)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (1024, 768)])
def test_the_shape_of_tokens_follows_the_images(height: int, width: int) -> None:
    tokens = (height // 16) * (width // 16)
    assert packed_size(tokens, height, width) == (height // 8, width // 8)


def test_the_table_of_a_solver_is_drawn_at_one_number_of_steps() -> None:
    drawn = {n: numbers_picture(str(EXAMPLES / "emoji-sd-solvers"), n) for n in (3, 5)}
    assert all(data.startswith(b"\x89PNG") for data in drawn.values()) and drawn[3] != drawn[5]
    assert numbers_picture(str(EXAMPLES / "emoji-sd-any-steps"), 11).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"no learned table for 40 steps: it is learned for \[1, 2, 3"):
        numbers_picture(str(EXAMPLES / "emoji-sd-solvers"), 40)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(str(EXAMPLES / "emoji-sd"))


def test_a_subject_knows_its_solvers_and_what_they_were_learned_for(subject: Subject) -> None:
    config = subject.config()
    assert config.guidance_scale == 1.0 and config.steps == 4
    names = [Path(name).name for name in config.solvers]
    assert names == ["emoji-sd-solvers", "emoji-sd-spanlift", "emoji-sd-timelift", "dpmpp-2m"]
    assert not any("flow" in name for name in subject.learned)
    assert subject.config(solvers=["euler"], guidance_scale=2.0).solvers == ["euler"]


def test_images_are_those_of_the_solvers_and_errors_those_to_the_reference(subject: Subject) -> None:
    artefact = str(EXAMPLES / "emoji-sd-solvers")
    config = subject.config(solvers=["euler", artefact], steps=2, teacher_steps=6, seed=3, prompt="red apple")
    reference, euler, learned = subject.compare(config)
    solver = DyWeightScheduler.from_pretrained(artefact)
    with torch.no_grad():
        latents, _ = sample(subject.pipe, solver, 2, [{"prompt": "red apple"}], [3], {"guidance_scale": 1.0})
    assert learned.image is not None and torch.equal(learned.image, to_images(subject.pipe, latents))
    assert (reference.nfe, euler.nfe, learned.nfe) == (6, 2, 2) and reference.error is None
    assert reference.image is not None and euler.image is not None and euler.error_map is not None
    brightness = 5 * (euler.image - reference.image).abs().mean(1)
    torch.testing.assert_close(euler.error_map[:, 0], brightness.clamp(max=1))
    again, _ = subject.compare(subject.config(**{**vars(config), "solvers": ["euler"]}))
    assert again.seconds == reference.seconds, "the reference is remembered"
    other, _ = subject.compare(subject.config(**{**vars(config), "solvers": ["euler"], "seed": 4}))
    assert other.image is not None and not torch.equal(other.image, reference.image)


def test_a_solver_that_does_not_fit_says_why_beside_the_others(subject: Subject) -> None:
    solvers = [str(EXAMPLES / "emoji-flow-solvers"), str(EXAMPLES / "emoji-sd-spanlift"), "euler"]
    config = subject.config(solvers=solvers, steps=6, teacher_steps=6)
    _, euler, flow, lift = subject.compare(config)
    assert flow.image is None and "learned for Flow networks, and this one is of kind" in str(flow.refused)
    assert lift.image is None and "learned for [1, 2, 3, 4, 5, 7] steps" in str(lift.refused)
    assert euler.image is not None and euler.refused is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solvers": ["eulr"]}, "Unknown solver 'eulr': did you mean 'euler'?"),
        ({"call": {"heigth": 64}}, "StableDiffusionPipeline cannot be called with ['heigth'] here"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_sampled(
    subject: Subject, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        next(subject.compare(subject.config(**{"solvers": ["euler"], **settings})))


def test_a_model_must_be_named() -> None:
    with pytest.raises(ValueError, match="Name a model"):
        Subject(" ")


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A page of a headless Chromium."""
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1280, "height": 1100})
        browser.close()


def served(command: list[str], folder: Path, log: Path, **environment: str) -> Iterator[str]:
    """The address of a page that a command serves, until the test ends."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        for _ in range(600):
            if address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                yield address[0]
                return
            if process.poll() is not None:
                break
            time.sleep(0.5)
        pytest.fail(log.read_text()[-2000:])
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [sys.executable, "-m", "dywspan.cli", "app", "--no-browser", "--teacher-steps", "10"]
    command += ["--model", "examples/emoji-sd"]
    yield from served(command, ROOT, tmp_path_factory.mktemp("app") / "log")


def sources(page: Any, name: str) -> list[str | None]:
    """Where the images of a row come from."""
    found = (page.locator(f"#{name}-{i} img") for i in range(5))
    return [image.first.get_attribute("src") if image.count() else None for image in found]


def compared(page: Any) -> None:
    page.get_by_role("button", name="Compare").click()
    page.locator("#status", has_text="Sampling").wait_for(timeout=120_000)
    page.locator("#status", has_text="solvers compared").wait_for(timeout=120_000)


@pytest.mark.slow
def test_a_prompt_is_typed_solvers_are_chosen_and_the_images_change(
    chromium: Any, address: str, tmp_path: Path
) -> None:
    page = chromium
    page.goto(address)
    page.locator("#status", has_text="StableDiffusionPipeline is ready").wait_for(timeout=120_000)
    compared(page)
    first = [sources(page, name) for name in ("image", "error")]
    assert all(first[0]) and all(first[1][1:]) and len({*first[0]}) == 5
    assert "error 0." in page.locator("#head-2").inner_text()

    page.get_by_label("Prompt").fill("red apple, twemoji")
    box = page.get_by_label("Solvers (1 to 4)")
    box.press("Backspace")  # takes out the last solver
    box.fill("unipc")
    box.press("Enter")
    compared(page)
    second = sources(page, "image")
    assert all(second) and not {*second} & {*first[0]}, "another prompt, other images"
    assert any("UniPC" in page.locator(f"#head-{i}").inner_text() for i in range(1, 5))
    page.get_by_text("Numbers of a learned solver").click()
    page.locator("#table img").wait_for(timeout=60_000)
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=os.environ.get("DYWSPAN_SCREENSHOT", tmp_path / "app.png"), full_page=True)


@pytest.mark.slow
def test_wrong_input_is_said_in_the_page(chromium: Any, address: str) -> None:
    page = chromium
    page.goto(address)
    page.locator("#status", has_text="is ready").wait_for(timeout=120_000)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("More arguments of the pipeline's call").fill("{height: 3}")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("are not JSON").wait_for(timeout=60_000)
    model = page.get_by_label("Model")
    model.fill("no/such-model")
    model.press("Enter")
    page.get_by_text("no/such-model").last.wait_for(timeout=60_000)
    assert "no/such-model" in page.locator(".toast-body").last.inner_text()


@pytest.mark.slow
def test_it_runs_as_a_space_as_it_is(chromium: Any, tmp_path: Path) -> None:
    subprocess.run(["make", "space"], cwd=ROOT, check=True, capture_output=True)
    space = shutil.copytree(ROOT / "build" / "space", tmp_path / "space")
    page = chromium
    for address in served([sys.executable, "app.py"], space, tmp_path / "log", PYTHONPATH=""):
        page.goto(address)
        page.locator("#status", has_text="FluxPipeline is ready").wait_for(timeout=120_000)
        page.get_by_label("Model").click()
        page.get_by_role("option", name="examples/emoji-sd").click()
        page.locator("#status", has_text="StableDiffusionPipeline is ready").wait_for(timeout=120_000)
        assert "examples/emoji-sd-solvers" in page.locator("body").inner_text()


def test_a_space_asks_for_what_the_package_does() -> None:
    wanted = (EXAMPLES / "space" / "requirements.txt").read_text(encoding="utf-8").split()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{line}"' in project for line in wanted)
    needed = re.findall(r"^dependencies = \[(.*?)\]", project, re.M)[0]
    assert {*re.findall(r'"(.*?)"', needed)} <= {*wanted}
