"""The command line: one flag for each setting, with the demo's names."""

import argparse
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from config import __version__
from config.problems import PREFIX
from config.settings import GROUPS, ConfigError, Settings
from config.sources import nearest

_DESCRIPTION = "Serve a language model over an OpenAI-compatible HTTP API."
_EPILOG = """\
Each setting is also an environment variable (TAILRACE_PORT=8000) and a key of the TOML file (port = 8000).
First wins: command line, environment, PORT and WEB_CONCURRENCY, file, default. Dashes in flags are taken too.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Show a switch as the bare flag that it normally is."""
        return "" if action.nargs == "?" else super()._format_args(action, default_metavar)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return the flags that were given, by setting's name, each as text that a ``TAILRACE_`` variable can hold.

    Raises `ConfigError` for an unknown flag or a missing value; whether a value is a good one is for
    `config.settings.load` to say. Prints and exits 0 for ``--help`` and ``--version``.
    """
    parser = _parser()
    given, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if rest:
        flag = rest[0].partition("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unexpected argument {flag!r}: every setting is given as --name value")
        hint = nearest(flag.lstrip("-"), list(Settings.model_fields)).replace("mean ", "mean --")
        raise ConfigError(f"unknown flag {flag}{hint}")
    values = {}
    for name, value in vars(given).items():
        if value == "" or value == [""]:
            raise ConfigError(f"--{name}: expected a value that is not empty")
        if isinstance(value, list):
            # Numbers may be given as 0,1 and by repeating the flag; a name is taken as it is, commas included.
            value = ",".join(value) if name == "gpus" else json.dumps(value, ensure_ascii=False)
        values[name] = value
    return values


def as_environment(given: dict[str, str]) -> dict[str, str]:
    """Return the given flags as the environment variables that mean the same."""
    return {PREFIX + name.upper(): value for name, value in given.items()}


def _with_underscores(argument: str) -> str:
    """``--base-model=x-y`` is ``--base_model=x-y``."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m app",
        usage="python -m app [--base_model DIR_OR_GGUF] [FLAG [VALUE]]...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tailrace {__version__}")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for name, field in Settings.model_fields.items():
            if _extra(field)["group"] == group:
                _add(section, name, field)
    return parser


def _add(section: Any, name: str, field: FieldInfo) -> None:
    kind = _plain_type(field)
    options: dict[str, Any] = {"help": _help(field).replace("%", "%%"), "metavar": _metavar(kind, field)}
    if kind is bool:
        # A bare flag switches on; "--strict=false" overrules a variable or file that switched on.
        options.update(nargs="?", const="true", metavar=None)
    elif get_origin(kind) is list:
        options.update(action="append")
    section.add_argument("--" + name, **options)


def _plain_type(field: FieldInfo) -> Any:
    """The field's type without "or None"."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _metavar(kind: Any, field: FieldInfo) -> str | None:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return _extra(field)["metavar"] or {int: "N", float: "X"}.get(kind, "VALUE")


def _help(field: FieldInfo) -> str:
    """The description with unit and default behind it."""
    extra = _extra(field)
    default = extra["shown"] or field.default
    notes = [extra["unit"]] if extra["unit"] else []
    if default is not None and default is not False and default != "":
        notes.append(f"default: {default}")
    return f"{field.description} ({'; '.join(notes)})" if notes else str(field.description)


def _extra(field: FieldInfo) -> dict[str, str]:
    return typing.cast(dict[str, str], field.json_schema_extra)
