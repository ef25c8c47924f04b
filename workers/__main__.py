"""``python -m workers``: the pool. The arbiter starts it with ``--lifeline``; an operator may start it alone."""

import argparse
import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from config import keys, logs, notify
from config.checks import preflight
from config.problems import ConfigError
from config.runtime_dir import make_private
from config.settings import load
from workers.entry import set_title
from workers.messages import LogAs, PoolStatus
from workers.pool import plan
from workers.pool.announcer import Announcer
from workers.pool.bulletin import Bulletin
from workers.pool.console import Console
from workers.pool.rendezvous import Rendezvous, Taken
from workers.pool.server import EXIT_FATAL, Pool

log = logs.logger("tailrace.pool")

# A hanging model worker is known as such for most of `watchdog_s`; then it is killed, collected and started again.
_WATCHDOG_MARGIN_S = 30.0
# What stopping takes beside the draining: the workers' return, and the kernel's work of giving memory back.
_STOP_MARGIN_S = 15.0


def main(arguments: Sequence[str] | None = None, *, engine: str | None = None) -> int:
    """Run the pool; return the process's exit code: 0 told to stop, 2 impossible as configured.

    The configuration comes from the environment and the TOML file, as the arbiter's does. ``engine`` replaces the
    model workers' engine in tests.
    """
    keys.forget(os.environ)
    notifier = notify.take(os.environ, os.getpid())
    parser = argparse.ArgumentParser(prog="python -m workers", description="Run Tailrace's pool of model workers.")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="socket whose end means stop (for the arbiter)")
    options = parser.parse_args(arguments)
    lifeline = None
    if options.lifeline is not None:
        lifeline = socket.socket(fileno=options.lifeline)
        os.set_inheritable(options.lifeline, False)
    if "gevent" in sys.modules:
        return _fail("the pool must not run under gevent: its patches break multiprocessing")
    faulthandler.enable()
    try:
        chosen = load()
        logs.configure(logs.LogSettings.of(chosen), "pool")
        checked = preflight(chosen, port=False)
        settings = checked.settings
        if lifeline is None:  # otherwise the arbiter has said it already
            for notice in checked.notices:
                log.warning("notice", text=notice)
        make_private(settings.runtime_dir)
        configs = plan.worker_configs(settings)
        if engine is not None:
            configs = [msgspec.structs.replace(config, engine=engine) for config in configs]
        rendezvous = Rendezvous(settings.pool_socket)
    except (ConfigError, Taken) as error:
        notifier.send(f"STATUS={error}")
        return _fail(str(error))
    set_title("tailrace: pool")
    url = f"http://{_reachable(settings.host)}:{settings.port}" if lifeline is not None else None
    bounds = plan.pool_options(settings)
    if lifeline is not None:
        tell = _to_arbiter(lifeline)
    else:
        announcer = Announcer(notifier, patience_s=settings.watchdog_s + _WATCHDOG_MARGIN_S)
        tell = _to_systemd(announcer, bounds.drain_s + _STOP_MARGIN_S)
    return Pool(
        configs, rendezvous, bounds, display=Console(url), lifeline=lifeline, tell=tell, reload=_log_again
    ).run()


def _log_again() -> LogAs | None:
    """HUP: read the log's level and form anew; returns them for the model workers."""
    try:
        chosen = load()
    except ConfigError as error:
        for problem in error.problems:
            log.error("not reloaded", problem=problem)
        return None
    logs.change(chosen.log_level, chosen.log_format)
    log.info("reloaded", log_level=chosen.log_level, log_format=chosen.log_format)
    return LogAs(level=chosen.log_level, form=chosen.log_format)


def _to_arbiter(lifeline: socket.socket) -> Callable[[PoolStatus], None]:
    """For a pool of the arbiter's, which speaks for both. A word that it does not come to read is lost: more come."""

    def tell(status: PoolStatus) -> None:
        with contextlib.suppress(OSError):
            lifeline.send(Bulletin.of(status).line(), socket.MSG_DONTWAIT)

    return tell


def _to_systemd(announcer: Announcer, stop_s: float) -> Callable[[PoolStatus], None]:
    """For a pool that is a unit of its own."""
    stopping = False

    def tell(status: PoolStatus) -> None:
        nonlocal stopping
        bulletin = Bulletin.of(status)
        if status.draining and not stopping:
            stopping = True
            announcer.stopping(stop_s, bulletin.text)
        else:
            announcer.tell(bulletin)

    return tell


def _reachable(host: str) -> str:
    """The host as a person on this machine would type it."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _fail(message: str) -> int:
    logs.complain(message.splitlines())
    return EXIT_FATAL


if __name__ == "__main__":
    sys.exit(main())
