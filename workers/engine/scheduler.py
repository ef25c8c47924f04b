"""Decides what the next forward pass carries.

Continuous batching with chunked prefill: every running sequence's next token goes into every pass, and a bounded slice
of the prompts that are still being read goes along (Orca, Yu et al. 2022; Sarathi, Agrawal et al. 2023). When blocks
run out, the sequence that came last is preempted: its blocks are freed, its tokens kept, and it is computed again
later.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.engine.ceiling import Ceiling
from workers.engine.errors import OutOfBlocks
from workers.engine.kv_cache import BlockPool
from workers.engine.pace import IDLE_FACTOR, SMALLEST_CHUNK, SMALLEST_EXTRA, Pace
from workers.engine.sequence import Sequence, State
from workers.messages import EmbedJob, GenerateJob


@dataclass(frozen=True)
class Scheduled:
    """``tokens`` tokens of ``sequence`` go into the next pass; ``copies`` are block copies (source, target) before
    it.
    """

    sequence: Sequence
    tokens: int
    copies: list[tuple[int, int]] = field(default_factory=list)


def rows_of(sequence: Sequence) -> int:
    """Return the rows that the sequence will take once its prompt is read: all choices or beams of an unforked job."""
    job = sequence.job
    if isinstance(job, EmbedJob) or sequence.forked:
        return 1
    return job.beams.num_beams if job.beams else job.n


class Scheduler:
    """Holds the waiting and the running sequences of one model worker."""

    def __init__(self, pool: BlockPool, max_batch: int, prefill_chunk: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.pace = Pace(prefill_chunk)
        self.ceiling = Ceiling(max_batch, prefill_chunk * IDLE_FACTOR)
        self.preemptions = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def note_pass(self, batch: list[Scheduled], seconds: float) -> None:
        """Learn from a pass that went well."""
        if self.ceiling.lowered:
            self.ceiling.note_quiet_pass()
        slices = [item.tokens for item in batch if item.tokens > 1]
        self.pace.note(len(batch) - len(slices), sum(slices), seconds)

    def never_fits(self, job: GenerateJob | EmbedJob) -> str | None:
        """Return why the job could not be served even alone, or None."""
        size = self.pool.block_size
        if isinstance(job, EmbedJob):
            rows, blocks = 1, -(-len(job.prompt) // size)
        else:
            rows = job.beams.num_beams if job.beams else job.n
            blocks = -(-(len(job.prompt) + job.max_tokens) // size)
            if job.beams:
                # Beams go on together or not at all: shared prompt, own tails.
                blocks += (rows - 1) * (-(-job.max_tokens // size) + 1)
        if rows > self.max_batch:
            return f"{rows} choices or beams are more than the {self.max_batch} rows of a batch"
        if blocks > self.pool.count:
            return f"the request needs {blocks * size} tokens of KV cache, {self.pool.count * size} exist"
        return None

    def schedule(self) -> list[Scheduled]:
        """Return the next pass: decoding sequences first, then slices of prompts. Empty when nothing can run."""
        if len(self.running) > self.ceiling.rows:
            self._shed()
        batch = self._schedule_decodes()
        self._admit()
        reading = [s for s in self.running if s.pending > 1 or (s.pending == 1 and s.fresh)]
        budget = min(self.pace.budget(len(reading), len(batch)), self.ceiling.tokens)
        smallest = SMALLEST_EXTRA if batch else SMALLEST_CHUNK
        for left, sequence in zip(range(len(reading), 0, -1), reading, strict=True):
            # Equal shares: a short prompt is not stuck behind a long one.
            tokens = min(sequence.pending, max(smallest, budget // left), budget)
            if tokens <= 0:
                break
            try:
                batch.append(Scheduled(sequence, tokens, sequence.reserve(tokens, self.pool)))
            except OutOfBlocks:
                continue
            budget -= tokens
        if not batch and self.running:
            # Everybody is stuck half-way through a prompt: the last one makes room.
            self.preempt(self.running[-1])
            return self.schedule()
        for item in batch:
            item.sequence.fresh = False
        return batch

    def _schedule_decodes(self) -> list[Scheduled]:
        batch: list[Scheduled] = []
        for sequence in list(self.running):
            if sequence.pending != 1 or sequence.fresh:
                continue
            while sequence.state is State.RUNNING:
                try:
                    batch.append(Scheduled(sequence, 1, sequence.reserve(1, self.pool)))
                    break
                except OutOfBlocks:
                    self.preempt(self.running[-1])
        return [item for item in batch if item.sequence.state is State.RUNNING]

    def _admit(self) -> None:
        """Move sequences from waiting to running, in order, while rows and blocks allow."""
        rows = sum(rows_of(s) for s in self.running)
        # One block per running row stays free, or the newcomer would soon be thrown out again.
        reserve = len(self.running)
        most = self.ceiling.rows
        # Who needs more rows than there may be now runs alone: `never_fits` has seen to it that that is possible.
        while self.waiting and (rows + rows_of(self.waiting[0]) <= most or not self.running):
            sequence = self.waiting[0]
            sequence.cached_tokens = sequence.take_cached_prefix(self.pool)
            if self.pool.free < sequence.blocks_needed(sequence.pending, self.pool.block_size) + reserve:
                sequence.release_blocks(self.pool)
                return
            self.waiting.popleft()
            sequence.state = State.RUNNING
            sequence.fresh = True
            self.running.append(sequence)
            rows += rows_of(sequence)
            reserve += sequence.blocks_needed(sequence.pending, self.pool.block_size) + 1

    def _shed(self) -> None:
        """Preempt who came last, until no more run than may. Beams stay together, though they be more than that."""
        while len(self.running) > self.ceiling.rows:
            victim = self.running[-1]
            if len(self._family(victim)) == len(self.running):
                return
            self.preempt(victim)

    def _family(self, sequence: Sequence) -> list[Sequence]:
        """Return the sequence, or all beams of its search."""
        if isinstance(sequence.job, GenerateJob) and sequence.job.beams:
            return [s for s in self.running if s.job is sequence.job]
        return [sequence]

    def preempt(self, victim: Sequence) -> None:
        """Take the victim's blocks; it waits at the head of the queue. Beams of one search go together, from the
        start.
        """
        self.preemptions += 1
        family = self._family(victim)
        for sequence in family:
            sequence.release_blocks(self.pool)
            sequence.state = State.WAITING
            self.running.remove(sequence)
        keeper = family[0]
        if keeper.forked and isinstance(keeper.job, GenerateJob) and keeper.job.beams:
            for sequence in family[1:]:
                sequence.state = State.FINISHED
            keeper.restart()
        self.waiting.appendleft(keeper)

    def replace(self, old: Iterable[Sequence], new: list[Sequence]) -> None:
        """Put the sequences ``new`` where the running sequences ``old`` of the same job stood."""
        old = list(old)
        at = self.running.index(old[0])
        for sequence in old:
            self.running.remove(sequence)
        self.running[at:at] = new

    def finish(self, sequence: Sequence) -> None:
        """Forget the sequence and free its blocks, wherever it is."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.release_blocks(self.pool)
        sequence.state = State.FINISHED
