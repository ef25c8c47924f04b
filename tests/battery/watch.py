"""The client that streams beside every row of the battery, and the judgement of what it saw."""

import json
import subprocess
import sys
from typing import Any

from config.sources import ROOT
from tests.e2e.server import wait_until

# Beside twice the usual gap and what the machine itself held everybody up: what is a stall, on a slow machine too.
ALLOWANCE_S = 5.0


class ProbeStream:
    """See `tests.battery.probe`; ``key`` is the API key that it shows, if any."""

    def __init__(self, url: str, key: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.battery.probe", url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write(key)
        self._wait_for_tokens()
        self.report()
        # Its longest gap while nobody else asks for anything, in seconds.
        self._alone_s = self._wait_for_tokens()

    def report(self) -> dict[str, Any]:
        """What was seen since the last report."""
        assert self._process.stdout is not None
        self._write("")
        return dict(json.loads(self._process.stdout.readline()))

    def check(self) -> None:
        """Fail if the stream failed or stopped since the last report."""
        seen = self.check_problems()
        most = 2 * max(self._alone_s, seen["usual_gap_s"]) + 3 * seen["machine_late_s"] + ALLOWANCE_S
        assert seen["longest_gap_s"] <= most, (seen, self._alone_s)

    def check_problems(self) -> dict[str, Any]:
        """Fail if the stream failed since the last report, however long it waited; return the report."""
        seen = self.report()
        assert not seen["problems"], seen
        return seen

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _wait_for_tokens(self) -> float:
        longest = 0.0

        def enough() -> bool:
            nonlocal longest
            seen = self.report()
            longest = max(longest, seen["longest_gap_s"])
            return bool(seen["tokens"])

        wait_until(enough, "the probe's stream", 60)
        return longest
