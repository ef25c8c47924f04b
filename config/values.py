"""The kinds of values that settings have beyond text and numbers: how they are written, and which are refused."""

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from config import keys

_HOST_NAME = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@,]+")


def adapter_of(text: str) -> tuple[str, str]:
    """Split NAME=DIR; the name is "" for a plain DIR. A "=" behind a slash belongs to the directory."""
    name, equals, source = text.partition("=")
    return (name, source) if equals and name and "/" not in name else ("", text)


def _split(value: Any) -> Any:
    """Accept a real list, a JSON list, or text with commas ("0,1")."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"is no JSON list: {error}") from error
    return [item.strip() for item in value.split(",") if item.strip()]


def _distinct_gpus(value: list[int]) -> list[int]:
    if min(value) < 0:
        raise ValueError("GPU numbers start at 0")
    if len(set(value)) != len(value):
        raise ValueError("names a GPU twice")
    return value


def _distinct_adapters(value: list[str]) -> list[str]:
    named = [adapter_of(each) for each in value]
    for (name, source), given in zip(named, value, strict=True):
        if not source:
            raise ValueError(f"{given!r} names no directory")
        if name != name.strip() or not name.isprintable():
            raise ValueError(f"{name!r} is no name for an adapter")
    names = [name for name, _ in named]
    if names.count("") > 1:
        raise ValueError("only one adapter can be merged; give the others a name (NAME=DIR)")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two adapters are named {twice!r}")
    return value


def _sealed(value: list[str]) -> list[str]:
    """Only digests are kept."""
    parsed = [keys.parse_flag(each) for each in value]
    keys.check_keys(parsed)
    return [key.sealed() for key in parsed]


def _networks(value: list[str]) -> list[str]:
    for each in value:
        try:
            ipaddress.ip_network(each)
        except ValueError as error:
            raise ValueError(f"{each!r} is no address or network") from error
    return value


def _host_names(value: list[str]) -> list[str]:
    for each in value:
        if each != "*" and not _HOST_NAME.fullmatch(each):
            raise ValueError(f"{each!r} is no host name")
    return [each.lower() for each in value]


def _origins(value: list[str]) -> list[str]:
    for each in value:
        if each != "*" and not _ORIGIN.fullmatch(each):
            raise ValueError(f"{each!r} is no origin, as https://app.example.org is one")
    return value


def _absolute(value: Path | None) -> Path | None:
    """Independent of the working directory of the process that reads it."""
    return None if value is None else Path(os.path.abspath(value.expanduser()))


Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Gpus = Annotated[list[int], NoDecode, Field(min_length=1), BeforeValidator(_split), AfterValidator(_distinct_gpus)]
Adapters = Annotated[Texts, AfterValidator(_distinct_adapters)]
SealedKeys = Annotated[Texts, AfterValidator(_sealed)]
Networks = Annotated[Texts, AfterValidator(_networks)]
HostNames = Annotated[Texts, AfterValidator(_host_names)]
Origins = Annotated[Texts, AfterValidator(_origins)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
AbsolutePathOrNone = Annotated[Path | None, AfterValidator(_absolute)]
