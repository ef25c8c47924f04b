"""The project's gunicorn.conf.py, to the letter, but for the program that the keeper starts as the pool."""

import contextlib
import os
import sys
from pathlib import Path

if os.environ.get("NO_NAMES"):
    # Before gevent has looked.
    import _socket

    _look_up = _socket.getaddrinfo

    def _numbers_only(host, *arguments, **named):  # type: ignore[no-untyped-def]
        if host not in ("127.0.0.1", None):
            print(f"names are out of order: {host}", file=sys.stderr)
            raise _socket.gaierror(_socket.EAI_AGAIN, "Temporary failure in name resolution")
        return _look_up(host, *arguments, **named)

    _socket.getaddrinfo = _numbers_only
    with contextlib.suppress(OSError):
        __import__("socket").getaddrinfo("localhost", 80)

__file__ = str(Path(__file__).resolve().parents[2] / "gunicorn.conf.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))

from workers.pool import keeper  # noqa: E402

keeper.POOL_COMMAND = [sys.executable, "-P", "-m", "tests.faults.chosen_pool"]
