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
        raise ValueError(f"{path} must hold settings, one 'name: value' a line; it holds {data!r}.")
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


def add_arguments(parser: argparse.ArgumentParser, kind: type, but: Sequence[str] = ()) -> None:
    """One option for each setting, ``but`` some; those not given leave the file's value, or the default."""
    if "config" not in but:
        parser.add_argument("--config", default=argparse.SUPPRESS, help="YAML file of settings; options override it")
    hints = get_type_hints(kind)
    for f in (f for f in fields(kind) if f.name not in but):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        shown = "" if default in (None, "", [], {}) else f" (default: {default})"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **_argument(hints[f.name])
        )


def help_of(config: Any, name: str) -> str:
    """The line of help of one setting."""
    return next(f.metadata["help"] for f in fields(config) if f.name == name)


def _argument(hint: Any) -> dict[str, Any]:
    """What argparse needs for a type."""
    options = [a for a in _options(hint) if a is not type(None)]
    first = options[0]
    if first is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(first) is list:
        return {"nargs": "+", "type": get_args(first)[0]}
    if get_origin(first) is dict:
        return {"type": _json, "metavar": "JSON"}
    if get_origin(first) is Literal:
        return {"choices": get_args(first)}
    return {} if first is Any else {"type": first}


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
