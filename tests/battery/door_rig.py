"""A real service with keys, for the rows about who may come in (A) and what nobody may see (I)."""

import base64
import json
import re
import secrets
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.battery.answers import check_answer, check_leak
from tests.e2e.server import Server

CHAT = "/v1/chat/completions"
PATIENCE_S = 60.0


def new_key() -> str:
    """A key that looks different in base64 and in a URL, so that every form of it can be searched for."""
    return f"sk-{secrets.token_urlsafe(18)}/+%~"


def forms_of(key: str) -> set[bytes]:
    """How a key may be written where it should not be."""
    encoded = key.encode()
    forms = {encoded, urllib.parse.quote(key, safe="").encode(), repr(key)[1:-1].encode()}
    forms |= {json.dumps(key)[1:-1].encode(), encoded.hex().encode()}
    for shift in range(3):
        # In the middle of something else that was encoded; the ends depend on their neighbours.
        whole = base64.b64encode(b"x" * shift + encoded).rstrip(b"=")
        forms.add(whole[(shift * 8 + 5) // 6 : -2])
    return forms


class RawAnswer:
    """What came back on a socket of our own."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1]) if lines[0] else 0
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}


class Guarded:
    """The service: two HTTP workers, a key from the command line, and a file of keys."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tailrace-keys-"))
        self.keys = {name: new_key() for name in ("flag", "probe", "alice", "bob", "carol", "few")}
        self.never = new_key()
        self.key_file = self.folder / "keys"
        self.write_keys("alice", "bob", "few")
        # The variable is overruled by the flag, and has to disappear all the same.
        self.server = Server(
            "--cpu_threads",
            "1",
            "--api_key",
            f"flag={self.keys['flag']}",
            "--api_key",
            f"probe={self.keys['probe']}",
            "--max_queue",
            "512",
            "--api_key_file",
            str(self.key_file),
            "--cors_origins",
            "https://app.example.org",
            "--allowed_hosts",
            "llm.example.org",
            TAILRACE_API_KEY=self.never,
        )
        self.server.http.headers["Authorization"] = f"Bearer {self.keys['flag']}"
        self._address = count(1)
        self.bodies: list[bytes] = []

    def start(self) -> "Guarded":
        self.server.wait_ready()
        self.born = self.pids()
        return self

    def stop(self) -> None:
        self.server.stop()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def write_keys(self, *names: str) -> None:
        """Put a file with these owners' keys in place of the last one; "few" may only ask a few times."""
        limits = {"few": " requests_per_minute=3"}
        text = "".join(f"{name}: {self.keys[name]}{limits.get(name, '')}\n" for name in names)
        path = self.key_file.with_suffix(".new")
        path.touch(mode=0o600)
        path.write_text("# keys of the battery\n" + text)
        path.rename(self.key_file)

    def put_in_force(self, *names: str) -> None:
        """The same, and wait until every HTTP worker has taken it; they look when they are asked something."""
        known = len(self.server.log)
        workers = self.server.http_workers()
        self.write_keys(*names)

        def taken() -> bool:
            with ExitStack() as stack:
                # All at once, so that no worker can take every one of them.
                connections = [stack.enter_context(self.connection()) for _ in range(8)]
                for connection in connections:
                    connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: -\r\n")
                    connection.sendall(f"X-Forwarded-For: {self.address()}\r\n\r\n".encode())
                for connection in connections:
                    self.read_answer(connection)
            told = re.compile(r"\[(\d+)\]: keys changed |\"pid\":(\d+),\"event\":\"keys changed\"")
            return workers <= {int(found[1] or found[2]) for found in told.finditer(self.server.log[known:])}

        within(20, taken, "every worker takes the keys")

    def pids(self) -> set[int]:
        """Every process of the service."""
        return {process.pid for process in self.server.processes()}

    def address(self) -> str:
        """An address that nobody has used, as the proxy on this machine would tell it."""
        number = next(self._address)
        return f"203.0.{number // 250}.{number % 250 + 1}"

    def as_owner(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on a connection of its own, without a key unless one is given; the answer is checked."""
        headers = {"X-Forwarded-For": self.address(), **options.pop("headers", {})}
        answer = httpx.request(method, self.server.url + path, headers=headers, timeout=PATIENCE_S, **options)
        self.bodies.append(answer.content)
        check_answer(answer.status_code, answer.headers, answer.content, method)
        return answer

    def ask(self, name: str, body: dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
        """A request with the key of ``name``."""
        return self.send("POST", path, json=body, headers={**self.as_owner(name), **headers})

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE_S) as made:
            yield made

    def raw(self, head: bytes, body: bytes = b"") -> RawAnswer:
        """Send bytes as they are and read until the server closes, or has sent an answer and keeps silent."""
        with self.connection() as connection:
            connection.sendall(head + body)
            return self.read_answer(connection)

    def read_answer(self, connection: socket.socket) -> RawAnswer:
        """Read one answer that says how long it is."""
        data = b""
        while True:
            # What is said before the real answer is none.
            if data.startswith(b"HTTP/1.1 100") and b"\r\n\r\n" in data:
                data = data.partition(b"\r\n\r\n")[2]
            if b"\r\n\r\n" in data and len(data) >= _end_of(data):
                break
            part = connection.recv(65536)
            if not part:
                break
            data += part
        answer = RawAnswer(data)
        self.bodies.append(answer.body)
        check_leak(answer.body.decode("utf-8", "replace"))
        return answer

    @contextmanager
    def stream(self, name: str, **body: Any) -> Iterator[httpx.Response]:
        headers = {**self.as_owner(name), "X-Forwarded-For": self.address()}
        with (
            httpx.Client(base_url=self.server.url, timeout=PATIENCE_S) as client,
            client.stream("POST", CHAT, json={**body, "stream": True}, headers=headers) as answer,
        ):
            yield answer

    def places(self) -> Iterator[tuple[str, bytes]]:
        """Yield everything that anybody could look at: log, arguments, variables, files, bodies."""
        yield "the log", self.server.log.encode()
        for process in self.server.processes():
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                for part in ("cmdline", "environ"):
                    yield f"{part} of {process.name()}", Path(f"/proc/{process.pid}/{part}").read_bytes()
        for path in Path(self.server._home).rglob("*"):
            if path.is_file() and path.stat().st_size < 64 * 1024 * 1024:
                yield str(path), path.read_bytes()
        yield "a body", b"\n".join(self.bodies)


def _end_of(data: bytes) -> int:
    head, _, _ = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(head) + 4 + int(line.partition(b":")[2])
    return len(head) + 4


def within(seconds: float, condition: Any, what: str) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
