"""Collects what parsers find, as parts."""

from collections.abc import Callable, Iterable

from app.text.reply.parts import CallArguments, CallBegin, Content, Part
from app.text.reply.scan import SPACE


class Writer:
    """The parts of one reply. White space of the content that stands right beside a call is left out."""

    __slots__ = ("_fresh", "_new_id", "_parts", "_space", "calls")

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._parts: list[Part] = []
        # White space at the end of the content that nothing has followed yet.
        self._space: list[str] = []
        # Whether the last thing was a call.
        self._fresh = False
        self.calls = 0

    def content(self, text: str) -> None:
        """More content."""
        if self._fresh:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            if self._space:
                self._parts += map(Content, self._space)
                self._space.clear()
            self._parts.append(Content(body))
            self._fresh = False
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def begin(self, name: str) -> None:
        """A call of the tool ``name`` begins."""
        self._space.clear()
        self._parts.append(CallBegin(self.calls, self._new_id(), name))
        self.calls += 1
        self._fresh = True

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        if text:
            self._parts.append(CallArguments(self.calls - 1, text))

    def finish(self) -> None:
        """No more will come."""
        self._parts += map(Content, self._space)
        self._space.clear()

    def take(self) -> list[Part]:
        """Return the new parts, neighbours of one kind as one."""
        parts, self._parts = self._parts, []
        return parts if len(parts) < 2 else list(_merged(parts))


def _merged(parts: Iterable[Part]) -> Iterable[Part]:
    texts: list[str] = []
    last: Part | None = None
    for part in parts:
        if isinstance(part, CallBegin) or last is None or type(part) is not type(last):
            if last is not None:
                yield _joined(last, texts)
            last, texts = part, []
        if not isinstance(part, CallBegin):
            texts.append(part.text)
    if last is not None:
        yield _joined(last, texts)


def _joined(part: Part, texts: list[str]) -> Part:
    match part:
        case Content():
            return Content("".join(texts))
        case CallArguments(call, _):
            return CallArguments(call, "".join(texts))
        case _:
            return part
