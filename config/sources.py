"""Where settings come from besides the command line and ``TAILRACE_`` variables."""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from config.problems import PREFIX, ConfigError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG_FILE = ROOT / "config" / "local.toml"


class _Layer(PydanticBaseSettingsSource):
    """A source that gives all its values at once."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("this source gives all its values at once")


class TomlFile(_Layer):
    """The values of the TOML file: flat keys, named as the flags are. Raises `ConfigError` if it cannot be used."""

    def __call__(self) -> dict[str, Any]:
        return self.read(self.current_state.get("config"))

    def read(self, chosen: str | Path | None) -> dict[str, Any]:
        """Return the values of ``chosen``, or of the file that is in force without a choice."""
        path = config_file(chosen)
        if path is None:
            return {}
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config: {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--config: {path}: {error}") from error
        known = [name for name in self.settings_cls.model_fields if name != "config"]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(*(f"{path}: unknown key {name!r}{nearest(name, known)}" for name in unknown))
        return values


class PlatformVariables(_Layer):
    """``PORT`` and ``WEB_CONCURRENCY``, as platforms that run a Procfile set them.

    A platform that gives a port sends its traffic from outside, so the service then listens on every address, unless
    the operator named one.
    """

    def __init__(self, settings_cls: type[BaseSettings], toml: TomlFile) -> None:
        super().__init__(settings_cls)
        self._toml = toml

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        state = self.current_state
        if os.environ.get("WEB_CONCURRENCY"):
            values["http_workers"] = os.environ["WEB_CONCURRENCY"]
        if os.environ.get("PORT") and "port" not in state:
            values["port"] = os.environ["PORT"]
            if "host" not in state and "host" not in self._toml.read(state.get("config")):
                values["host"] = "0.0.0.0"
        return values


def config_file(chosen: str | Path | None = None) -> Path | None:
    """Return the TOML file in force: the chosen one, TAILRACE_CONFIG, or config/local.toml if it exists."""
    named = chosen or os.environ.get(PREFIX + "CONFIG")
    if named:
        return Path(named).expanduser()
    return DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.is_file() else None


def nearest(name: str, known: list[str]) -> str:
    """Return " (did you mean X?)" for the known name most like ``name``, or ""."""
    match = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""
