"""``python -m workers``: the pool. The arbiter starts it with ``--lifeline``; an operator may start it alone."""

import argparse
import faulthandler
import logging
import os
import socket
import sys
from collections.abc import Sequence

import msgspec

from config import logs
from config.checks import preflight
from config.runtime_dir import make_private
from config.settings import load
from config.sources import ConfigError
from workers.pool import plan
from workers.pool.console import Console
from workers.pool.rendezvous import Rendezvous, Taken
from workers.pool.server import EXIT_FATAL, Pool

log = logging.getLogger("tailrace.pool")


def main(arguments: Sequence[str] | None = None, *, engine: str | None = None) -> int:
    """Run the pool; return the process's exit code: 0 told to stop, 2 impossible as configured.

    The configuration comes from the environment and the TOML file, as the arbiter's does. ``engine`` replaces the
    model workers' engine in tests.
    """
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
        logs.configure(chosen.log_level, "pool")
        checked = preflight(chosen, port=False)
        settings = checked.settings
        if lifeline is None:  # otherwise the arbiter has said it already
            for notice in checked.notices:
                log.warning("%s", notice)
        make_private(settings.runtime_dir)
        configs = plan.worker_configs(settings)
        if engine is not None:
            configs = [msgspec.structs.replace(config, engine=engine) for config in configs]
        rendezvous = Rendezvous(settings.pool_socket)
    except (ConfigError, Taken) as error:
        return _fail(str(error))
    _set_title("tailrace: pool")
    url = f"http://{_reachable(settings.host)}:{settings.port}" if lifeline is not None else None
    pool = Pool(configs, rendezvous, plan.pool_options(settings), display=Console(url), lifeline=lifeline)
    return pool.run()


def _reachable(host: str) -> str:
    """The host as a person on this machine would type it."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _fail(message: str) -> int:
    for line in message.splitlines():
        print(f"tailrace: error: {line}", file=sys.stderr)
    return EXIT_FATAL


def _set_title(title: str) -> None:
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(title)


if __name__ == "__main__":
    sys.exit(main())
