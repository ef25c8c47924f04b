"""Group A of the battery: who may come in. Against a real service with two HTTP workers."""

import hmac
import json
import re
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP

import httpx
import psutil
import pytest

from app.door import keys
from config.keys import parse_flag
from tests.app.conftest import application, runtime_directory
from tests.battery.door_rig import CHAT, Guarded, forms_of, new_key, within
from tests.battery.watch import ProbeStream
from tests.e2e.server import Server

pytestmark = pytest.mark.usefixtures("watched")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ASK = {"messages": "Count to three.", "max_tokens": 4, "temperature": 0}


def request(lines: list[bytes], host: bytes = b"localhost") -> bytes:
    return b"\r\n".join([lines[0], b"Host: " + host, *lines[1:], b"", b""])


def bad_credentials(guarded: Guarded) -> dict[str, list[bytes]]:
    right = guarded.keys["alice"].encode()
    bearer = b"Authorization: Bearer "
    return {
        "missing": [],
        "empty header": [b"Authorization:"],
        "empty key": [b"Authorization: Bearer"],
        "empty x-api-key": [b"x-api-key:"],
        "wrong scheme": [b"Authorization: Basic " + right],
        "no scheme": [b"Authorization: " + right],
        "prefix": [bearer + right[:-1]],
        "longer": [bearer + right + b"x"],
        "other case": [bearer + right.swapcase()],
        "two blanks": [bearer + b" " + right],
        "something behind": [bearer + right + b" x"],
        "8 KB": [bearer + b"x" * 8_000],
        "not ASCII": [bearer + right[:-1] + "\u00fc".encode()],
        "quotes": [bearer + b"'\"`; DROP TABLE keys; --"],
        "the digest": [bearer + b"sha256:" + keys.digest(right).hex().encode()],
        "two headers": [bearer + right, bearer + right],
        "two headers, one wrong": [bearer + right, bearer + b"x"],
        "two x-api-key": [b"x-api-key: " + right, b"x-api-key: " + right],
        "right x-api-key behind a wrong header": [bearer + b"x", b"x-api-key: " + right],
        "a cookie": [b"Cookie: api_key=" + right],
        "proxy authorization": [b"Proxy-Authorization: Bearer " + right],
        "with an underscore": [b"X_API_KEY: " + right],
    }


def test_a1_a_bad_key_is_a_401_that_says_how_to_show_one(guarded: Guarded):
    for name, headers in bad_credentials(guarded).items():
        address = b"X-Forwarded-For: " + guarded.address().encode()
        answer = guarded.raw(request([b"GET /v1/models HTTP/1.1", address, *headers]))
        assert answer.status == 401, (name, answer.status)
        assert answer.headers["www-authenticate"] == "Bearer", name
        assert b'"code":"invalid_api_key"' in answer.body, name


def test_a1_a_key_longer_than_any_header_may_be_gets_no_further(guarded: Guarded):
    """The bound of a header line (B9) comes first."""
    answer = guarded.raw(request([b"GET /v1/models HTTP/1.1", b"Authorization: Bearer " + b"x" * 10_000]))
    assert answer.status == 431
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["api_key", "key", "access_token", "Authorization", "x-api-key"])
def test_a1_a_key_in_the_url_is_none(guarded: Guarded, name: str):
    answer = guarded.send("GET", f"/v1/models?{name}={guarded.keys['alice']}")
    assert answer.status_code == 401


def test_a2_every_route_and_method_needs_a_key(guarded: Guarded):
    with runtime_directory() as folder, application(folder) as app:
        rules = {re.sub(r"<[^>]*>", "x", rule.rule) for rule in app.url_map.iter_rules()}
    assert {CHAT, "/health", "/version", "/v1/models"} <= rules
    with httpx.Client(base_url=guarded.server.url, timeout=60) as client:
        for path in sorted(rules | {"/", "/nowhere", "/metrics", "/docs", "/openapi.json", "/favicon.ico"}):
            for method in METHODS:
                status = client.request(method, path).status_code
                wanted = 200 if method == "GET" and path in ("/livez", "/readyz") else 401
                assert status == wanted, (method, path)


def test_a2_nothing_can_be_changed_from_outside(guarded: Guarded):
    with runtime_directory() as folder, application(folder) as app:
        rules = {rule.rule for rule in app.url_map.iter_rules()}
    assert not [rule for rule in rules if re.search(r"weight|lora|template|admin|load|sleep|pause|config|reset", rule)]


