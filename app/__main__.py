"""``python -m app``: check what was asked for, then become gunicorn.

Everything given on the command line is handed on as environment variables, so that this way of starting and
``gunicorn -c gunicorn.conf.py`` are the same thing, and a reload reads the same values again.
"""

import os
import sys
from typing import NoReturn

from setproctitle import setproctitle

from config import cli, keys, logs, settings
from config.checks import preflight
from config.problems import ConfigError
from config.runtime_dir import make_private
from config.sources import ROOT


def main() -> NoReturn:
    """Start the service in this process's place; exit 2 with one line for each problem."""
    # Other users can read a process's arguments, and these may hold a key.
    setproctitle("tailrace: starting")
    try:
        given = cli.parse(sys.argv[1:])
        chosen = settings.load(given)
        make_private(preflight(chosen, model=chosen.launch_pool).settings.runtime_dir)
    except ConfigError as error:
        logs.complain(error.problems)
        sys.exit(2)
    os.environ.update(cli.as_environment(given))
    keys.seal(os.environ)
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "app:create_app()"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
