"""``dywspan app``."""

from __future__ import annotations

import argparse

# What `dywspan app --help` shows, and then what --help-advanced adds.
APP = {
    "what the page shows first": ("model solvers prompt seed steps guidance_scale", "call teacher_steps"),
    "time and memory": ("dtype", ""),
}


def app_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan app``."""
    from ..app.config import CompareConfig
    from ..settings import add_arguments

    parser.set_defaults(run=app)
    add_arguments(parser, CompareConfig, APP, but=("config",))
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    group.add_argument("--port", type=int, help="default: the first free one from 7860")
    group.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")


def app(args: argparse.Namespace) -> None:
    """Serve the compare app until it is interrupted."""
    from ..app.config import CompareConfig
    from ..app.page import launch, make_page

    given = {k: v for k, v in vars(args).items() if k not in ("run", "host", "port", "no_browser")}
    page = make_page(CompareConfig(**given))
    launch(page, server_name=args.host, server_port=args.port, inbrowser=not args.no_browser)
