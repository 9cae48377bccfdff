"""What a reader of the artefact sees: its model card, the plot of its numbers, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import for_every_count, provenances, steps_of, write_atomically
from ..text import markdown

_USE = """```python
from {library} import {pipeline}
{imports}

pipe = {load}
{swap}
result = pipe({arguments}num_inference_steps={steps})
```"""

_DIFFUSERS = {"library": "diffusers", "pipeline": "DiffusionPipeline"}


def _network(scheduler: Any) -> str:
    """What becomes of the network."""
    if not scheduler.time_lifts:
        return "The network is unchanged; only the solver is learned."
    lifted = ", ".join(map(str, sorted(scheduler.time_lifts)))
    return (
        f"For {lifted} steps it has a TimeLift: in a call of the pipeline the network's few parameters that tell its "
        "layers the time are moved at each step, and put back. All others are unchanged."
    )


def errors(scheduler: Any) -> list[dict[str, Any]]:
    """A row for each number of steps that was learned, or learned from: what a table of them shows."""
    made = {n: p for n, p in provenances(scheduler).items() if "held_out_error" in p}
    kinds = {"validation": "held_out_error", "test": "test_error"}
    shown = {name: kind for name, kind in kinds.items() if any(kind in p for p in made.values())}

    def error(p: Mapping[str, Any], kind: str, when: str) -> str:
        return f"{p[kind][when]:.5g}" if kind in p else ""

    return [
        {
            "steps": n,
            **{f"{name} error {w}": error(p, kind, w) for name, kind in shown.items() for w in ("before", "after")},
            "loss": p.get("loss", ""),
            "pairs": p.get("pairs", {}).get("train", ""),
        }
        for n, p in made.items()
    ]


def write_card(
    scheduler: Any,
    folder: Path,
    settings: Mapping[str, Any],
    example: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
) -> None:
    """README.md of an artefact: what it is for, how to use it, its numbers drawn, its errors, how it was made.

    Args:
        settings: of the run, or of its use alone: model, prompts, call, variants and push_to_hub.
        example: one sample's own arguments of the pipeline's call, shown in the usage.
        sources: artefacts that it was merged from, named in place of the settings.
    """
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    kind = type(scheduler).__name__
    made = provenances(scheduler)
    model, rows = str(settings["model"]), errors(scheduler)
    own = ({"prompt": "..."} if settings["prompts"] is not None else {}) if example is None else example
    arguments = {k: v if isinstance(v, str) else [v] for k, v in own.items()} | settings["call"]
    if variants := [*settings["variants"].values()]:
        arguments |= variants[len(variants) // 2]
    given = [f"{k}={v!r}, " for k, v in arguments.items()]
    steps = [*dict.fromkeys(map(steps_of, made))]
    where = settings["push_to_hub"] or folder.name
    use = {"imports": f"from dywspan import {kind}", "steps": steps[len(steps) // 2]}
    is_ours = any(p.get("pipeline") == "EDMPipeline" for p in made.values())  # diffusers finds its own classes only
    use |= {"library": "dywspan.edm", "pipeline": "EDMPipeline"} if is_ours else _DIFFUSERS
    use["load"] = f'{use["pipeline"]}.from_pretrained("{model}")' if model else "..."
    use["swap"] = f'pipe.scheduler = {kind}.from_pretrained("{where}")'
    if scheduler.time_lifts:
        use |= {"imports": "import dywspan", "swap": f'dywspan.apply(pipe, "{where}")'}
    elif any(
        getattr(f, "guidance_scale", None) is not None for f in (for_every_count(scheduler), scheduler.continuous)
    ):
        use |= {
            "imports": f"from dywspan import {kind}, bind",
            "load": f"bind({use['load']})  # tells the solver the guidance scale",
        }
    title = (Path(model).name if Path(model).exists() else model) or "a pipeline of one's own"
    counts = ", ".join(map(str, steps))
    if for_every_count(scheduler) is not None:
        counts += " and any other number of"
    text = [
        f"# Few-step solvers for {title}",
        f"Learned with dywspan (`pip install dywspan`): `{kind}` for {counts} steps. {_network(scheduler)}",
        _USE.format(**use, arguments="".join(given)),
        "Error of the endpoint to the teacher's, from the same noise. The best update was chosen by the validation "
        "error; pairs of a test error were used for nothing else:",
        markdown(rows) if rows else "",
    ]
    for n in steps:
        if (folder / f"samples-{n}.png").exists():
            text.append(f"![Teacher, base and learned solver at {n} steps](samples-{n}.png)")
    if scheduler.tables or scheduler.continuous is not None:
        from ..plot import plot_tables

        plot_tables(scheduler, folder / "solver.png")
        text.append("![The learned numbers](solver.png)")
    if sources:
        text.append(f"Merged from {', '.join(f'`{source}`' for source in sources)} by `dywspan merge`.")
    elif "output" in settings:
        shown = {k: v for k, v in settings.items() if v not in (None, [], {}) and k not in ("output", "cache")}
        text += [
            "<details><summary>Settings of the last run</summary>",
            f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```",
            "</details>",
        ]
    data = ModelCardData(library_name="diffusers", tags=["dywspan", "diffusers", "few-step"])
    if model and not Path(model).exists():
        data.base_model = model
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in text if part) + "\n")
    write_atomically(folder / "README.md", str(card).encode())
