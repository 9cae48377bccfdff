"""Command line: ``dywspan demo | tune | distill | inspect | ...``, see :data:`dywspan.commands.COMMANDS`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .commands import COMMANDS, Command
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend end in one line, not in a traceback."""
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")  # diffusers', of every download
    try:
        args = make_parser().parse_args(argv)
        for name in vars(args).pop("modules"):
            _import(name)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("dywspan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `dywspan ... | head`; what is left to write would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, (ImportError, ValueError, OSError, FloatingPointError, *_out_of_memory())):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and "pip install" not in said:
            said += ". This command needs more packages: pip install 'dywspan[train,eval]'; `dywspan doctor` lists them"
        print(f"dywspan: {said}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command's own options are imported when it is chosen."""
    parser = _Parser("dywspan", description="Learned few-step solvers for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"dywspan {__version__}")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python file or module to import first, e.g. with the model's own classes; repeat for several",
    )
    _add(parser, COMMANDS)
    return parser


def _import(name: str) -> None:
    """A module, by its name or its file: diffusers loads a saved pipeline's own classes only where they are imported.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name)
    if path.suffix == ".py":
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise FileNotFoundError(f"--import {path}: no such module. Name a .py file, or install the module.") from None


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something, lists as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in ([], {}):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A parser that gets its command's options when it is to parse."""

    options: str | Mapping[str, Command] = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        options, self.options = self.options, ""
        if isinstance(options, Mapping):
            _add(self, options)
        elif options:
            module, function = options.split(":")
            getattr(import_module(f"dywspan.commands.{module}"), function)(self)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, and not by the parser of all commands, which does not know the options
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, unknown


def _add(parser: argparse.ArgumentParser, commands: Mapping[str, Command]) -> None:
    among = parser.add_subparsers(required=True, title="commands", metavar="command", parser_class=_Parser)
    for name, command in commands.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        sub = among.add_parser(name, help=command.help, description=description, formatter_class=_Formatter)
        sub.options = command.options


def _out_of_memory() -> list[type[Exception]]:
    """torch's error, if anything has imported torch."""
    torch = sys.modules.get("torch")
    return [torch.OutOfMemoryError] if torch is not None else []


if __name__ == "__main__":
    sys.exit(main())
