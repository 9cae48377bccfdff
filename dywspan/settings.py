"""Settings as one flat data class: read from a YAML file, the command line, or Python, and checked by their types."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field with its line of help; lists and mappings get a copy each."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def check_types(config: Any) -> None:
    """Settings are what their annotations say.

    Raises:
        ValueError: one is not.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value: Any = getattr(config, f.name)
        hint = hints[f.name]
        if not _fits(value, hint):
            raise ValueError(f"{f.name}={value!r} must be {_name(hint)}: {f.metadata['help']}.")
        if isinstance(value, int) and float in _options(hint):  # 4 and 4.0 make the same run
            object.__setattr__(config, f.name, float(value))


def check_sampling(config: Any) -> None:
    """Two settings that all who sample have; ``guidance_scale`` becomes the argument of the call it is short for.

    Raises:
        ValueError: ``latent_size`` is not a height and a width.
    """
    if config.latent_size is not None and len(config.latent_size) != 2:
        raise ValueError(f"latent_size={config.latent_size} must be height and width of the latent, in this order.")
    if config.guidance_scale is not None:
        object.__setattr__(config, "call", {**config.call, "guidance_scale": config.guidance_scale})
        object.__setattr__(config, "guidance_scale", None)


def read_config(path: str | Path, kind: type) -> dict[str, Any]:
    """The settings in a YAML file, of the class ``kind``.

    Raises:
        ValueError: not a mapping, or a key that does not exist; names the nearest one that does.
    """
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must hold settings, one 'name: value' on each line; it holds {data!r}.")
    known = [f.name for f in fields(kind)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            raise ValueError(f"{path}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    return dict(data)


def _loader() -> Any:
    """Safe, with YAML 1.2's numbers and truth values: 1e-3 is a number and "no" a text, unlike in PyYAML's 1.1."""
    import yaml

    loader, number, truth = type("Loader", (yaml.SafeLoader,), {}), "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (number, truth)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    decimal = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    loader.add_implicit_resolver(number, decimal, list("-+.0123456789"))
    loader.add_implicit_resolver(truth, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    return loader


def make_config(settings: Mapping[str, Any], kind: type[T]) -> T:
    """A configuration from a YAML file named by ``config``, overridden by the other settings."""
    given = dict(settings)
    path = given.pop("config", None)
    base = read_config(path, kind) if path else {}
    if isinstance(call := given.get("call"), Mapping) and "guidance_scale" in call:
        base.pop("guidance_scale", None)  # short for the same
    return kind(**{**base, **given})


Groups = Mapping[str, tuple[str, str]]  # by title: names of settings that --help shows, and of rare ones


def add_arguments(
    parser: argparse.ArgumentParser,
    kind: type,
    groups: Groups,
    but: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """One option for each setting, ``but`` some; those not given leave the file's value, or the default.

    Args:
        defaults: by setting, the defaults to show that are not those of ``kind``.
        groups: in the order of the help; ``--help-advanced`` shows the rare ones, and those in no group, as well.
    """
    known, hints = {f.name: f for f in fields(kind) if f.name not in but}, get_type_hints(kind)
    advanced: Any = parser.add_argument("--help-advanced", action=_HelpAdvanced)
    if "config" not in but:
        text = "YAML file of settings; options override its values"
        parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help=text)
    split = {title: (common.split(), rare.split()) for title, (common, rare) in groups.items()}
    split["other"] = [], sorted(known.keys() - {name for names in split.values() for part in names for name in part})
    for title, (common, rare) in split.items():
        group = parser.add_argument_group(title)
        for f in (known[name] for name in [*common, *rare] if name not in but):
            own = {
                "default": argparse.SUPPRESS,
                "help": _described(f, (defaults or {}).get(f.name)),
                **_argument(hints[f.name]),
            }
            if "type" in own:
                own.setdefault("metavar", f.name.rpartition("_")[2].upper())
            added = group.add_argument("--" + f.name.replace("_", "-"), **own)
            if f.name in rare:
                advanced.hide(added)


def _described(field: dataclasses.Field[Any], default: Any = None) -> str:
    """A setting's line of help, with ``default``, or else its own, if that says something."""
    if default is None:
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    shown = " ".join(map(str, default)) if isinstance(default, list) else f"{default}"
    says_nothing = default is None or default is False or shown in ("", "{}")
    return (field.metadata["help"] + ("" if says_nothing else f" (default: {shown})")).replace("%", "%%")


class _HelpAdvanced(argparse.Action):
    """Prints the help with the options that it has hidden."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        text = "show this help message with all options and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=text)
        self.hidden: list[tuple[argparse.Action, str | None]] = []

    def hide(self, action: argparse.Action) -> None:
        self.hidden.append((action, action.help))
        action.help = argparse.SUPPRESS

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action, text in self.hidden:
            action.help = text
        parser.print_help()
        parser.exit()


def help_of(config: Any, name: str) -> str:
    """The line of help of one setting."""
    return next(f.metadata["help"] for f in fields(config) if f.name == name)


_METAVARS = {int: "N", float: "X"}


def _argument(hint: Any) -> dict[str, Any]:
    """What argparse needs for a type."""
    options = [a for a in _options(hint) if a is not type(None)]
    first = options[0]
    if first is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(first) is list:
        return {"nargs": "+", **_argument(get_args(first)[0])}
    if get_origin(first) is dict:
        return {"type": _json, "metavar": "JSON"}
    if get_origin(first) is Literal:
        return {"choices": get_args(first)}
    return {} if first is Any else {"type": first, **({"metavar": _METAVARS[first]} if first in _METAVARS else {})}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); e.g. '{{\"height\": 64}}'") from None


def _options(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for kind in _options(hint):
        origin = get_origin(kind)
        if (
            kind is Any
            or (origin is Literal and value in get_args(kind))
            or (origin is list and isinstance(value, list) and all(_fits(v, get_args(kind)[0]) for v in value))
            or (origin is dict and isinstance(value, dict))
            or (kind is float and isinstance(value, (int, float)) and not isinstance(value, bool))
            or (origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
        ):
            return True
    return False


def _name(hint: Any) -> str:
    return " or ".join(
        " or ".join(map(repr, get_args(k))) if get_origin(k) is Literal else "null" if k is type(None) else
        getattr(k, "__name__", str(k)) if get_origin(k) is None else str(k)
        for k in _options(hint)
    )  # fmt: skip
