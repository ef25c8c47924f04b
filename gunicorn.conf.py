"""gunicorn's configuration: what the settings say, and the hooks that tie the pool to the arbiter.

Read at start and again at each HUP, both times inside the arbiter. Nothing here may import torch, start a thread or
wait: the arbiter forks the HTTP workers, and its loop looks after all of them.
"""

import gc
import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from gunicorn.errors import HaltServer  # noqa: E402
from setproctitle import getproctitle, setproctitle  # noqa: E402

from config import allocator, keys, logs, notify  # noqa: E402
from config.arbiter import SteeredArbiter  # noqa: E402
from config.checks import preflight  # noqa: E402
from config.problems import ConfigError  # noqa: E402
from config.runtime_dir import make_private  # noqa: E402
from config.settings import Settings, load  # noqa: E402
from workers.pool.keeper import PoolGaveUp, PoolKeeper  # noqa: E402
from workers.pool.spokesman import Spokesman  # noqa: E402

_log = logs.logger("tailrace.arbiter")

# Seconds that the pool and its model workers get to leave, after the HTTP workers.
_POOL_STOP_S = 10.0
# What systemd allows beyond what we allow ourselves.
_STOP_MARGIN_S = 10.0
_WATCHDOG_MARGIN_S = 30.0

# What a running model worker cannot be told: a change waits for a restart of the pool.
_NEEDS_RESTART = (
    "base_model",
    "lora_model",
    "tokenizer_path",
    "served_model_name",
    "max_model_len",
    "dtype",
    "load_in_8bit",
    "load_in_4bit",
    "only_cpu",
    "gpus",
    "use_flash_attention_2",
    "kv_cache_gib",
    "cpu_threads",
    "max_batch",
    "prefill_chunk",
    "max_queue",
    "max_queue_tokens",
    "queue_timeout_s",
    "watchdog_s",
    "max_replays",
    "resume_window_s",
    "cache_dir",
)


def _read_settings() -> Settings:
    """Return the settings, checked. Raises `ConfigError`."""
    settings = load()
    make_private(settings.runtime_dir)
    # With a pool of its own, model and GPU are that unit's business; here they need not even be visible.
    checked = preflight(settings, model=_launches_pool(settings))
    logs.complain(checked.notices, "warning", settings.log_format)
    return checked.settings


def _launches_pool(settings: Settings) -> bool:
    """Whether the arbiter starts a pool if none listens."""
    return bool(getattr(settings, "launch_pool", True))


# gunicorn would say READY=1 before anything is loaded. (Nothing is found any more when this is read again.)
_notifier = notify.take(os.environ, os.getpid())

if keys.seal(os.environ):
    # The variables that this process was started with stand beside its arguments; a new title goes over both.
    setproctitle(getproctitle())

try:
    _chosen = _read_settings()
except ConfigError as _error:
    logs.complain(_error.problems)
    _notifier.send(f"STATUS={'; '.join(_error.problems)}")
    sys.exit(2)

# --- what gunicorn is told --------------------------------------------------------------------------------------------

wsgi_app = "app:create_app()"
proc_name = "tailrace"
bind = _chosen.bind
workers = _chosen.http_workers
worker_class = "config.http_worker.HttpWorker"
# Idle connections count too, and the proxy keeps some.
worker_connections = 2000
# A heartbeat each second: only a blocked loop gets here, never a long stream. It costs every stream of its worker, so
# an occurrence is a fault of ours, but a worker that never wakes again has to go.
timeout = 60
graceful_timeout = _chosen.graceful_timeout_s
# More than the proxy's own idle time, or it sends a request into a connection that is just being closed.
keepalive = _chosen.http_keepalive_s
# A recycled HTTP worker would be an outage for whoever waits for its streams; nothing leaks that would need it.
max_requests = 0
# The default path is shared by all instances of a user: the second one would take it from the first.
control_socket_disable = True
# Not inherited by fork: locks made before gevent patches would stay unpatched.
preload_app = False
limit_request_field_size = 8190
# Nothing is decided by what a proxy says of scheme and path; whose address it tells is the door's business.
forwarded_allow_ips = ""
forwarder_headers = ""
# The heartbeat's file: on a disk, a busy disk would look like a blocked worker.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
# HTTP/1.1 only: gunicorn serves the streams of one HTTP/2 connection one after another.
logconfig_dict = logs.gunicorn_config(logs.LogSettings.of(_chosen))


