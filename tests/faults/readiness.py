"""What the pool says of itself, sampled all along beside a fault."""

import time
from contextlib import suppress
from pathlib import Path

from tests.beside import Beside
from tests.workers.pool.harness import Connection


class Readiness(Beside):
    """Samples the pool's readiness until the block is left::

    with Readiness(pool.path) as readiness:
        moment = time.monotonic()
        os.kill(...)
    assert readiness.false_within(moment) < 2.0
    """

    def __init__(self, path: Path) -> None:
        self.samples: list[tuple[float, bool]] = []
        self.slowest_answer_s = 0.0
        self._connection = Connection(path)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._connection.close()

    def false_within(self, moment: float) -> float:
        """Return the seconds from ``moment`` to the first sample after it that says not ready."""
        return next(at for at, ready in self.samples if at >= moment and not ready) - moment

    def always_true(self, since: float, until: float) -> bool:
        """Whether all samples between the two times say ready."""
        found = [ready for at, ready in self.samples if since <= at <= until]
        return bool(found) and all(found)

    def look(self) -> None:
        """Take a sample; none from a pool that is gone."""
        with suppress(OSError, EOFError):
            asked = time.monotonic()
            status = self._connection.ask_status()
            self.slowest_answer_s = max(self.slowest_answer_s, time.monotonic() - asked)
            self.samples.append((asked, status.ready))
