"""Mistral: a mark, and behind it a list of JSON objects (up to v7 of its tokenizer), or a name and its arguments."""

import re
from collections.abc import Callable, Iterable

from app.text.reply.calls import CallParser
from app.text.reply.scan import Steps, Words

CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
_CALL_ID = "[CALL_ID]"
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_LONGEST_ID = 64


class MistralParser(CallParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` or ``[TOOL_CALLS]name[ARGS]{...}``, one mark for each."""

    def __init__(self, names: Iterable[str], new_id: Callable[[], str]) -> None:
        self._mark = Words(CALLS)
        super().__init__(names, new_id)

    def machine(self) -> Steps[None]:
        cursor = self.cursor
        while mark := (yield from cursor.until(self._mark, self.out.content)):
            cursor.kept = [mark]
            yield from cursor.space()
            first = yield from cursor.peek()
            if first and first in "[{":
                yield from self.call_objects()
            elif not (yield from self._named()):
                self.give_up()
            else:
                cursor.kept = None

    def _named(self) -> Steps[bool]:
        cursor = self.cursor
        name = yield from cursor.match(_NAME, self.longest_name + 1)
        if name is None or name not in self.names:
            return False
        if (yield from cursor.word(_CALL_ID)):
            yield from cursor.match(_NAME, _LONGEST_ID)
        yield from cursor.word(ARGS)
        yield from cursor.space()
        if (yield from cursor.peek()) != "{":
            return False
        return (yield from self.arguments(name))
