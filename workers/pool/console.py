"""What the operator sees while the model loads: a progress bar on a terminal, log lines elsewhere."""

import contextlib
import select
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from config import logs
from workers.messages import WorkerStatus

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logs.logger("tailrace.pool")


class Console:
    """Draws on standard error, from the pool's own loop: no thread, no cursor left hidden.

    The loop must neither wait for a terminal that is stopped (Ctrl-S) nor end with one that is gone: what cannot be
    drawn is left out, and a terminal that fails is none any more.

    ``url`` is where clients reach the service; None for a pool that runs on its own and knows of no HTTP server.
    """

    def __init__(self, url: str | None, *, terminal: bool | None = None) -> None:
        self._url = url
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._logged: dict[int, tuple[str, int]] = {}

    def show(self, workers: Sequence[WorkerStatus]) -> None:
        """Show how far each worker is."""
        if not self._terminal:
            self._log(workers)
        elif _takes_more():
            with self._perhaps_gone():
                self._draw(workers)

    def ready(self) -> None:
        """Say that the first worker answers: the address, and a command to try."""
        self.close()
        if self._url is None:
            log.info("the pool is ready")
        elif not self._terminal:
            log.info("ready", url=self._url)
        elif _takes_more():
            with self._perhaps_gone():
                print(_BANNER.format(url=self._url), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bars away."""
        progress, self._progress = self._progress, None
        self._tasks.clear()
        if progress is not None and _takes_more():
            with self._perhaps_gone():
                progress.stop()

    @contextlib.contextmanager
    def _perhaps_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._terminal, self._progress = False, None
            self._tasks.clear()

    def _draw(self, workers: Sequence[WorkerStatus]) -> None:
        loading = [worker for worker in workers if worker.state in ("starting", "loading")]
        if not loading:
            self.close()
            return
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
            self._progress.console.show_cursor(True)  # whoever kills us would leave a terminal without one
        for worker in loading:
            text = f"worker {worker.index} ({worker.device}): {worker.stage or 'starting'}"
            if worker.index not in self._tasks:
                self._tasks[worker.index] = self._progress.add_task(text, total=1.0)
            self._progress.update(self._tasks[worker.index], completed=worker.progress, description=text)
        for index in [index for index in self._tasks if all(worker.index != index for worker in loading)]:
            self._progress.remove_task(self._tasks.pop(index))
        self._progress.refresh()

    def _log(self, workers: Sequence[WorkerStatus]) -> None:
        """One line for each stage and each quarter of it."""
        for worker in workers:
            if worker.state != "loading":
                self._logged.pop(worker.index, None)
                continue
            step = (worker.stage, int(worker.progress * 4))
            if self._logged.get(worker.index) != step:
                self._logged[worker.index] = step
                percent = round(worker.progress * 100)
                log.info("model worker loading", worker=worker.index, stage=worker.stage, percent=percent)


def _takes_more() -> bool:
    """Whether something can be written to standard error without waiting."""
    room = select.poll()
    try:
        room.register(sys.stderr, select.POLLOUT)
    except (OSError, ValueError):  # no descriptor: nothing to wait for
        return True
    return bool(room.poll(0))


def _new_progress() -> "Progress":
    # Imported here: who has no terminal does not need it.
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=RichConsole(file=sys.stderr),
        auto_refresh=False,
        transient=True,
        # Logs of the same process go above the bar; those of the others cannot be helped.
        redirect_stdout=False,
        redirect_stderr=False,
    )


_BANNER = """
  Tailrace is ready at {url}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""
