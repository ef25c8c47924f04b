"""Hermes and Qwen: each call is a JSON object between two marks. Also what is used where a template knows no tools."""

from collections.abc import Callable, Iterable

from app.text.reply.calls import CallParser
from app.text.reply.scan import Steps, Words

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, also a list of such objects between the marks."""

    def __init__(self, names: Iterable[str], new_id: Callable[[], str], marks: tuple[str, str] = (OPEN, CLOSE)) -> None:
        self._open, self._close = Words(marks[0]), marks[1]
        super().__init__(names, new_id)

    def machine(self) -> Steps[None]:
        cursor = self.cursor
        while mark := (yield from cursor.until(self._open, self.out.content)):
            cursor.kept = [mark]
            if (yield from self.call_objects()):
                yield from cursor.space()
                yield from cursor.closing(self._close)

    def _cut_short(self) -> Steps[bool]:
        return (yield from self.cursor.closing(self._close))
