"""The project's gunicorn.conf.py, to the letter, but for the program that the keeper starts as the pool."""

import sys
from pathlib import Path

__file__ = str(Path(__file__).resolve().parents[2] / "gunicorn.conf.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))

from workers.pool import keeper  # noqa: E402

keeper.POOL_COMMAND = [sys.executable, "-P", "-m", "tests.faults.rig_pool"]
