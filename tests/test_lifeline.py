import subprocess
import sys

import psutil

from config.sources import ROOT
from tests.e2e.server import wait_until
from tests.lifeline import tied

STARTER = """
import subprocess, sys
from tests.lifeline import tied
child = subprocess.Popen(tied(["sleep", "600"]), start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_what_was_started_ends_with_a_starter_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        child = psutil.Process(int(starter.stdout.readline()))
        try:
            wait_until(lambda: child.cmdline() == ["sleep", "600"], "the command", 20)
            starter.kill()
            wait_until(
                lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the end of the command", 20
            )
        finally:
            starter.kill()
            if child.is_running():
                child.kill()


def test_what_comes_too_late_does_not_start() -> None:
    command = tied(["echo", "started"])
    command[command.index("echo") - 1] = "1"
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).stdout == b""
    assert subprocess.run(tied(["echo", "started"]), capture_output=True, timeout=60).stdout == b"started\n"
