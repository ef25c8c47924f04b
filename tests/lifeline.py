"""Commands that do not outlive the tests: a service whose pytest was killed would run on for ever.

Linux itself tells the command (SIGTERM) when the thread that started it has ended, however it did.
"""

import os
import sys
from collections.abc import Sequence

# Without site and without the environment's wishes, so that this costs a few milliseconds. 1 is PR_SET_PDEATHSIG. Who
# has another parent by now came too late to be told.
_TIE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str]) -> list[str]:
    """Return a command that becomes ``command``, with the same process id, and ends with the thread that starts it."""
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]
