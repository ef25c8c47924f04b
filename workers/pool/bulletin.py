"""What the pool tells the service's main process of itself, each second: a line of text, and whether all is well.

The arbiter reads it too, so only the standard library is needed at run time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.messages import PoolStatus, WorkerStatus

# Stands before a bulletin on the lifeline.
MARK = "STATE "

# A model worker that loads and gives no sign for so long is stuck. The longest honest silences are the reading of a
# large file over a slow network, and the capture of CUDA graphs.
LONGEST_SILENT_LOAD_S = 300.0


@dataclass(frozen=True, slots=True)
class Bulletin:
    """``text`` is for people. ``ready``: a token can be produced now. ``moving``: whatever has work to do gets on.

    A model worker that is dead and waits for its next start moves: the pool is at it. One that hangs does not, nor one
    that is stuck while it loads, unless another one serves; nobody would gain if that were ended too.
    """

    text: str
    ready: bool = False
    moving: bool = True

    @classmethod
    def of(cls, status: "PoolStatus") -> "Bulletin":
        """Return what there is to say of a pool."""
        moving = status.ready or status.draining or not any(map(_stuck, status.workers))
        return cls(_text(status), status.ready, moving)

    def line(self) -> bytes:
        """Return the bulletin as a line for `parse`."""
        return f"{MARK}{json.dumps(asdict(self))}\n".encode()

    @classmethod
    def parse(cls, line: str) -> "Bulletin | None":
        """Return the bulletin of a line without its end; None if it is something else."""
        if not line.startswith(MARK):
            return None
        try:
            return cls(**json.loads(line.removeprefix(MARK)))
        except (ValueError, TypeError):
            return None


def _stuck(worker: "WorkerStatus") -> bool:
    if worker.state == "hung":
        return True
    return worker.state in ("starting", "loading") and worker.idle_s > LONGEST_SILENT_LOAD_S


def _text(status: "PoolStatus") -> str:
    ready = [worker for worker in status.workers if worker.state == "ready"]
    jobs = f"{status.running} running, {status.queued} waiting"
    if status.draining:
        return f"stopping: {jobs}"
    if ready:
        workers = f"{len(ready)} worker{'s' if len(ready) > 1 else ''}"
        told = [f"ready: {workers}, {jobs}"]
        told += [f"worker {worker.index} {_said_of(worker)}" for worker in status.workers if worker not in ready]
        return "; ".join(told)
    loading = [worker for worker in status.workers if worker.state in ("starting", "loading")]
    told = [_loading(loading)] if loading else []
    for worker in status.workers:
        if worker not in loading:
            told.append(f"worker {worker.index} {_said_of(worker)}")
        elif worker.restarts and worker.cause:
            told.append(f"worker {worker.index} died: {worker.cause}")
    return "; ".join(told)


def _loading(workers: "Sequence[WorkerStatus]") -> str:
    """The one that is furthest is the one that is waited for."""
    furthest = max(workers, key=lambda worker: worker.progress)
    if furthest.state == "starting":
        return "starting a model worker"
    return f"loading the model: {furthest.progress:.0%}".replace("%", " %") + (
        f", {furthest.stage}" if furthest.stage else ""
    )


def _said_of(worker: "WorkerStatus") -> str:
    if worker.state == "dead":
        return f"died: {worker.cause or worker.stage or 'it was not seen how'}, respawning"
    if worker.state == "hung":
        return f"makes no step with work to do, for {worker.idle_s:.0f} s"
    if worker.state == "failed":
        return f"has failed: {worker.stage}"
    return _loading([worker])
