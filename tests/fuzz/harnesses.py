"""What is fuzzed: each harness takes any bytes and raises if something does not hold that must always hold.

``make fuzz`` leads atheris through them; tests/fuzz/test_harnesses.py runs each a few thousand times without it.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import orjson
from pydantic import ValidationError

from app.api import sse
from app.api.json_gate import MAX_DEPTH, parse_object
from app.api.messages.request import CountTokensRequest, MessagesRequest
from app.api.responses.schemas import ResponseRequest
from app.api.schemas import (
    ApiRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    validate,
)
from app.api.scoring import RerankRequest, ScoreRequest
from app.api.stored import UpdateRequest
from app.errors import ApiError
from app.text.detokenizer import DetokenizerFactory
from app.text.errors import RequestError
from app.text.reply.parts import CallArguments, CallBegin, Content, Part, Reasoning, fold
from app.text.stop import StopStrings
from tests.app.reply.samples import FORMATS, parser
from tests.app.tiny import tokenizer
from workers.messages import ClientMessage, PoolMessage
from workers.wire import Decoder, WireError, encode


class Input:
    """Bytes taken apart into what a harness needs; when they run out, zeros and empty texts."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, below: int) -> int:
        self._at += 2
        return int.from_bytes(self._data[self._at - 2 : self._at], "big") % below

    def rest(self) -> bytes:
        rest, self._at = self._data[self._at :], len(self._data)
        return rest

    def cuts(self, length: int) -> list[int]:
        """Places to cut something of this length at, from beginning to end."""
        places = {self.number(length + 1) for _ in range(self.number(8))}
        return [0, *sorted(places - {0, length}), length]


def pieces(whole: Any, cuts: list[int]) -> list[Any]:
    """Return ``whole`` in pieces."""
    return [whole[start:end] for start, end in itertools.pairwise(cuts)]


def _number(digits: str) -> int | float:
    """What fits into 64 bits is an integer."""
    value = float(digits) if len(digits) > 20 else int(digits)
    return value if -(2**63) <= value < 2**64 else float(digits)


def gate(data: bytes) -> None:
    """Only a 400 or a harmless object comes out of the gate."""
    try:
        value = parse_object(data)
    except ApiError as error:
        assert error.status == 400  # noqa: PT017
        error.encoded().decode()
        return
    assert isinstance(value, dict)
    # It is what Python's own parser reads, no deeper than allowed, and can be written again.
    assert json.loads(data, parse_int=_number) == value
    orjson.dumps(value, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        node, depth = waiting.pop()
        assert depth <= MAX_DEPTH
        children = node.values() if isinstance(node, dict) else node
        waiting += [(child, depth + 1) for child in children if isinstance(child, dict | list)]


MODELS: tuple[type[ApiRequest], ...] = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ResponseRequest,
    MessagesRequest,
    CountTokensRequest,
    ScoreRequest,
    RerankRequest,
    UpdateRequest,
)


def schemas(data: bytes) -> None:
    """A request is taken, or refused by an answer that can be written."""
    source = Input(data)
    schema, strict = MODELS[source.number(len(MODELS))], bool(source.number(2))
    try:
        fields = parse_object(source.rest())
    except ApiError:
        return
    try:
        validate(schema, fields, strict)
    except ApiError as error:
        assert 400 <= error.status < 500  # noqa: PT017
        error.encoded()
    except RequestError as error:
        error.message.encode()
    except ValidationError:
        raise AssertionError("pydantic's own error got out") from None


