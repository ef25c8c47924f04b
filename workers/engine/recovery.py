"""After a pass that failed: who cannot be computed even alone is to blame, and all others go on as if nothing was.

The pass is repeated in halves, which finds the culprit in few passes. Where memory was short, smaller passes may be all
that it takes: then nobody is to blame, and the `workers.engine.ceiling` keeps the passes that follow small.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import ENOMEM

import torch

from config import logs
from workers.engine.errors import OutOfMemory, StickyDeviceError
from workers.engine.flat_batch import Computed, FlatBatch, Step, flatten
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.sequence import Sequence, State
from workers.messages import Failed, GenerateJob, Report

log = logs.logger(__name__)

# How torch, its libraries and C++ say that there is no memory, where they have no exception of its own for it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "_alloc_failed", "bad_alloc")
_STICKY = "CUDA error"
# Seconds after which a request that there was no memory for is worth another try.
_RETRY_S = 10.0
# Seconds between two walks of the garbage collector, which may take a second.
_COLLECTION_S = 10.0


@dataclass
class Outcome:
    """What came of a pass: reports, and items that must be computed again, with the reason."""

    reports: list[Report] = field(default_factory=list)
    failed: list[tuple[list[Scheduled], Exception]] = field(default_factory=list)


class Recovery:
    """Repeats what failed, in smaller passes.

    ``digest`` turns a computed pass into its outcome; ``give_up`` ends the request of a sequence because of an error.
    """

    def __init__(
        self,
        step: Callable[[], Step],
        scheduler: Scheduler,
        digest: Callable[[FlatBatch, Computed], Outcome],
        give_up: Callable[[Sequence, Exception], list[Report]],
    ) -> None:
        self.out_of_memory = 0
        self._step = step
        self._scheduler = scheduler
        self._digest = digest
        self._give_up = give_up
        self._culprits = 0
        self._next_collection = 0.0

    def attempt(self, items: list[Scheduled]) -> Outcome:
        """Compute a pass and digest it."""
        try:
            batch = flatten(items)
            result = self._step().compute(batch)
        except Exception as error:
            failure = tamed(error)
        else:
            return self._digest(batch, result)
        return Outcome(failed=[(items, failure)])

    def recover(self, outcome: Outcome) -> list[Report]:
        """Return the reports of a pass of which something failed, with those of what was computed again."""
        reports = outcome.reports
        short: list[list[Scheduled]] = []
        for items, failure in outcome.failed:
            culprits = self._culprits
            log.info("a pass failed: trying smaller ones", sequences=len(items), reason=str(failure))
            reports += self._again(items, failure)
            if is_out_of_memory(failure) and culprits == self._culprits:
                short.append(items)
        ceiling = self._scheduler.ceiling
        before = ceiling.rows, ceiling.tokens
        for items in short:
            ceiling.lower(len(items), sum(i.tokens for i in items if i.tokens > 1))
        if (ceiling.rows, ceiling.tokens) != before:
            log.warning(
                "short of memory: smaller passes", most_sequences=ceiling.rows, most_prompt_tokens=ceiling.tokens
            )
        return reports

    def _again(self, items: list[Scheduled], failure: Exception) -> list[Report]:
        """Compute again what failed because of ``failure``."""
        short = is_out_of_memory(failure)
        if short:
            self.out_of_memory += 1
            free_memory()
        items = [item for item in items if item.sequence.state is State.RUNNING]
        if not items:
            return []
        families = _families(items)
        if len(families) > 1:
            half = len(families) // 2
            parts = [[item for family in part for item in family] for part in (families[:half], families[half:])]
            return [report for part in parts for report in self._repeated(part)]
        if not short:
            return self._blame(items[0].sequence, failure)
        if items[0].tokens > 1:
            # What is left of the slice is read by the passes that follow.
            item = items[0]
            return self._repeated([Scheduled(item.sequence, item.tokens // 2, item.copies)])
        return self._last_attempt(items)

    def _repeated(self, items: list[Scheduled]) -> list[Report]:
        # Another one's failure may have ended a request of these.
        items = [item for item in items if item.sequence.state is State.RUNNING]
        if not items:
            return []
        outcome = self.attempt(items)
        for failed, failure in outcome.failed:
            outcome.reports += self._again(failed, failure)
        return outcome.reports

    def _last_attempt(self, items: list[Scheduled]) -> list[Report]:
        """Compute one token of one request, with all the memory that can be had: beams one after the other."""
        now = time.monotonic()
        if now >= self._next_collection:
            self._next_collection = now + _COLLECTION_S
            gc.collect()
            free_memory()
        try:
            results = [self._alone(item) for item in items]
            outcome = self._digest(flatten(items), results[0] if len(results) == 1 else _joined(results))
        except Exception as error:
            outcome = Outcome(failed=[(items, tamed(error))])
        for failed, failure in outcome.failed:
            self.out_of_memory += is_out_of_memory(failure)
            outcome.reports += self._blame(failed[0].sequence, failure)
        return outcome.reports

    def _alone(self, item: Scheduled) -> Computed:
        """Compute one token, at the second try if need be; the result is good beyond the next pass."""
        batch = flatten([item])
        try:
            result = self._step().compute(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.out_of_memory += 1
            result = None
        if result is None:
            free_memory()
            result = self._step().compute(batch)
        return Computed(result.logits.clone(), result.best.clone(), result.hidden)

    def _blame(self, sequence: Sequence, failure: Exception) -> list[Report]:
        self._culprits += 1
        return self._give_up(sequence, failure)


def rewound(sequence: Sequence, tokens: int) -> Scheduled:
    """Return what computes the last ``tokens`` tokens of ``sequence`` once more: the same numbers in the same places.

    The blocks are there, and whoever shares them may share them on.
    """
    sequence.computed -= tokens
    return Scheduled(sequence, tokens)


def tamed(error: Exception) -> Exception:
    """Return ``error`` as something that can be kept: frames that an exception came through hold on to their tensors,
    which is the last that is wanted when memory is short.

    Raises `StickyDeviceError` for an error after which the device computes nothing any more in this process.
    """
    if is_out_of_memory(error):
        return OutOfMemory(" ".join(str(error).split())[:300])
    if isinstance(error, RuntimeError) and (isinstance(error, torch.AcceleratorError) or _STICKY in str(error)):
        raise StickyDeviceError(str(error)) from error
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` says that memory is short, the device's or the machine's, and nothing worse."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _NO_MEMORY)


def no_memory(job_id: str) -> Failed:
    """Return the end of a job that there is not enough memory for, even alone."""
    message = "There is not enough memory for this request now."
    return Failed(id=job_id, kind="unavailable", message=message, cause="memory", retry_after=_RETRY_S)


def free_memory() -> None:
    """Give back what torch keeps of the device's memory for later."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _families(items: list[Scheduled]) -> list[list[Scheduled]]:
    """Put beams of one search together, which draw from each other's logits; everything else is alone."""
    families: dict[object, list[Scheduled]] = {}
    for item in items:
        job = item.sequence.job
        together = isinstance(job, GenerateJob) and job.beams
        families.setdefault(job.id if together else id(item), []).append(item)
    return list(families.values())


def _joined(results: list[Computed]) -> Computed:
    return Computed(torch.cat([r.logits for r in results]), torch.cat([r.best for r in results]), None)
