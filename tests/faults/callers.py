"""Clients of a real application over the scripted engine (`tests.faults.text_engine`), and what each of them saw."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import httpx

from tests.beside import Beside
from tests.faults.table import Row
from tests.faults.text_engine import expected_text
from tests.workers.pool.harness import PATIENCE, wait_until
from tests.workers.pool.scripted_engine import PLAIN, WAIT

Outcome = Literal["complete", "error", "cut", "refused", "wrong"]

URL = "/v1/completions"
_clients = httpx.Client(
    timeout=6 * PATIENCE, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), verify=False
)


def body(prompt: list[int], max_tokens: int, stream: bool = True) -> dict[str, Any]:
    """A request whose answer is `expected_text`."""
    fixed = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
    return {"prompt": prompt, "max_tokens": max_tokens, "stream": stream, **fixed}


def gated(number: int, gate: int = 1, tokens_before: int = 5) -> list[int]:
    """A prompt whose answer stops after some tokens, until the gate is opened."""
    return [WAIT, tokens_before, 0, gate, number]


def plain(number: int) -> list[int]:
    """A prompt whose answer comes without a pause."""
    return [PLAIN, 0, 0, 0, number]


class Caller:
    """One client that reads a stream to its end, in a thread of its own.

    "cut" is a connection that ended in the middle of the answer, which HTTP's chunks tell and every client library
    raises; "wrong" is a whole answer that is not the right one, or one that ends in the middle as if it were whole.
    """

    def __init__(self, url: str, prompt: list[int], max_tokens: int = 12, **headers: str) -> None:
        self.prompt, self.max_tokens = prompt, max_tokens
        self.status = 0
        self.headers: httpx.Headers = httpx.Headers()
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.done = False
        self.cut = ""
        self.longest_gap_s = 0.0
        self._url, self._headers = url, headers
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it has come to an end."""
        return not self._thread.is_alive()

    def wait(self, seconds: float = 3 * PATIENCE) -> "Caller":
        """Wait for its end."""
        self._thread.join(seconds)
        assert self.over, f"no end after {seconds:.0f} s: {self.text!r}"
        return self

    @property
    def outcome(self) -> Outcome:
        """What became of it."""
        if self.status in (429, 503):
            return "refused"
        if self.error is not None and not self.done:
            return "error"
        if self.done and self.text == expected_text(self.prompt, self.max_tokens):
            return "complete"
        return "cut" if self.cut else "wrong"

    def _run(self) -> None:
        last = time.monotonic()
        try:
            asked = body(self.prompt, self.max_tokens)
            with _clients.stream("POST", self._url + URL, json=asked, headers=self._headers) as response:
                self.status, self.headers = response.status_code, response.headers
                if self.status != 200:
                    self.error = json.loads(response.read())["error"]
                    return
                for line in response.iter_lines():
                    self._take(line)
                    now = time.monotonic()
                    self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
        except httpx.HTTPError as error:
            self.cut = f"{type(error).__name__}: {error}"

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error") or self.error
            self.text += "".join(choice["text"] for choice in event.get("choices", []))


def call(url: str, count: int, gate: int = 1, max_tokens: int = 12) -> list[Caller]:
    """Open so many streams; return when each of them has had its first letters and waits for the gate."""
    made = [Caller(url, gated(number, gate), max_tokens) for number in range(1, count + 1)]
    wait_until(
        lambda: all(len(each.text) == 5 or each.over for each in made), "the middle of all streams", 3 * PATIENCE
    )
    assert not [each for each in made if each.over], [(each.status, each.error, each.cut) for each in made]
    return made


def finish(row: Row, callers: Sequence[Caller], *, cuts_are_errors: bool = False) -> dict[Outcome, list[Caller]]:
    """Wait for all of them and add them to the row; return them by what became of them."""
    found: dict[Outcome, list[Caller]] = {"complete": [], "error": [], "cut": [], "refused": [], "wrong": []}
    for each in callers:
        found[each.wait().outcome].append(each)
        row.longest_gap_s = max(row.longest_gap_s, each.longest_gap_s)
    row.requests += len(callers)
    row.complete += len(found["complete"])
    row.refused += len(found["refused"])
    row.errors += len(found["error"]) + len(found["cut"])
    row.lost += len(found["wrong"]) + (0 if cuts_are_errors else len(found["cut"]))
    assert not found["wrong"], [(each.text, each.done, each.status, each.cut) for each in found["wrong"]]
    return found


class Regular:
    """A client that asks one short thing after the other, on one connection as long as the server keeps it.

    Without ``keep`` each request has a connection of its own.
    """

    def __init__(self, url: str, *, keep: bool = True) -> None:
        self.answers = 0
        self.others: list[str] = []
        self._url = url
        self._limits = httpx.Limits(max_keepalive_connections=1 if keep else 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        wanted = expected_text(plain(1), 3)
        with httpx.Client(base_url=self._url, timeout=3 * PATIENCE, limits=self._limits) as client:
            while not self._over.wait(0.01):
                try:
                    answer = client.post(URL, json=body(plain(1), 3, stream=False))
                    if answer.status_code == 200 and answer.json()["choices"][0]["text"] == wanted:
                        self.answers += 1
                    else:
                        self.others.append(f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as error:
                    self.others.append(repr(error))


class Watcher(Beside):
    """Asks /readyz all along."""

    def __init__(self, url: str) -> None:
        self.samples: list[tuple[float, int]] = []
        self._url = url

    def first(self, status: int, since: float) -> float:
        """Return the seconds from ``since`` to the first later sample with this status; fail if there is none."""
        found = [at - since for at, each in self.samples if at >= since and each == status]
        assert found, f"never {status}: {self.samples[-20:]}"
        return found[0]

    def look(self) -> None:
        """Ask once; 0 stands for no answer."""
        asked = time.monotonic()
        try:
            status = _clients.get(f"{self._url}/readyz").status_code
        except httpx.HTTPError:
            status = 0
        self.samples.append((asked, status))
