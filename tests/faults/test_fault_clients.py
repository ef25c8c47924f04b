"""HTTP workers that misbehave: only they suffer."""

import struct

import pytest

from tests.workers.pool.harness import job, wait_until
from tests.workers.pool.scripted_engine import BURST, PLAIN, SILENT, expected
from workers.messages import StatusQuery
from workers.wire import encode


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        struct.pack(">I", 3) + b"abc",
        b"GET / HTTP/1.1\r\n\r\n",
        encode({"type": "Nonsense"}),
        encode([1]),
        struct.pack(">I", 9) + b"\x81\xa4type\xa2\xc3\x28",
    ],
    ids=["length", "no message", "http", "unknown type", "list", "no text"],
)
def test_garbage_on_the_socket_cuts_off_its_sender_only(start_pool, data):
    pool = start_pool("--max-batch", "1")
    bad, good = pool.connect(workers=1), pool.connect(workers=1)
    bad.send(*(job([SILENT]) for _ in range(3)))
    bad.socket.sendall(data)
    bad.wait_end()
    wanted = job([PLAIN])
    good.send(wanted)
    good.wait_answer(wanted)
    assert good.tokens(wanted) == expected(wanted)


def test_a_client_that_dies_inside_a_message_leaves_nothing_behind(start_pool):
    pool = start_pool()
    bad, good = pool.connect(workers=1), pool.connect(workers=1)
    bad.socket.sendall(encode(job([SILENT]))[:-3])
    bad.close()
    good.send(StatusQuery())
    good.status = None
    good.wait(lambda: good.status)
    assert (good.status.running, good.status.queued) == (0, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--client-bytes", "1000000"), "bytes unread"), (("--client-patience", "0.5"), "read nothing for")],
    ids=["too much", "too long"],
)
def test_a_client_that_stops_reading_is_cut_off_and_slows_nobody(start_pool, options, reason):
    pool = start_pool(*options)
    slow, good = pool.connect(workers=1), pool.connect(workers=1)
    slow.send(job([BURST], max_tokens=3_000_000))
    wanted = job([PLAIN], max_tokens=200)
    good.send(wanted)
    good.wait_answer(wanted)
    assert good.tokens(wanted) == expected(wanted)
    wait_until(lambda: reason in pool.log, "the slow client's end")
    good.send(StatusQuery())
    good.status = None
    good.wait(lambda: good.status)
    assert good.status.running == 0
