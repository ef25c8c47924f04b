"""gunicorn's configuration: what the settings say, and the hooks that tie the pool to the arbiter.

Read at start and again at each HUP, both times inside the arbiter. Nothing here may import torch, start a thread or
wait: the arbiter forks the HTTP workers, and its loop looks after all of them.
"""

import logging
import os
import signal
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from gunicorn.errors import HaltServer  # noqa: E402

from config import logs  # noqa: E402
from config.checks import preflight  # noqa: E402
from config.runtime_dir import make_private  # noqa: E402
from config.settings import Settings, load  # noqa: E402
from config.sources import ConfigError  # noqa: E402
from workers.pool.keeper import PoolGaveUp, PoolKeeper  # noqa: E402

_log = logging.getLogger("tailrace.arbiter")

# Seconds that the pool and its model workers get to leave, after the HTTP workers.
_POOL_STOP_S = 10.0

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

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
    "watchdog_s",
    "max_replays",
    "cache_dir",
)


def _read_settings() -> Settings:
    """Return the settings, checked. Raises `ConfigError`."""
    settings = load()
    make_private(settings.runtime_dir)
    if not _launches_pool(settings):
        return settings  # model and GPU are the business of the pool's own unit; here they need not even be visible
    checked = preflight(settings)
    for notice in checked.notices:
        print(f"tailrace: {notice}", file=sys.stderr)
    return checked.settings


def _launches_pool(settings: Settings) -> bool:
    """Whether the arbiter starts a pool if none listens."""
    return bool(getattr(settings, "launch_pool", True))


try:
    _chosen = _read_settings()
except ConfigError as _error:
    for _problem in _error.problems:
        print(f"tailrace: error: {_problem}", file=sys.stderr)
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
limit_request_field_size = 16380
# The heartbeat's file: on a disk, a busy disk would look like a blocked worker.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
# HTTP/1.1 only: gunicorn serves the streams of one HTTP/2 connection one after another.
logconfig_dict = logs.gunicorn_config(_chosen.log_level)


# --- hooks ------------------------------------------------------------------------------------------------------------


def on_starting(server):  # type: ignore[no-untyped-def]
    """Start the pool and make looking after it part of the arbiter's loop."""
    # The pool stays where it is through every reload, also when a new port would mean a new default.
    os.environ["TAILRACE_RUNTIME_DIR"] = str(_chosen.runtime_dir)
    keeper = PoolKeeper(_chosen.pool_socket, logging.getLogger("tailrace.arbiter"), launch=_launches_pool(_chosen))
    server.tailrace_keeper = keeper
    server.tailrace_settings = _chosen

    def tended(original):  # type: ignore[no-untyped-def]
        def call() -> None:
            original()
            if server.LISTENERS:  # none: it is stopping, and the pool must not come back
                try:
                    keeper.tend()
                except PoolGaveUp as reason:
                    raise HaltServer(str(reason), 2) from None

        return call

    def checked(reload):  # type: ignore[no-untyped-def]
        def call() -> None:
            # gunicorn would leave a running service over a typo in a file, its workers orphaned.
            try:
                _read_settings()
            except ConfigError as error:
                for problem in error.problems:
                    _log.error("not reloaded: %s", problem)
            else:
                reload()

        return call

    def held_back(spawn):  # type: ignore[no-untyped-def]
        def call() -> int:
            # A signal that reaches a worker between its fork and its own handlers would go into its copy of the
            # arbiter's queue and be lost, and TERM would wait for the whole graceful timeout. `post_fork` lifts this.
            old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
            try:
                pid: int = spawn()
                return pid
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

        return call

    if Path(sys.argv[0]).name == "__main__.py":
        # Started as "python -m gunicorn": executed again as a plain file (USR2), the folder of gunicorn's modules would
        # come first in the path, and its "http" hide Python's own.
        server.START_CTX["args"] = [sys.executable, "-m", "gunicorn", *sys.argv[1:]]
    # manage_workers runs on each turn, at least once a second; reap_workers also in the long wait of a reload.
    server.manage_workers = tended(server.manage_workers)
    server.reap_workers = tended(server.reap_workers)
    server.reload = checked(server.reload)
    server.spawn_worker = held_back(server.spawn_worker)
    keeper.tend()


def on_reload(server):  # type: ignore[no-untyped-def]
    """Say what of the new settings is not in force yet."""
    old = server.tailrace_settings
    changed = [name for name in _NEEDS_RESTART if getattr(old, name) != getattr(_chosen, name)]
    if changed:
        _log.warning("changed, but in force only after a restart of the service: %s", ", ".join(changed))


def post_fork(server, worker):  # type: ignore[no-untyped-def]
    """In a new HTTP worker: let go of the lifeline, or the pool would not notice the arbiter's death."""
    server.tailrace_keeper.abandon()
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # until gunicorn sets the worker's own
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def pre_exec(server):  # type: ignore[no-untyped-def]
    """USR2, in the process that becomes the new arbiter: the pool, with the loaded model, goes over to it."""
    server.tailrace_keeper.hand_over(server.cfg.env_orig)


def on_exit(server):  # type: ignore[no-untyped-def]
    """The HTTP workers are gone: now the pool, unless a new arbiter has it."""
    if server.reexec_pid:
        server.tailrace_keeper.abandon()
    else:
        server.tailrace_keeper.stop(_POOL_STOP_S)
