"""B17, B21: what is no HTTP or not our HTTP, and that nobody else's answer is touched by it."""

import json
import socket
import threading
from typing import Any

import pytest

from tests.battery.answers import Door, check_answer
from tests.battery.conftest import Battery

CHAT = "/v1/chat/completions"
BODY = b'{"messages": "x", "max_tokens": 1}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /v1/models/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

NO_HTTP: dict[str, bytes] = {
    "CL and TE": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE and CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two CL": POST + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\n{}  " + SMUGGLED,
    "CL list": POST + b"Content-Length: 4, 4\r\n\r\n{}  " + SMUGGLED,
    "CL with plus": POST + b"Content-Length: +4\r\n\r\n{}  " + SMUGGLED,
    "negative CL": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "CL no number": POST + b"Content-Length: 0x10\r\n\r\n" + SMUGGLED,
    "TE xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE of 1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size overflow": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size with 0x": POST + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size negative": POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk without end": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}X0\r\n\r\n" + SMUGGLED,
    "folded header": POST + b"X-A: b\r\n c\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "space before colon": POST + b"Content-Length : 2\r\n\r\n{}" + SMUGGLED,
    "CR in value": POST + b"X-A: b\rX-B: c\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "NUL in value": POST + b"X-A: b\x00c\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "name with space": POST + b"X A: b\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "version": POST.replace(b"HTTP/1.1", b"HTTP/9.9") + b"Content-Length: 2\r\n\r\n{}" + SMUGGLED,
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 200 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


def talk(port: int, data: bytes, half_close: bool = True) -> bytes:
    """Send bytes on a connection of their own and return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass
        return received


def answers(received: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Take a connection's bytes apart; every body has a Content-Length."""
    found = []
    while received.startswith(b"HTTP/"):
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", len(rest)))
        found.append((int(status.split()[1]), headers, rest[:length]))
        received = rest[length:]
    assert received == b"", received[:300]
    return found


@pytest.mark.parametrize("name", NO_HTTP)
def test_b17_what_is_no_http_is_refused_and_the_connection_closed(door: Door, name: str) -> None:
    # A chunk that never comes is waited for, unless nothing more can come.
    found = answers(talk(door.port, NO_HTTP[name], half_close=name == "chunk size overflow"))
    assert len(found) <= 1, found
    for status, headers, body in found:
        assert 400 <= status < 600, (status, body)
        if name == "chunk size overflow" and (status, body) == (499, b""):
            continue  # to a client that has left
        assert status in (400, 405, 408, 414, 417, 431, 501, 505), (status, body)
        assert b"smuggled" not in body
        if headers.get("content-type") == "text/html":
            # What nginx itself does not implement has no page of ours.
            assert door.name == "nginx"
            assert status in (501, 505)
            continue
        check_answer(status, headers, body)


@pytest.mark.parametrize("host", ["x/v1?a=", "x:y", "", "x y", "[::1", "a" * 300, "127.0.0.1@evil", "x/../livez"])
def test_b17_the_host_decides_nothing(door: Door, host: str) -> None:
    request = f"GET /nowhere HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    # To a client that seems to have left nginx may send the head of an answer without its body.
    for status, headers, body in answers(talk(door.port, request, half_close=False)):
        assert status in (400, 403, 404, 421), (status, body)
        if headers.get("content-type") != "text/html":
            check_answer(status, headers, body)


@pytest.mark.parametrize("name", NO_HTTP)
def test_b17_a_neighbour_on_the_same_connections_gets_its_own_answers(unharmed: Battery, name: str) -> None:
    """nginx keeps its connections to gunicorn: what one client smuggles in would be the next one's answer."""
    door = unharmed.doors.get("nginx")
    if door is None:
        pytest.skip("there is no nginx here")
    wrong: list[Any] = []

    def ask() -> None:
        for number in range(8):
            canary = f"canary-{name.replace(' ', '-')}-{number}"
            answer = door.send("GET", f"/v1/models/{canary}")
            if answer.status_code != 404 or canary not in answer.text:
                wrong.append((canary, answer.status_code, answer.text))

    neighbour = threading.Thread(target=ask)
    neighbour.start()
    for _ in range(4):
        talk(door.port, NO_HTTP[name])
    neighbour.join()
    assert wrong == []
    assert door.send("GET", "/v1/models").json()["object"] == "list"


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/embeddings", "/tokenize"])
def test_b21_another_method(door: Door, route: str, method: str) -> None:
    answer = door.send(method, route)
    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/v1", "/v1/", "//v1/models", "/v1/chat/completions/x/y", "/V1/models"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_b21_an_unknown_url(door: Door, path: str, method: str) -> None:
    assert door.send(method, path).status_code in (404, 405)


def test_b21_options_and_head(door: Door) -> None:
    options = door.send("OPTIONS", CHAT)
    assert options.status_code in (200, 204, 405)
    assert "access-control-allow-origin" not in options.headers
    head = door.send("HEAD", "/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert door.send("HEAD", "/nowhere").status_code == 404
    trace = door.send("TRACE", "/v1/models")
    assert trace.status_code in (400, 405)
    assert "TRACE /" not in trace.text


def test_b21_expect_100_continue(door: Door) -> None:
    head = POST + f"Content-Length: {len(BODY)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", door.port), timeout=60) as connection:
        connection.sendall(head)
        assert b" 100 " in connection.recv(100)
        connection.sendall(BODY)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert b" 200 " in received.split(b"\r\n")[0] + b" "


def test_b21_another_expectation(straight: Door) -> None:
    found = answers(talk(straight.port, POST + b"Content-Length: 2\r\nExpect: a-miracle\r\n\r\n{}"))
    assert found[0][0] in (400, 417)
    check_answer(*found[0])


def test_b21_an_http_1_0_client_gets_a_whole_stream(door: Door) -> None:
    body = json.dumps({"messages": "x", "max_tokens": 3, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    received = talk(door.port, head.encode() + body, half_close=False)
    assert received.endswith(b"data: [DONE]\n\n")
    assert b"transfer-encoding" not in received.split(b"\r\n\r\n")[0].lower()
    # A stream that breaks off for such a client ends in an error event:
    # tests/app/test_streams.py, test_a_fault_in_the_middle_is_an_error_event_and_the_end[1.0]