def _flat(parts: list[Part]) -> list[Part]:
    """Neighbouring parts of one kind joined: how the text was cut must not matter, how the parts are may."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        match last, part:
            case (Content(a), Content(b)):
                joined[-1] = Content(a + b)
            case (Reasoning(a), Reasoning(b)):
                joined[-1] = Reasoning(a + b)
            case (CallArguments(i, a), CallArguments(j, b)) if i == j:
                joined[-1] = CallArguments(i, a + b)
            case _:
                joined.append(part)
    return joined


def replies(data: bytes) -> None:
    """Cutting does not matter, calls begin before their arguments and only known ones, and no text gets lost."""
    source = Input(data)
    kind = sorted(FORMATS)[source.number(len(FORMATS))]
    thinking = (None, True, False)[source.number(3)]
    length = source.number(4096)
    text = source.rest().decode("utf-8", "replace")
    cuts = [0, *sorted({(length * (i + 1)) % (len(text) + 1) for i in range(5)} - {0, len(text)}), len(text)]
    made = parser(FORMATS[kind], thinking)
    whole = [*made.push(text), *made.finish()]
    made = parser(FORMATS[kind], thinking)
    cut = [part for piece in pieces(text, cuts) for part in made.push(piece)]
    cut += made.finish()
    assert _flat(whole) == _flat(cut), (kind, thinking, text, cuts)
    begun: set[int] = set()
    for part in whole:
        if isinstance(part, CallBegin):
            assert part.call == len(begun)
            assert part.name in ("get_weather", "clock")
            begun.add(part.call)
        elif isinstance(part, CallArguments):
            assert part.call in begun
        else:
            assert part.text
    reply = fold(whole)
    for call in reply.calls:
        call.arguments.encode()
    if not reply.calls:
        # Without a call nothing but marks and white space may be missing.
        shown = reply.reasoning + reply.content
        assert set("".join(shown.split())) <= set(text)
        if "<" not in text and "[" not in text and "{" not in text:
            assert "".join(shown.split()) == "".join(text.split())


def frames(data: bytes) -> None:
    """Whatever the text, each event is an id and a line of JSON behind ``data: ``, and holds the text as it was."""
    source = Input(data)
    template = {"id": "x", "choices": [{"delta": {"content": sse.TextFrame.SLOT}, "index": source.number(9)}]}
    text = source.rest().decode("utf-8", "replace")
    ids = sse.EventIds("x")
    sent = sse.TextFrame(ids, sse.frame(template))(text) + ids.frame({"text": text, text: 1})
    sent += sse.OpenAIEnding().error(ApiError(500, text, param=text, code=text))
    events = read_events(sent)
    assert len(events) == 3
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == text
    assert json.loads(events[1])["text"] == text
    assert json.loads(events[2])["error"]["param"] == text


def read_events(sent: bytes) -> list[str]:
    """Read an event stream by the letter of the HTML standard: CR, LF and CR LF all end a line."""
    lines = sent.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events, data = [], []
    for line in lines:
        if line == "":
            if data:
                events.append("\n".join(data))
            data = []
        elif line.startswith("data: "):
            data.append(line[6:])
        else:
            assert line.startswith((":", "id: x:")), line
    assert data == []
    return events


def wire(data: bytes) -> None:
    """Bytes from a socket are messages or a `WireError`, however they are cut; a message comes back as it was."""
    source = Input(data)
    kind = (ClientMessage, PoolMessage)[source.number(2)]
    cuts = source.cuts(64)
    body = source.rest()
    framed = len(body).to_bytes(4, "big") + body if len(cuts) % 2 else body

    def read(parts: list[bytes]) -> tuple[list[Any], bool]:
        decoder: Decoder[Any] = Decoder(kind)
        found: list[Any] = []
        try:
            for part in parts:
                # One by one: what came before the error counts.
                for message in decoder.feed(part):
                    found.append(message)  # noqa: PERF402
        except WireError:
            return found, True
        return found, False

    once = read([framed])
    assert read(pieces(framed, sorted({min(cut, len(framed)) for cut in cuts} | {0, len(framed)}))) == once
    for message in once[0]:
        assert list(Decoder[Any](kind).feed(encode(message))) == [message] or message != message


def stops(data: bytes) -> None:
    """The text ends before the first stop string that is complete, whatever the cuts; nothing of it gets out."""
    source = Input(data)
    count, cut_seed = 1 + source.number(4), source.number(997)
    text = source.rest().decode("utf-8", "replace")
    given, _, text = text.partition("\n")
    strings = [each for each in given.split(",")[:count] if each]
    if not strings:
        return
    cuts = [0, *sorted({(cut_seed * (i + 3)) % (len(text) + 1) for i in range(6)} - {0, len(text)}), len(text)]
    made = StopStrings(strings).matcher()
    shown = "".join(made.push(piece) for piece in pieces(text, cuts)) + made.flush()
    ends = [text.index(each) + len(each) for each in strings if each in text]
    if not ends:
        assert made.matched is None
        assert shown == text
        return
    longest = max((each for each in strings if text[: min(ends)].endswith(each)), key=len)
    assert made.matched == longest
    assert shown == text[: min(ends) - len(longest)]


_tokenizer = tokenizer()
_detokenizers = DetokenizerFactory(_tokenizer)
_vocabulary = _tokenizer.get_vocab_size()


def detokenizer(data: bytes) -> None:
    """Tokens are text that holds no half of a character, the same however they come."""
    source = Input(data)
    cut = source.number(64)
    ids = [value * 2 % (_vocabulary + 3) for value in source.rest()]
    ids = [min(each + (at % 2), _vocabulary + 2) for at, each in enumerate(ids)]
    made = _detokenizers.start()
    whole = made.push(ids) + made.flush() if ids else ""
    made = _detokenizers.start()
    cut = min(cut, len(ids))
    text = "".join([made.push(part) for part in (ids[:cut], ids[cut:]) if part]) + made.flush()
    assert text == whole
    made = _detokenizers.start()
    assert "".join(made.push([each]) for each in ids) + made.flush() == whole
    whole.encode()
    plain = b"".join(_detokenizers._piece(each) for each in ids)
    assert whole == plain.decode("utf-8", "replace")


HARNESSES: dict[str, Callable[[bytes], None]] = {
    "gate": gate,
    "schemas": schemas,
    "replies": replies,
    "sse": frames,
    "wire": wire,
    "stops": stops,
    "detokenizer": detokenizer,
}