@pytest.mark.parametrize("framing", ["Content-Length: 104857600", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("expect", [False, True])
def test_a3_a_bad_key_is_refused_before_the_body_is_read(guarded: Guarded, framing: str, expect: bool):
    lines = [f"POST {CHAT} HTTP/1.1".encode(), framing.encode(), b"Authorization: Bearer wrong"]
    lines += [b"Content-Type: application/json", b"X-Forwarded-For: " + guarded.address().encode()]
    lines += [b"Expect: 100-continue"] if expect else []
    with guarded.connection() as connection:
        connection.sendall(request(lines))
        # Nothing of the body has been sent yet.
        answer = guarded.read_answer(connection)
        assert answer.status == 401
        assert answer.headers["connection"] == "close"
        sent, part = 0, b"x" * 65536
        connection.settimeout(10)
        with suppress(OSError):
            while sent < 100 * 2**20:
                connection.sendall(part)
                sent += len(part)
        # What the server takes away, and what two kernels hold.
        assert sent < 32 * 2**20


@pytest.mark.parametrize(
    "line",
    [
        b"GET //v1/models HTTP/1.1",
        b"GET /v1/../v1/models HTTP/1.1",
        b"GET /livez/../v1/models HTTP/1.1",
        b"GET /livez%2f..%2fv1/models HTTP/1.1",
        b"GET /v1%2fmodels HTTP/1.1",
        b"GET /v1/models;/livez HTTP/1.1",
        b"GET /v1/models?/livez HTTP/1.1",
        b"GET /v1/models#/livez HTTP/1.1",
        b"GET /v1/models/livez HTTP/1.1",
        b"GET /livez/ HTTP/1.1",
        b"GET /LIVEZ HTTP/1.1",
        b"GET /livez%00 HTTP/1.1",
        b"GET /livez;x HTTP/1.1",
        b"GET http://localhost/v1/models HTTP/1.1",
        b"GET http://livez/v1/models?x=/livez HTTP/1.1",
        b"HEAD /livez HTTP/1.1",
        b"get /livez HTTP/1.1",
        b"GET /v1/models HTTP/1.0",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT localhost:80 HTTP/1.1",
    ],
)
def test_a4_no_spelling_of_a_url_opens_a_route(guarded: Guarded, line: bytes):
    answer = guarded.raw(request([line, b"Connection: close", b"X-Forwarded-For: " + guarded.address().encode()]))
    assert 400 <= answer.status < 500, answer.status


@pytest.mark.parametrize(
    "header",
    [
        b"X-Original-URL: /livez",
        b"X-Rewrite-URL: /livez",
        b"X-Forwarded-Prefix: /v1/models",
        b"X-Forwarded-Path: /livez",
        b"X_Forwarded_For: 127.0.0.1",
        b"Script-Name: /v1/models",
        b"SCRIPT_NAME: /v1/models",
        b"PATH_INFO: /livez",
        b"Path-Info: /livez",
        b"X-HTTP-Method-Override: GET",
        b"Forwarded: for=127.0.0.1;host=localhost",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    ],
)
def test_a4_no_header_opens_a_route(guarded: Guarded, header: bytes):
    answer = guarded.raw(request([b"GET /v1/models HTTP/1.1", header]))
    assert answer.status == 401


@pytest.mark.parametrize(
    "host", [b"x/livez?", b"x/v1?a=", b"localhost/livez?x=", b"localhost#", b"a b", b"a@b", b"localhost, localhost"]
)
def test_a4_a_host_that_is_none_is_a_400(guarded: Guarded, host: bytes):
    authorization = b"Authorization: Bearer " + guarded.keys["alice"].encode()
    assert guarded.raw(request([b"GET /v1/models HTTP/1.1", authorization], host)).status == 400
    assert guarded.raw(request([b"GET /v1/models HTTP/1.1"], host)).status == 400


def test_a5_every_key_is_compared_for_every_request(monkeypatch: pytest.MonkeyPatch):
    ring = keys.Keyring([parse_flag(f"owner-{number}=key-{number}").sealed() for number in range(50)])
    compared: list[tuple[bytes, bytes]] = []
    real = keys.compare_digest

    def noted(known: bytes, shown: bytes) -> bool:
        compared.append((known, shown))
        return bool(real(known, shown))

    monkeypatch.setattr(keys, "compare_digest", noted)
    for key in (b"key-0", b"key-49", b"xey-0", b"key-x", b"", b"k" * 10_000, b"\xff"):
        compared.clear()
        ring.owner(key)
        assert len(compared) == 50
        # Digests of one length, whatever the key: how much of it is right cannot be told from the time.
        assert {len(part) for pair in compared for part in pair} == {32}
    monkeypatch.undo()
    assert keys.compare_digest is hmac.compare_digest


def test_a5_the_time_does_not_tell_how_much_of_a_key_is_right():
    """Coarse, since a busy machine is noisier than any difference; the row above is the argument."""
    key = "k" * 200
    ring = keys.Keyring([parse_flag(key).sealed()])
    classes = [b"x" + key[1:].encode(), key[:-1].encode() + b"x", key[:-1].encode(), key.encode()]
    times: list[list[float]] = [[] for _ in classes]
    for _ in range(3000):
        for shown, own in zip(classes, times, strict=True):
            begun = time.perf_counter()
            ring.owner(shown)
            own.append(time.perf_counter() - begun)
    medians = [statistics.median(own) for own in times]
    assert max(medians) < 3 * min(medians), medians


def test_a6_a_changed_file_is_in_force_on_all_workers_within_five_seconds(guarded: Guarded):
    def statuses(name: str) -> set[int]:
        headers = guarded.as_owner(name)
        return {guarded.send("GET", "/v1/models", headers=headers).status_code for _ in range(8)}

    assert statuses("carol") == {401}
    # Waits for 20 s at most: the five, and what the requests themselves take.
    guarded.put_in_force("alice", "bob", "carol", "few")
    assert statuses("carol") == statuses("alice") == {200}
    guarded.put_in_force("bob", "carol", "few")
    assert statuses("alice") == {401}
    guarded.put_in_force("alice", "bob", "few")
    assert statuses("alice") == {200}
    assert statuses("carol") == {401}


def test_a6_at_hup_keys_change_under_load_and_running_streams_finish(guarded: Guarded, guarded_probe: ProbeStream):
    problems: list[object] = []
    stopping = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=guarded.server.url, timeout=60, headers=guarded.as_owner("bob")) as client:
            while not stopping.is_set():
                with suppress(httpx.RemoteProtocolError):  # an idle connection of a worker that was replaced
                    answer = client.post(CHAT, json=ASK)
                    if answer.status_code != 200:
                        problems.append(answer.text)

    workers = guarded.server.http_workers()
    thread = threading.Thread(target=load)
    thread.start()
    try:
        with guarded.stream("alice", messages="Tell a long story.", max_tokens=150, ignore_eos=True) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("id: ")
            guarded.write_keys("bob", "few")
            guarded.server.signal(SIGHUP)
            within(
                20,
                lambda: guarded.send("GET", "/v1/models", headers=guarded.as_owner("alice")).status_code == 401,
                "the revoked key opens no more",
            )
            assert list(lines)[-2] == "data: [DONE]"
    finally:
        stopping.set()
        thread.join()
    assert not problems
    within(120, lambda: not workers & set(_children(guarded)), "the old workers leave")
    # Until the new ones have started nobody takes new connections: they wait, and none is lost.
    guarded_probe.check_problems()
    guarded.server.http.close()
    guarded.server.http = httpx.Client(base_url=guarded.server.url, timeout=60, headers=guarded.as_owner("flag"))
    guarded.put_in_force("alice", "bob", "few")
    guarded.born = guarded.pids()


def _children(guarded: Guarded) -> list[int]:
    return [child.pid for child in psutil.Process(guarded.server.process.pid).children()]


def test_a8_a_foreign_page_is_told_nothing(guarded: Guarded):
    foreign = {"Origin": "https://evil.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for method, path, headers in (
        ("OPTIONS", CHAT, preflight),
        ("OPTIONS", CHAT, {**preflight, **guarded.as_owner("alice")}),
        ("GET", "/livez", {}),
        ("GET", "/v1/models", guarded.as_owner("alice")),
    ):
        answer = guarded.send(method, path, headers={**foreign, **headers})
        assert not [name for name in answer.headers if name.startswith("access-control-")], (method, path)
    own = guarded.send("OPTIONS", CHAT, headers={"Origin": "https://app.example.org", **preflight})
    assert own.status_code == 204
    assert own.headers["Access-Control-Allow-Origin"] == "https://app.example.org"
    assert "Access-Control-Allow-Credentials" not in own.headers


def test_a8_a_foreign_name_is_refused(guarded: Guarded):
    authorization = b"Authorization: Bearer " + guarded.keys["alice"].encode()
    for host, status in ((b"evil.example", 403), (b"127.0.0.1.evil.example:80", 403), (b"llm.example.org", 200)):
        assert guarded.raw(request([b"GET /v1/models HTTP/1.1", authorization], host)).status == status


def test_a8_an_address_that_tries_keys_is_refused_and_no_other(guarded: Guarded):
    attacker = {"X-Forwarded-For": "8.8.8.8, " + guarded.address()}
    seen = []
    started = time.monotonic()
    with httpx.Client(base_url=guarded.server.url, timeout=60) as client:
        for number in range(200):
            if 429 not in seen:
                meanwhile = time.monotonic() - started
            seen.append(client.get("/v1/models", headers={**attacker, "x-api-key": f"guess-{number}"}).status_code)
            if number % 20 == 0:
                assert guarded.send("GET", "/v1/models", headers=guarded.as_owner("bob")).status_code == 200
        begun = seen.index(429)
        # Thirty, counted for all workers together, and those that come back meanwhile, one in two seconds.
        assert 30 <= begun <= 31 + meanwhile / 2
        assert set(seen) == {401, 429}
        assert seen.count(401) <= 31 + (time.monotonic() - started) / 2
        refused = client.get("/v1/models", headers={**attacker, **guarded.as_owner("alice")})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
    assert guarded.send("GET", "/v1/models", headers=guarded.as_owner("alice")).status_code == 200


def test_a8_a_flood_of_bad_keys_reaches_nobody_else(guarded: Guarded):
    """A thousand of them, as fast as eight connections go; an owner's requests in between are answered."""
    attacker = {"X-Forwarded-For": "8.8.4.4, " + guarded.address()}
    started = time.monotonic()

    def guess(number: int) -> list[int]:
        with httpx.Client(base_url=guarded.server.url, timeout=60, headers=attacker) as client:
            return [
                client.get("/v1/models", headers={"x-api-key": f"guess-{number}-{each}"}).status_code
                for each in range(125)
            ]

    with ThreadPoolExecutor(8) as several:
        guesses = [several.submit(guess, number) for number in range(8)]
        while not all(each.done() for each in guesses):
            assert guarded.send("GET", "/v1/models", headers=guarded.as_owner("bob")).status_code == 200
        seen = [status for each in guesses for status in each.result()]
    assert set(seen) == {401, 429}
    # Thirty for all connections and workers together, and those that came back meanwhile.
    assert 30 <= seen.count(401) <= 31 + (time.monotonic() - started) / 2


def test_a8_limits_of_a_key_hold_across_the_workers(guarded: Guarded):
    started = time.monotonic()
    answers = [guarded.send("GET", "/v1/models", headers=guarded.as_owner("few")) for _ in range(12)]
    # Three at once, and one for each twenty seconds that this takes.
    assert 3 <= [answer.status_code for answer in answers].count(200) <= 4 + (time.monotonic() - started) / 20
    assert [answer.status_code for answer in answers][:3] == [200] * 3
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.headers["x-ratelimit-limit-requests"] == "3"


def test_a7_no_key_can_be_found_anywhere(guarded: Guarded):
    """Behind the other rows, so that all they did has been logged."""
    secret = guarded.keys["alice"].encode()
    # Where a parser complains about what it got, it must not quote it.
    for lines in (
        [b"GET /v1/models HTTP/1.1", b"Authorization : Bearer " + secret],
        [b"GET /v1/models HTTP/1.1", b"Authorization: Bearer " + secret + b"\x00"],
        [b"GET /v1/models HTTP/1.1", b"Authorization: Bearer", b" " + secret],
        [b"GET /v1/models?api_key=" + secret + b"\x7f HTTP/1.1"],
        [b"GET /v1/models?api_key=" + secret + b" HTTP/9.9"],
    ):
        assert 400 <= guarded.raw(request(lines)).status < 500
    guarded.send("GET", "/v1/models", headers=guarded.as_owner("alice"))
    searched = set()
    for place, data in guarded.places():
        searched.add(place.split()[0])
        for name, key in {**guarded.keys, "never": guarded.never}.items():
            assert not [form for form in forms_of(key) if form in data], f"the key of {name} is in {place}"
    assert {"the", "cmdline", "environ", "a"} <= searched


def test_a7_a_key_in_the_variables_of_gunicorn_reaches_no_process(tmp_path: Path):
    key = new_key()
    command = (sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:create_app()")
    server = Server(command=command, TAILRACE_API_KEY=f"ops={key}")
    try:
        within(60, lambda: server._status_code("/livez") == 200, "the service answers")
        within(60, lambda: len(server.processes()) >= 5, "pool and model worker run")
        assert server._status_code("/v1/models") == 401
        server.http.headers["x-api-key"] = key
        assert server._status_code("/v1/models") in (200, 503)

        def visible() -> list[str]:
            found = []
            for process in server.processes():
                with suppress(psutil.NoSuchProcess, FileNotFoundError):
                    parts = [Path(f"/proc/{process.pid}/{part}") for part in ("cmdline", "environ")]
                    found += [str(path) for path in parts if key.encode() in path.read_bytes()]
            return found

        assert visible() == []
        assert key not in server.log
    finally:
        server.stop()
