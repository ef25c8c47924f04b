"""nginx with the shipped sample in front: what a proxy may not spoil, and what it has to do itself.

That requests of every kind pass it unharmed is the battery's business (`tests/battery`), which goes through it too.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from tests.battery.nginx import Nginx, program
from tests.debian import NGINX
from tests.e2e.server import free_port
from tests.faults.callers import URL, Caller, Regular, body, call, gated, plain
from tests.faults.service import Service
from tests.faults.text_engine import expected_text
from tests.workers.pool.harness import PATIENCE, private_directory, wait_until

BINARY = program()
pytestmark = pytest.mark.skipif(BINARY is None and NGINX.may_be_missing, reason="there is no nginx here")


@contextlib.contextmanager
def proxy(upstream_port: int, *, limited: bool = False, **changes: str) -> Iterator[Nginx]:
    assert BINARY is not None, "apt-get has not brought nginx"
    made = Nginx(BINARY, free_port(), upstream_port, limited=limited, changes=changes)
    try:
        yield made
    finally:
        made.stop()


def address(server: Nginx) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with private_directory() as directory:
        usual = {"APPLICATION": "app:create_app()", "POOL_ENGINE": "tests.faults.text_engine:run"}
        made = Service(directory, {**usual, "state_dir": directory / "state", "max_batch": 64, "graceful_timeout_s": 5})
        try:
            made.wait_ready()
            yield made
        finally:
            made.kill_all()


@pytest.fixture(scope="module")
def front(service: Service) -> Iterator[Nginx]:
    with proxy(service.port) as made:
        yield made


_gates = iter(range(10, 1000))


@pytest.fixture
def gate() -> int:
    """A gate of its own for each test of the shared service."""
    return next(_gates)


def error_of(answer: httpx.Response) -> dict[str, object]:
    """The error object; anything else fails."""
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_tokens_pass_it_while_the_next_ones_are_not_yet_there(service: Service, front: Nginx, gate: int) -> None:
    asked = body(gated(1, gate), 12)
    with httpx.stream("POST", address(front) + URL, json=asked, timeout=3 * PATIENCE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        text, lines = "", response.iter_lines()
        while len(text) < 5:
            line = next(lines)
            if line.startswith("data: {"):
                text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
        assert text == expected_text(gated(1, gate), 5)
        # Only now the model may go on: with these five the proxy had all there was, and has passed it on.
        service.open_gate(gate)
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_an_upstream_that_dies_in_mid_stream_is_an_error_for_openais_client(
    service: Service, front: Nginx, gate: int
) -> None:
    client = openai.OpenAI(base_url=f"{address(front)}/v1", api_key="none", max_retries=0, timeout=3 * PATIENCE)
    asked = body(gated(1, gate), 12)
    extra = {name: asked.pop(name) for name in ("repetition_penalty", "ignore_eos")}
    text = ""
    with client.completions.create(model="", extra_body=extra, **asked) as stream:
        parts = iter(stream)
        while len(text) < 5:
            text += next(parts).choices[0].text
        workers = service.http_workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            for _ in parts:
                pass
    service.open_gate(gate)
    wait_until(lambda: len(service.http_workers() - workers) == 2, "other HTTP workers")
    wait_until(lambda: Caller(address(front), plain(1)).wait().outcome == "complete", "an answer", 3 * PATIENCE)


def test_its_reload_loses_no_stream_and_refuses_nobody(service: Service, front: Nginx, gate: int) -> None:
    # Clients that open a connection for each request: idle ones of clients are closed by nginx's old workers.
    regulars = [Regular(address(front), keep=False) for _ in range(4)]
    callers = []
    for _ in range(3):
        callers += call(address(front), 8, gate)
        front.reload()
        before = [each.answers for each in regulars]
        wait_until(lambda: all(r.answers > b + 3 for r, b in zip(regulars, before, strict=True)), "answers")  # noqa: B023
    service.open_gate(gate)
    assert {each.wait().outcome for each in callers} == {"complete"}
    for each in regulars:
        each.stop()
    assert [each.others for each in regulars] == [[]] * 4
    assert front.log.count("(SIGHUP) received") == 3


def test_a_reload_of_the_service_behind_it_is_seen_by_nobody(service: Service, front: Nginx, gate: int) -> None:
    regulars = [Regular(address(front)) for _ in range(4)]
    callers = call(address(front), 8, gate)
    for _ in range(2):
        old = service.http_workers()
        os.kill(service.process.pid, signal.SIGHUP)
        wait_until(lambda: len(service.http_workers() - old) >= 2, "new HTTP workers", 3 * PATIENCE)  # noqa: B023
        before = [each.answers for each in regulars]
        wait_until(
            lambda: all(r.answers > b + 20 for r, b in zip(regulars, before, strict=True)),  # noqa: B023
            "answers",
            3 * PATIENCE,
        )
    service.open_gate(gate)
    assert {each.wait().outcome for each in callers} == {"complete"}
    for each in regulars:
        each.stop()
    assert [each.others for each in regulars] == [[]] * 4


# --- errors of its own ------------------------------------------------------------------------------------------------


def test_nobody_behind_it_is_503_with_retry_after() -> None:
    with proxy(free_port()) as front:
        answer = httpx.post(address(front) + URL, json=body(plain(1), 1))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["type"] == "service_unavailable_error"


def test_an_answer_that_takes_too_long_is_504_and_not_to_be_tried_again(service: Service, gate: int) -> None:
    with proxy(service.port, **{r"proxy_read_timeout \w+;": "proxy_read_timeout 1s;"}) as front:
        answer = httpx.post(address(front) + URL, json=body(gated(1, gate), 12, stream=False), timeout=3 * PATIENCE)
    service.open_gate(gate)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert error_of(answer)["code"] == "timeout"


def test_errors_of_the_service_pass_it_as_they_are(service: Service, front: Nginx) -> None:
    for path, asked in ((URL, {}), ("/v1/nothing", {}), (URL, {"prompt": "x", "n": 0})):
        straight = httpx.post(f"http://127.0.0.1:{service.port}{path}", json=asked)
        through = httpx.post(address(front) + path, json=asked)
        assert (through.status_code, error_of(through)) == (straight.status_code, error_of(straight))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_who_asks_too_often_gets_429_with_retry_after(service: Service) -> None:
    with proxy(service.port, limited=True) as front, httpx.Client(base_url=address(front)) as client:
        for _ in range(2000):
            answer = client.get("/v1/models")
            if answer.status_code != 200:
                break
        # Others have their own count, and nobody is too curious about the service's health.
        other = client.get("/v1/models", headers={"Authorization": "Bearer other"})
        health = {client.get("/readyz").status_code for _ in range(100)}
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["type"] == "rate_limit_error"
    assert other.status_code == 200
    assert health == {200}


def test_who_has_too_many_requests_open_gets_429(service: Service, gate: int) -> None:
    with proxy(
        service.port, limited=True, **{r"rate=\d+r/s": "rate=10000r/s", "tailrace_open 64": "tailrace_open 4"}
    ) as front:
        callers = call(address(front), 4, gate)
        answer = httpx.post(address(front) + URL, json=body(plain(1), 1))
        service.open_gate(gate)
        assert {each.wait().outcome for each in callers} == {"complete"}
    assert (answer.status_code, error_of(answer)["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1


def test_metrics_are_for_the_machine_itself(front: Nginx) -> None:
    def get(source: str) -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=source)) as client:
            return client.get(f"{address(front)}/metrics")

    assert get("127.0.0.1").status_code != 403
    outside = get("127.0.0.2")
    assert outside.status_code == 403
    error_of(outside)


# --- what the service gets to see -------------------------------------------------------------------------------------


class _Upstream(ThreadingHTTPServer):
    """Notes what comes, and on which connection; closes each connection some time after an answer if told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[int, str, dict[str, str]]] = []
        self.idle_s = PATIENCE
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Upstream

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.client_address[1], self.request_version, headers))
        self.connection.settimeout(self.server.idle_s)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[_Upstream]:
    made = _Upstream()
    yield made
    made.shutdown()
    made.server_close()


