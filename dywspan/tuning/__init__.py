"""A solver for a pipeline as it is used, learned on the spot, see :func:`tune`."""

from __future__ import annotations

from typing import Any


def tune(pipe: Any, steps: int | list[int] = 4, prompts: Any = None, **settings: Any) -> Any:
    """Find the best classical solver for a pipeline, learn a better one from it, and put the better of both in.

        dywspan.tune(pipe, steps=4, prompts="prompts.txt")
        pipe("a red apple", num_inference_steps=4)

    It takes about as long as a few pictures of 50 steps. Nothing but forward passes is needed, so that the pipeline may
    be quantised, compiled or offloaded, have a LoRA, or be modular. It is tuned as it is called: give the guidance
    scale, height and width that it will be used with.

    Source: DyWeight (arXiv 2603.11607) for the solver; it is learned by least squares, without gradients.

    Args:
        pipe: a diffusers pipeline.
        steps: number of steps, or several.
        prompts: a file, a dataset or a list; those in this package where none are given and the pipeline needs some.
        settings: of :class:`dywspan.tuning.config.TuneConfig`: ``call={"height": 512}``, ``guidance_scale=3.5``,
            ``evaluations``, ``output="solvers"``, ...

    Returns:
        The ``DyWeightScheduler`` that is now in the pipeline, with a table for each number of steps. A table's
        provenance says whether it was learned, and the errors on samples that nothing was learned from.

    Raises:
        ValueError, OSError: settings that cannot work, prompts that cannot be read, an output that cannot be written.
        FloatingPointError: the pipeline's samples are not finite.
    """
    from ..schedulers.apply import Applied
    from .config import TuneConfig
    from .course import tuning
    from .report import said, save

    config = TuneConfig(steps=[steps] if isinstance(steps, int) else list(steps), prompts=prompts, **settings)
    with tuning(pipe, config) as course:
        outcomes = course.run()
        scheduler = course.own.with_tables([own.table for own in outcomes])
        if config.output is not None:
            save(scheduler, course, outcomes, str(getattr(pipe, "name_or_path", "") or ""))
    print(said(outcomes))
    return Applied(pipe, scheduler).scheduler
