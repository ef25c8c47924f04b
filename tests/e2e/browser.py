"""A real browser for the tests: Chromium without a window, driven through its DevTools protocol over a pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.debian import BROWSER
from tests.lifeline import tied

_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-pipe", "--disable-dev-shm-usage", "--force-color-profile=srgb"),
    # Nobody but us is to be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# The descriptors that the browser reads from and writes to have fixed numbers.
_ONTO_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_START_S = 60.0


class Browser:
    """One page. `problems` are the errors and warnings of its console, and what it could not load."""

    def __init__(self, width: int = 1280, height: int = 900, scale: float = 1.0) -> None:
        program = BROWSER.path()
        assert program is not None, "apt-get has not brought a browser"
        self._home = Path(tempfile.mkdtemp(prefix="tailrace-browser-"))
        reads, self._writes = os.pipe()
        self._reads, writes = os.pipe()
        self._log = (self._home / "log").open("wb")
        environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._home), **BROWSER.environ()}
        command = [program, *_FLAGS, f"--user-data-dir={self._home / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(
            tied([sys.executable, "-I", "-S", "-c", _ONTO_3_AND_4, str(reads), str(writes), *command]),
            env=environ, pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._ended = False
        self._number = 0
        self._session = ""
        self.problems: list[str] = []
        self.events: list[dict[str, Any]] = []
        # Answers a server's question for a password: name and password.
        self.password: tuple[str, str] | None = None
        threading.Thread(target=self._read, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height, scale)

    # --- what a test does

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        if self.password is not None:
            self.call("Fetch.enable", handleAuthRequests=True)
        self.events.clear()
        found = self.call("Page.navigate", url=url)
        assert "errorText" not in found, found
        self._wait(lambda: any(each["method"] == "Page.loadEventFired" for each in self.events), f"{url} to load")

    def run(self, script: str) -> Any:
        """Return the value of an expression on the page; of a promise what it comes to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, what: str, seconds: float = 60.0) -> Any:
        """Return the first true value of an expression on the page."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int, scale: float = 1.0, *, mobile: bool = False) -> None:
        """Give the page a screen of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def prefer(self, scheme: str) -> None:
        """Have the page in "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        """Press a key as a person does: Tab, Enter."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        more = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **more, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Return a picture as PNG, of what is seen or of the whole page."""
        more = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            more = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **more)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        """End it and all of its processes."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = ""
            self.call("Browser.close", patience=5)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._writes)
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)

    # --- the protocol

    def call(self, method: str, patience: float = _START_S, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers to a command."""
        number = self._post(method, parameters)
        self._wait(lambda: number in self._answers, method, patience)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    def _post(self, method: str, parameters: dict[str, Any]) -> int:
        with self._news:
            self._number += 1
            message = {"id": self._number, "method": method, "params": parameters}
            if self._session:
                message["sessionId"] = self._session
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._writes, data) :]
            return self._number

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = _START_S) -> None:
        with self._news:
            came = self._news.wait_for(lambda: condition() or self._ended, seconds)
            came = came and condition()
            assert came, f"no {what}: {(self._home / 'log').read_text(errors='replace')[-2000:]}"

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._reads, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            for message in messages:
                self._take(json.loads(message))
        os.close(self._reads)
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Fetch.requestPaused":
            self._post("Fetch.continueRequest", {"requestId": message["params"]["requestId"]})
        elif message.get("method") == "Fetch.authRequired":
            self._post("Fetch.continueWithAuth", self._password_for(message["params"]["requestId"]))
        with self._news:
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)
                self._note(message["method"], message["params"])
            self._news.notify_all()

    def _password_for(self, request: str) -> dict[str, Any]:
        if self.password is None:
            return {"requestId": request, "authChallengeResponse": {"response": "CancelAuth"}}
        name, password = self.password
        given = {"response": "ProvideCredentials", "username": name, "password": password}
        return {"requestId": request, "authChallengeResponse": given}

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
