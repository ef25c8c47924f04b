"""Frames on a byte stream: four bytes of length (big-endian), then one msgpack-encoded message.

Used on the pool's Unix socket and on the pipe from a model worker. Pure bytes in, messages out: no I/O here, so the
same code serves gevent sockets, selectors and tests.
"""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 64 * 1024 * 1024
# How much to read at a time. A buffer of 128 KiB or more is mapped anew by malloc each time, which costs ten times as
# much as reading the few kilobytes that one step of a model is.
READ_BYTES = 64 * 1024
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


class WireError(Exception):
    """The bytes are no frame of ours: treat the sender as dead."""


def encode(message: object) -> bytes:
    """Return ``message`` as one frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Decoder(Generic[T]):
    """Turns a stream of bytes, cut anywhere, into messages of one type.

    >>> decoder = Decoder(Events)
    >>> for message in decoder.feed(chunk): ...
    """

    def __init__(self, message_type: type[T] | object) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Yield each message that ``data`` completes. Raises `WireError` on anything that is no valid frame."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise WireError(f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
                end = start + _LENGTH.size + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + _LENGTH.size : end])
                start = end
                try:
                    yield self._decoder.decode(body)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    # A text that is no UTF-8 is not msgspec's own error.
                    raise WireError(f"invalid message: {error}") from error
        finally:
            del buffer[:start]
