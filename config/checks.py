"""What is looked at before anything is loaded, so that a mistake ends in one clear line instead of a traceback.

No torch here: these checks run in the arbiter, where an import of torch would be inherited by every HTTP worker.
"""

import errno
import importlib.util
import os
import socket
from dataclasses import dataclass, field
from functools import cache

from config import gpus, keys
from config.model_checks import check_model
from config.settings import ConfigError, Settings, unknown_variables

_free_addresses: set[tuple[str, int]] = set()


@dataclass(frozen=True)
class Preflight:
    """``settings`` to run with (on the CPU if there is no GPU), and lines that the operator should see."""

    settings: Settings
    notices: list[str] = field(default_factory=list)


def preflight(settings: Settings, *, port: bool = True, model: bool = True) -> Preflight:
    """Check all that can be checked without loading. Raises `ConfigError` with a line for each problem.

    ``port`` False leaves out the checks of the listening address and of keys, for a process that does not listen. The
    address is left out too if it was found free before in this process (a reload, where we hold it ourselves), and for
    sockets that were handed over by a parent. ``model`` False leaves out model and devices, for the HTTP side of a
    pool that is a service of its own.
    """
    problems: list[str] = []
    notices = unknown_variables()
    if model:
        if settings.load_in_8bit and settings.load_in_4bit:
            problems.append("--load_in_8bit, --load_in_4bit: choose one of them")
        try:
            settings = with_devices(settings, notices)
        except ConfigError as error:
            problems += error.problems
        problems += _check_packages(settings)
        problems += check_model(settings)
    if port:
        problems += _check_address(settings.host, settings.port)
        problems += _check_access(settings, notices)
    if problems:
        raise ConfigError(*problems)
    return Preflight(settings, notices)


def with_devices(settings: Settings, notices: list[str] | None = None) -> Settings:
    """Return the settings with ``only_cpu`` set if GPUs were not asked for and there is none to use.

    Raises `ConfigError` for a GPU that was asked for and is not there. A line for the operator is added to ``notices``.
    """
    if settings.only_cpu:
        return settings
    found, offered = _gpus_found()
    asked = "gpus" in settings.model_fields_set
    if found:
        missing = [number for number in settings.gpus if number >= found]
        if missing and (asked or settings.gpus != [0]):
            names = f"0 to {found - 1}" if found > 1 else "only GPU 0"
            raise ConfigError(f"--gpus: there is no GPU {missing[0]} on this machine ({names})")
        return settings
    reason = "the installed torch is built without CUDA" if offered else "this machine has no usable NVIDIA GPU"
    if asked:
        raise ConfigError(f"--gpus: there is no GPU {settings.gpus[0]}: {reason}; use --only_cpu for the CPU")
    if notices is not None:
        notices.append(f"{reason}: running on the CPU")
    return settings.model_copy(update={"only_cpu": True})


@cache
def _gpus_found() -> tuple[int, int]:
    """Return how many GPUs can be used, and how many the driver offers.

    Asked once in a process: at a reload a driver that hangs would hold up the arbiter, and which devices the model
    workers have was decided at the start.
    """
    found = gpus.count()
    return found, found or gpus.present()


def _check_packages(settings: Settings) -> list[str]:
    problems = []
    if settings.use_flash_attention_2:
        if settings.only_cpu:
            problems.append("--use_flash_attention_2: flash-attn works on a GPU only")
        elif importlib.util.find_spec("flash_attn") is None:
            problems.append("--use_flash_attention_2: flash-attn is not installed (see requirements-gpu.txt)")
    if settings.quantization and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"--load_in_{settings.quantization}: bitsandbytes is not installed")
    return problems


def _check_access(settings: Settings, notices: list[str]) -> list[str]:
    """Whether the keys can be used, and what is worth a warning of who can come in."""
    limited = settings.key_max_concurrent or settings.key_requests_per_minute or settings.key_tokens_per_minute
    if not settings.has_keys:
        if not settings.on_loopback:
            notices.append(f"no --api_key: whoever can reach {settings.bind} may use this server")
        if limited:
            notices.append("limits for each key have no effect without keys")
    if settings.api_key_file is None:
        return []
    try:
        notices += keys.check_file(settings.api_key_file)
    except ConfigError as error:
        return error.problems
    return []


def _sockets_handed_over() -> bool:
    """Whether listening sockets come from an older gunicorn (USR2) or from systemd."""
    environ = os.environ
    return bool(environ.get("GUNICORN_FD")) or environ.get("LISTEN_PID") == str(os.getpid())


def _check_address(host: str, port: int) -> list[str]:
    """Try to bind host and port, as gunicorn is going to."""
    if (host, port) in _free_addresses or _sockets_handed_over():
        return []
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        return [f"--host: {host!r} is no address or name that can be resolved"]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return [f"--port: {port} on {host} is in use by another process"]
        if error.errno == errno.EADDRNOTAVAIL:
            return [f"--host: {host} is no address of this machine"]
        if error.errno in (errno.EACCES, errno.EPERM):
            return [f"--port: no permission to listen on {port}"]
        return [f"--host, --port: cannot listen on {host} port {port}: {error.strerror}"]
    _free_addresses.add((host, port))
    return []
