"""Llama 3: the text is a bare JSON object, or several with semicolons between them."""

from collections.abc import Callable, Iterable

from app.text.reply.calls import CallParser
from app.text.reply.scan import Steps, Words

TAG = "<|python_tag|>"


class Llama3Parser(CallParser):
    """``{"name": ..., "parameters": {...}}`` at the beginning of the text, or anywhere behind ``<|python_tag|>``."""

    def __init__(self, names: Iterable[str], new_id: Callable[[], str], tag: bool = True) -> None:
        self._tag = Words(TAG) if tag else Words()
        super().__init__(names, new_id)

    def machine(self) -> Steps[None]:
        cursor = self.cursor
        cursor.kept = []
        yield from cursor.space()
        if (yield from cursor.peek()) == "{":
            yield from self._objects()
        else:
            self.give_up()
        while mark := (yield from cursor.until(self._tag, self.out.content)):
            cursor.kept = [mark]
            yield from cursor.space()
            yield from self._objects()

    def _objects(self) -> Steps[None]:
        cursor = self.cursor
        # A JSON answer may well have a "name" that is a tool's; it hardly has parameters.
        while (yield from self.call_object(needs_arguments=True)):
            cursor.kept = []
            yield from cursor.space()
            if not (yield from cursor.word(";")):
                self.give_up()
                return
            yield from cursor.space()
            # Behind the semicolon, each may have a tag of its own.
            yield from cursor.word(TAG)