def test_headers_pass_it_and_connections_to_the_service_are_kept(upstream: _Upstream) -> None:
    sent = {"Last-Event-ID": "x:7", "Idempotency-Key": "abc", "X-Request-Timeout": "9", "Authorization": "Bearer k"}
    with proxy(upstream.server_port) as front:
        for _ in range(3):
            assert httpx.post(address(front) + URL, json={}, headers=sent).status_code == 200
    assert len({port for port, _, _ in upstream.seen}) == 1
    for _, version, headers in upstream.seen:
        assert version == "HTTP/1.1"
        assert "connection" not in headers
        assert {name: headers[name.lower()] for name in sent} == sent
        assert headers["host"] == "127.0.0.1"
        assert headers["x-forwarded-for"] == "127.0.0.1"
        assert headers["x-request-id"]


def test_a_kept_connection_that_the_service_closes_costs_nobody_a_request(upstream: _Upstream) -> None:
    upstream.idle_s = 0.05
    with proxy(upstream.server_port) as front, httpx.Client(base_url=address(front)) as client:
        for _ in range(5):
            assert client.post(URL, json={}).status_code == 200
            ports = {port for port, _, _ in upstream.seen}
            wait_until(lambda: not _open(ports), "the end of the idle connection")  # noqa: B023
    assert len({port for port, _, _ in upstream.seen}) == 5


def _open(ports: set[int]) -> bool:
    """Whether a connection from one of these ports still stands; told from the kernel's table."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return any(int(row[1].rpartition(":")[2], 16) in ports and row[3] in ("01", "08") for row in rows)


def test_the_sample_is_what_nginx_takes(service: Service) -> None:
    with proxy(service.port) as front:
        assert "[warn]" not in front.log
        assert "[emerg]" not in front.log
