"""The page: Gradio components around :mod:`.compare`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from ..shipped import pipelines
from .compare import CLASSICAL, Shown, Subject, numbers_picture
from .config import SIDE_BY_SIDE, CompareConfig

try:
    import gradio as gr  # pyright: ignore[reportMissingImports] # an extra
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The compare app needs Gradio: pip install 'dywspan[app]'.") from error

EXAMPLE = '{"height": 64}'
SMALLEST = 256  # pixels: smaller images are enlarged
CSS = ".dywspan-head p { margin: 0 } .dywspan-head { min-height: 7em }"
INTRODUCTION = """# Compare solvers
Same prompt, same noise, same network: the reference takes many evaluations of the network, the solvers beside it a few.
Below each solver: five times its difference from the reference. Black means no difference."""


def make_page(config: CompareConfig | None = None, models: Sequence[str] = (), any_model: bool = True) -> gr.Blocks:
    """The compare app.

    Args:
        config: what the page shows first.
        models: choices of the pipeline; default: those in examples/.
        any_model: also take other directories and Hub ids, of models and of solvers. A public page should not.

    Returns:
        The page; ``launch()`` serves it. Requests to the pipeline run one at a time.

    Raises:
        ValueError: there is no model to show.
    """
    models = list(models or pipelines())
    first = config or CompareConfig()
    if not (start := first.model or next(iter(models), "")):
        raise ValueError("There are no pipelines in examples/ here: name one, dywspan app --model org/model.")
    subject = lru_cache(maxsize=1)(Subject)  # one pipeline in memory

    with gr.Blocks(title="dywspan: compare solvers", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            model = gr.Dropdown(
                list(dict.fromkeys([start, *models])),
                value=start,
                label="Model",
                info="a directory or a Hub id" if any_model else None,
                allow_custom_value=any_model,
            )
            solvers = gr.Dropdown(
                [],
                multiselect=True,
                label=f"Solvers (1 to {SIDE_BY_SIDE})",
                info="names, artefact directories or Hub ids" if any_model else None,
                allow_custom_value=any_model,
            )
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(first.prompt, label="Prompt", scale=4)
            seed = gr.Number(first.seed, label="Seed", precision=0, minimum=0, min_width=100)
            steps = gr.Slider(1, 20, first.steps, step=1, label="Evaluations", min_width=140)
            guidance = gr.Slider(0, 15, step=0.1, label="Guidance scale", min_width=140)
        with gr.Accordion("More", open=False), gr.Row():
            call = gr.Textbox("{}", label="More arguments of the pipeline's call", info="JSON")
            teacher_steps = gr.Slider(10, 200, first.teacher_steps, step=1, label="Evaluations of the reference")
        button = gr.Button("Compare", variant="primary", elem_id="compare")
        status = gr.Markdown(elem_id="status")
        cells = []
        with gr.Row():
            for i in range(SIDE_BY_SIDE + 1):
                with gr.Column(min_width=150, visible=False) as column:
                    head = gr.HTML(elem_id=f"head-{i}", elem_classes="dywspan-head")
                    options: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": ["download"]}
                    image = gr.Image(elem_id=f"image-{i}", **options)
                    error_map = gr.Image(elem_id=f"error-{i}", visible=i > 0, **options)
                cells.append((column, head, image, error_map))
        with gr.Accordion("Numbers of a learned solver", open=False, elem_id="numbers"):
            gr.Markdown("Weights, row sums with the time scale, and noise levels at the number of evaluations above.")
            artefact = gr.Dropdown([], label="Solver", allow_custom_value=any_model)
            picture = gr.Image(elem_id="table", type="pil", show_label=False, interactive=False)
            said = gr.Markdown()

        @_shows_errors
        def choose(name: str) -> dict[Any, Any]:
            """The choices and defaults of a model."""
            own = subject(name, first.dtype)
            given = {k: v for k, v in vars(first).items() if k not in ("model", "dtype") and name == start}
            default = own.config(**given)
            choices = [*own.learned, *CLASSICAL]
            learned = [solver for solver in default.solvers if solver not in CLASSICAL]
            return {
                solvers: gr.Dropdown(choices, value=default.solvers),
                prompt: gr.Textbox(visible=own.has_prompt),
                guidance: gr.Slider(value=default.guidance_scale, visible=own.guidance is not None),
                call: json.dumps(default.call),
                artefact: gr.Dropdown(own.learned, value=next(iter(learned), None)),
                status: f"{type(own.pipe).__name__} is ready.",
            }

        @_shows_errors
        def compare(*values: Any, progress: Any = gr.Progress()) -> Iterator[dict[Any, Any]]:  # noqa: B008
            """The reference, then one solver after the other."""
            name, chosen, text, noise, count, scale, more, slow = values
            own = subject(name, first.dtype)
            settings = {"model": name, "solvers": chosen or [], "prompt": text, "seed": _whole("Seed", noise)}
            settings |= {"steps": int(count), "teacher_steps": int(slow), "call": _arguments(more)}
            made = CompareConfig(**settings, guidance_scale=None if scale is None else float(scale))
            hidden = {column: gr.Column(visible=i <= len(made.solvers)) for i, (column, *_) in enumerate(cells)}
            yield {part: None for cell in cells for part in cell[1:]} | hidden | {status: "Sampling..."}
            told = lambda solver, i, n: progress((i, n), desc=solver, unit="evaluations")  # noqa: E731
            for shown, (_, head, image, error_map) in zip(own.compare(made, told), cells):
                pictures = {image: _enlarged(shown.image), error_map: _enlarged(shown.error_map)}
                yield {head: _head(shown), **pictures}
            yield {status: f"{len(made.solvers)} solvers compared with seed {made.seed}."}

        def show_numbers(solver: str | None, count: int) -> dict[Any, Any]:
            from PIL import Image

            try:
                drawn = Image.open(BytesIO(numbers_picture(solver, int(count)))) if solver else None
            except (ValueError, OSError) as error:
                return {picture: None, said: f"{error}"}
            return {picture: drawn, said: ""}

        one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        parts = [part for cell in cells for part in cell]
        of_model = [solvers, prompt, guidance, call, artefact, status]
        given = [model, solvers, prompt, seed, steps, guidance, call, teacher_steps]
        gr.on([page.load, model.change], choose, [model], of_model, show_progress_on=[status], **one)
        gr.on([button.click, prompt.submit], compare, given, [*parts, status], show_progress_on=[status], **one)
        gr.on([artefact.change, steps.release], show_numbers, [artefact, steps], [picture, said], **one)
    return page


def launch(page: gr.Blocks, **options: Any) -> None:
    """Serve a page until it is interrupted; options as of ``gradio.Blocks.launch``."""
    page.launch(css=CSS, **options)


def _shows_errors(run: Callable[..., Any]) -> Any:
    """Errors that a user can mend are shown in the page; others keep their traceback in the log."""

    def shown(error: Exception) -> gr.Error:
        said = escape(" ".join(str(error).split()) or type(error).__name__)
        return gr.Error(said, duration=None, print_exception=False)

    expected = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)

    @wraps(run)
    def returned(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except expected as error:
            raise shown(error) from error

    @wraps(run)
    def yielded(*args: Any, **kwargs: Any) -> Any:
        try:
            yield from run(*args, **kwargs)
        except expected as error:
            raise shown(error) from error

    return yielded if inspect.isgeneratorfunction(run) else returned


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"The arguments {text!r} are not JSON ({error}). Example: {EXAMPLE}") from None
    if not isinstance(found, dict):
        raise ValueError(f"The arguments {text!r} must be a JSON object. Example: {EXAMPLE}")
    return found


def _whole(name: str, value: Any) -> int:
    if value is None or int(value) != value:
        raise ValueError(f"{name} must be a whole number; got {value!r}.")
    return int(value)


def _enlarged(image: Any) -> Any:
    """A PIL image of (1, 3, H, W), at least ``SMALLEST`` pixels wide; None of None."""
    from PIL import Image

    from ..evaluate.pictures import to_pil

    if image is None:
        return None
    (found,) = to_pil(image)
    factor = -(-SMALLEST // found.width)
    return found.resize((found.width * factor, found.height * factor), Image.Resampling.BICUBIC)


def _head(shown: Shown) -> str:
    """Name, cost and error of one result, in the solver's colour."""
    from ..plot import GREY, color

    own = "#000000" if shown.solver == "reference" else color(shown.solver) or GREY
    name = f'<p><b style="color: {own}">{escape(Path(shown.solver).name)}</b></p>'
    if shown.refused:
        return f"{name}<p>Does not fit: {escape(shown.refused)}</p>"
    facts = [f"{shown.nfe} evaluations, {shown.seconds:.2f} s"]
    facts += [] if shown.error is None else [f"error {shown.error:.4f}"]
    return name + "".join(f"<p>{fact}</p>" for fact in facts)
