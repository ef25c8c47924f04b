"""Something that is looked at again and again, on a thread of its own, while a test goes on."""

import threading
from typing import Self

_LAST_LOOK_S = 60.0


class Beside:
    """Calls `look` every ``period_s`` seconds until the block is left."""

    period_s = 0.1

    def look(self) -> None:
        """Look once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_LAST_LOOK_S)

    def _run(self) -> None:
        while not self._over.wait(self.period_s):
            self.look()
