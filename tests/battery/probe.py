"""A client that never stops streaming while the battery runs, in a process of its own.

``python -m tests.battery.probe URL``

The first line on its standard input is an API key, or empty. For each further line it writes one line of JSON about the
time since the last one: the longest time without a token, the usual one, how much later than asked the machine let it
wake up from sleep, and what went wrong.
"""

import http.client
import json
import statistics
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

_TICK_S = 0.005
_BODY = {
    "prompt": "Once upon a time there was a probe that",
    "template": "raw",
    "max_tokens": 200,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


class Probe:
    """What was seen since it was last asked for."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = parts.hostname, parts.port
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self._gaps: list[float] = []
        self._problems: list[str] = []
        self._late = 0.0
        self._last = time.monotonic()

    def run(self) -> None:
        """Stream for ever."""
        while True:
            try:
                self._stream()
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._problem(f"{type(error).__name__}: {error}")
                time.sleep(0.1)

    def watch_machine(self) -> None:
        """Measure for ever how late a sleep ends."""
        while True:
            before = time.monotonic()
            time.sleep(_TICK_S)
            late = time.monotonic() - before - _TICK_S
            with self._lock:
                self._late = max(self._late, late)

    def report(self) -> dict[str, Any]:
        """Return what was seen, and forget it."""
        now = time.monotonic()
        with self._lock:
            # The silence that is going on counts as well.
            gaps = [*self._gaps, now - self._last]
            seen = {
                "longest_gap_s": max(gaps),
                "usual_gap_s": statistics.median(gaps),
                "tokens": len(self._gaps),
                "machine_late_s": self._late,
                "problems": self._problems,
            }
            self._gaps, self._problems, self._late = [], [], 0.0
        return seen

    def _stream(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(_BODY), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {answer.read(500)!r}")
            last = b""
            while line := answer.readline():
                if line.startswith(b"data:"):
                    last = line.strip()
                    self._token()
            if last != b"data: [DONE]":
                raise ValueError(f"the stream ended with {last[:500]!r}")
        finally:
            connection.close()

    def _token(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._gaps.append(now - self._last)
            self._last = now

    def _problem(self, text: str) -> None:
        with self._lock:
            self._problems.append(text)


def main() -> None:
    probe = Probe(sys.argv[1], sys.stdin.readline().strip())
    for work in (probe.run, probe.watch_machine):
        threading.Thread(target=work, daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(probe.report()), flush=True)


if __name__ == "__main__":
    main()
