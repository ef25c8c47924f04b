"""What is read out of the bytes of an answer: texts, their times, gaps, errors."""

import json

import pytest

from benchmarks.answers import read_answer
from benchmarks.load import Stream
from tests.benchmarks.sse_server import DONE, END, HEAD, chunk, event


def whole(*texts: str) -> bytes:
    body = b"".join(chunk(event(text)) for text in texts)
    return HEAD + chunk(event(None)) + body + chunk(event(None, "length")) + chunk(DONE) + END


def test_a_piece_of_text_has_the_time_when_its_last_byte_came():
    first, second, rest = event(" one"), event(" two"), event(None, "length")
    split = len(second) // 2
    body = [
        (1.0, HEAD + chunk(event(None))),
        (2.0, chunk(first)),
        (3.0, chunk(second[:split])),
        (4.5, chunk(second[split:])),
        (5.0, chunk(rest) + END),
    ]
    answer = read_answer(Stream(0.5, body, ended_at=5.0))
    assert answer.texts == [(2.0, " one"), (4.5, " two")]
    assert answer.first_text_s == 1.5
    assert answer.gaps() == [2.5]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_where_the_bytes_were_cut_makes_no_difference(size):
    data = whole(" ein", " schön", " 💧")
    pieces = [(float(at), data[at : at + size]) for at in range(0, len(data), size)]
    answer = read_answer(Stream(0.0, pieces, ended_at=1.0))
    assert (answer.text, answer.finish_reason, answer.error) == (" ein schön 💧", "length", None)


def test_a_body_without_chunks_is_read_to_its_end():
    data = b"HTTP/1.0 200 OK\r\n\r\n" + event(" a") + b": still here\n\n" + event(" b", "stop") + DONE
    answer = read_answer(Stream(0.0, [(1.0, data[:40]), (2.0, data[40:])], ended_at=3.0))
    assert (answer.text, answer.finish_reason, answer.error) == (" a b", "stop", None)


def test_gaps_are_those_that_end_in_the_time_asked_for():
    pieces = [(1.0, HEAD)] + [(at, chunk(event("x"))) for at in (1.0, 2.0, 4.0, 7.0)]
    answer = read_answer(Stream(0.0, pieces))
    assert answer.gaps() == [1.0, 2.0, 3.0]
    assert answer.gaps(since=2.0, until=4.0) == [2.0]


def test_an_error_within_the_stream_is_the_answers_error():
    data = HEAD + chunk(event(" a")) + chunk(b"data: " + json.dumps({"error": {"message": "lost"}}).encode() + b"\n\n")
    answer = read_answer(Stream(0.0, [(1.0, data + END)], ended_at=2.0))
    assert answer.text == " a"
    assert "lost" in answer.error


def test_what_is_no_json_is_an_error():
    answer = read_answer(Stream(0.0, [(1.0, HEAD + chunk(b"data: {oops\n\n") + END)], ended_at=2.0))
    assert answer.error
