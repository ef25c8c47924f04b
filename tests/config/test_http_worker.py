"""The socket of a client takes everything, whether the kernel has room for it or not."""

import gevent
import pytest
from gevent import socket

from config.http_worker import ClientSocket


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    client = ClientSocket(ours.family, ours.type, ours.proto, fileno=ours.detach())
    yield client, theirs
    client.close()
    theirs.close()


def test_what_the_kernel_takes_at_once_is_sent_at_once(connection):
    client, theirs = connection
    client.sendall(b"5\r\nhello\r\n")
    assert theirs.recv(100) == b"5\r\nhello\r\n"


def test_more_than_the_kernel_takes_is_sent_as_the_other_side_reads(connection):
    client, theirs = connection
    data = bytes(range(256)) * 20_000
    writer = gevent.spawn(client.sendall, data)
    gevent.sleep(0)
    assert not writer.dead
    received = bytearray()
    while len(received) < len(data):
        received += theirs.recv(65536)
    writer.get(timeout=5)
    assert received == data


def test_a_blocked_send_ends_when_the_connection_is_cut(connection):
    client, _ = connection
    gevent.spawn_later(0.01, client.shutdown, socket.SHUT_RDWR)
    with gevent.Timeout(5), pytest.raises(OSError):  # noqa: PT011 - which one depends on who notices first
        client.sendall(bytes(10_000_000))
