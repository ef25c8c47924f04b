"""The rig's engine, with one more fault: a request of the seed `POISON` kills its worker every time."""

import os
import signal
from pathlib import Path
from typing import Any

from tests.faults import rig_engine

POISON = 66_100


def _kill(folder: Path) -> None:
    rig_engine._note(folder, POISON)
    os.kill(os.getpid(), signal.SIGKILL)


def run(config: Any, inbox: Any, emit: Any) -> None:
    """The engine contract of `workers.entry`."""
    rig_engine.FAULTS[POISON] = _kill
    rig_engine.run(config, inbox, emit)