# --- hooks ------------------------------------------------------------------------------------------------------------


def on_starting(server):  # type: ignore[no-untyped-def]
    """Steer the arbiter, start the pool and make looking after it part of the arbiter's loop."""
    # The pool stays where it is through every reload, also when a new port would mean a new default.
    os.environ["TAILRACE_RUNTIME_DIR"] = str(_chosen.runtime_dir)
    keeper = PoolKeeper(_chosen.pool_socket, _log, launch=_launches_pool(_chosen))
    server.tailrace_keeper = keeper
    logs.take_over()
    server.tailrace_settings = _chosen

    def tend() -> None:
        try:
            keeper.tend()
        except PoolGaveUp as reason:
            raise HaltServer(str(reason), reason.code) from None

    if Path(sys.argv[0]).name == "__main__.py":
        # Started as "python -m gunicorn": executed again as a plain file (USR2), the folder of gunicorn's modules would
        # come first in the path, and its "http" hide Python's own.
        server.START_CTX["args"] = [sys.executable, "-m", "gunicorn", *sys.argv[1:]]
    SteeredArbiter.take_over(server, tend=tend, may_reload=_may_reload)
    server.tailrace_spokesman = Spokesman(
        server,
        keeper,
        _notifier,
        launches=_launches_pool(_chosen),
        patience_s=_chosen.watchdog_s + _WATCHDOG_MARGIN_S,
        stop_s=_POOL_STOP_S + _STOP_MARGIN_S,
    )
    keeper.tend()


def _may_reload() -> bool:
    """Whether the settings are right; what is wrong with them is logged."""
    try:
        _read_settings()
    except ConfigError as error:
        for problem in error.problems:
            _log.error("not reloaded", problem=problem)
        return False
    return True


def on_reload(server):  # type: ignore[no-untyped-def]
    """Let the pool log as chosen now; say what of the new settings is not in force yet."""
    server.tailrace_keeper.reload()
    old = server.tailrace_settings
    changed = [name for name in _NEEDS_RESTART if getattr(old, name) != getattr(_chosen, name)]
    if changed:
        _log.warning("changed, but in force only after a restart of the service", settings=changed)


def post_fork(server, worker):  # type: ignore[no-untyped-def]
    """In a new HTTP worker: let go of the lifeline, or the pool would not notice the arbiter's death."""
    logs.rename("http")
    allocator.give_back_what_is_large()
    server.tailrace_keeper.abandon()
    server.begin_worker(worker)
    worker.receive_timeout_s = _chosen.receive_timeout_s


def post_worker_init(worker):  # type: ignore[no-untyped-def]
    """The application is loaded, and stays as long as the process: the collector need not walk through it again.

    A full collection took 40 ms, in which no stream of the worker moved.
    """
    gc.collect()
    gc.freeze()


def pre_exec(server):  # type: ignore[no-untyped-def]
    """USR2, in the process that becomes the new arbiter: the pool, with the loaded model, goes over to it."""
    server.tailrace_keeper.hand_over(server.cfg.env_orig)
    keys.seal(server.cfg.env_orig)
    server.tailrace_spokesman.hand_over(server.cfg.env_orig, os.getpid())


def on_exit(server):  # type: ignore[no-untyped-def]
    """The HTTP workers are gone: now the pool, unless a new arbiter has it."""
    if server.reexec_pid:
        server.tailrace_spokesman.succeeded_by(server.reexec_pid)
        server.tailrace_keeper.abandon()
    else:
        server.tailrace_keeper.stop(_POOL_STOP_S)
