"""Decode passes as CUDA graphs: one launch for a whole pass instead of one for each of its kernels.

A graph repeats the same kernels on the same memory. So a pass that only decodes is padded to a `Shape` that has a
graph, its inputs are written where the graph reads them, and the results are found where it writes them. The padding
rows read and write a *scratch block* of the cache that no sequence can own. Every other pass is computed eagerly.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from config import logs
from workers.engine.attention import AttentionBatch, DecodeGroup
from workers.engine.eager import EagerStep
from workers.engine.flat_batch import Computed, FlatBatch, likeliest
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob

log = logs.logger(__name__)

# Up to this batch size it doubles from graph to graph; from there on it grows by as much.
EVEN_ROWS = 8
# The narrowest block tables of a graph, in tokens.
NARROWEST = 128
# Where the attention copies all blocks of the padded tables: no more bytes at once, ...
MOST_GATHERED_BYTES = 512 * 1024**2
# ... and no more tokens than so many times those that are there, once there are more than a few.
MOST_PADDING = 4
FREE_PADDING = 8192
# How long capturing may put off the start. What is not captured by then is captured when it is first needed.
CAPTURE_AHEAD_S = 10.0
# Numbers for each row in front of its block table: token id, position, cache slot, length.
COLUMNS = 4


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for: ``rows`` sequences, block tables of ``width`` blocks."""

    rows: int
    width: int


class Capture(Protocol):
    """Turns device work into something that repeats it."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the work that ``compute`` starts on the device. Raises when that cannot be repeated."""
        ...


class CudaCapture:
    """Captures with CUDA graphs that share one pool of memory: no two of them ever run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of ``compute``. Raises when it waits for the device, or for lack of memory."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Kernels are loaded and workspaces made at the first run, which cannot happen during the capture.
            compute()
            # A wait during the capture would leave it in ruins; here it raises in good order.
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                compute()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The other threads of this process may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        return graph.replay


class StaticInputs:
    """The inputs of a pass at a fixed address on the device, and pinned memory to fill them from in one copy.

    One flat int64 tensor; a shape uses as much of its front as it needs: the four columns, then the block tables.
    """

    def __init__(self, rows: int, width: int, block_size: int, scratch: int, device: torch.device) -> None:
        size = rows * (COLUMNS + width)
        on_gpu = device.type == "cuda"
        self.block_size = block_size
        self.scratch = scratch
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def views(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns ``[4, rows]`` and the block tables ``[rows, width]`` of ``shape`` on the device."""
        return _views(self._device, shape)

    def fill(self, shape: Shape, batch: FlatBatch | None) -> None:
        """Start copying ``batch`` to the device, padded to ``shape``; None: padding alone."""
        if self._copied is not None:
            # The copy before this one must have left the pinned memory; long since, as its tokens have come back.
            self._copied.synchronize()
        columns, tables = (view.numpy() for view in _views(self._host, shape))
        columns[:] = np.array([0, 0, self.scratch * self.block_size, 1])[:, None]
        tables[:] = self.scratch
        if batch is not None:
            rows = batch.tokens
            positions = batch.positions
            for table, item in zip(tables, batch.items, strict=False):
                used = -(-item.sequence.length // self.block_size)
                table[:used] = item.sequence.blocks[:used]
            block = tables[np.arange(rows), positions // self.block_size]
            columns[0, :rows] = batch.ids
            columns[1, :rows] = positions
            columns[2, :rows] = block * self.block_size + positions % self.block_size
            columns[3, :rows] = positions + 1
        size = shape.rows * (COLUMNS + shape.width)
        self._device[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _views(flat: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    columns = shape.rows * COLUMNS
    size = columns + shape.rows * shape.width
    return flat[:columns].view(COLUMNS, shape.rows), flat[columns:size].view(shape.rows, shape.width)


class GraphedStep:
    """Computes passes that only decode by graphs, all others by ``eager``; implements
    `workers.engine.flat_batch.Step`.

    ``scratch``: a block of the cache that the block pool does not know. ``longest``: tokens of the longest sequence.
    The tensors of a `Computed` are good until the next pass: the next graph writes to the same memory.
    """

    def __init__(self, eager: EagerStep, capture: Capture, scratch: int, max_batch: int, longest: int) -> None:
        self.eager = eager
        self.cache = eager.cache
        size = self.cache.block_size
        self.sizes = batch_sizes(max_batch)
        widest = -(-longest // size)
        # Where nothing is copied, width costs nothing.
        self.widths = table_widths(-(-NARROWEST // size), widest) if eager.attention.backend.gathers else [widest]
        self._capture = capture
        self._inputs = StaticInputs(max_batch, widest, size, scratch, eager.device)
        self._logits = torch.empty(0)
        self._best = torch.empty(0)
        # None: there is no memory for this shape.
        self._graphs: dict[Shape, Callable[[], None] | None] = {}
        self._possible = True

    @torch.inference_mode()
    def compute(self, batch: FlatBatch) -> Computed:
        """Compute the tokens of ``batch``; their keys and values are in the cache afterwards."""
        shape = self.shape_of(batch) if self._possible else None
        if shape is None:
            return self.eager.compute(batch)
        self._inputs.fill(shape, batch)
        replay = self._graph(shape)
        if replay is None:
            return self.eager.compute(batch)
        if batch.copies:
            self.cache.copy_blocks(batch.copies)
        replay()
        return Computed(self._logits[: batch.tokens], self._best[: batch.tokens], None)

    def sample(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Return the next token of each row, int64 ``[rows]``."""
        return self.eager.sample(scores, sequences)

    @torch.inference_mode()
    def capture_ahead(self, seconds: float = CAPTURE_AHEAD_S) -> None:
        """Capture the graphs of short sequences, until ``seconds`` have passed."""
        begun = time.monotonic()
        # Largest first: the smaller ones then find their memory in the pool.
        for rows in reversed(self.sizes):
            shape = Shape(rows, self.widths[0])
            if not self._possible or time.monotonic() - begun > seconds:
                break
            if self._fits(shape):
                self._inputs.fill(shape, None)
                self._graph(shape)
        log.info("CUDA graphs captured", graphs=len(self._graphs), seconds=time.monotonic() - begun)

    def shape_of(self, batch: FlatBatch) -> Shape | None:
        """Return the shape whose graph computes ``batch``, or None for a pass that no graph computes."""
        rows = len(batch.items)
        if batch.tokens != rows or len(batch.wanted) != rows or rows > self.sizes[-1]:
            return None
        if batch.prompt_places or batch.wants_hidden:
            return None
        if self.eager.adapters is not None and any(
            isinstance(i.sequence.job, GenerateJob) and i.sequence.job.adapter for i in batch.items
        ):
            return None
        used = batch.positions // self.cache.block_size + 1
        longest = int(used.max())
        if longest > self.widths[-1]:
            return None
        shape = Shape(next(s for s in self.sizes if s >= rows), next(w for w in self.widths if w >= longest))
        padded = shape.rows * shape.width
        free = FREE_PADDING // self.cache.block_size
        wasteful = padded > max(MOST_PADDING * int(used.sum()), free) and self.eager.attention.backend.gathers
        return None if wasteful or not self._fits(shape) else shape

    def _fits(self, shape: Shape) -> bool:
        """Whether a pass of ``shape`` copies no more of the cache at once than it may."""
        if not self.eager.attention.backend.gathers:
            return True
        layers = zip(self.cache.keys, self.cache.values, strict=True)
        per_block = max(keys[0].nbytes + values[0].nbytes for keys, values in layers)
        return shape.rows * shape.width * per_block <= MOST_GATHERED_BYTES

    def _graph(self, shape: Shape) -> Callable[[], None] | None:
        """Return the graph of ``shape``, captured with the inputs that are there now if it is new."""
        if shape in self._graphs:
            return self._graphs[shape]
        replay = None
        try:
            if not len(self._logits):
                self._make_outputs(shape)
            replay = self._capture(partial(self._run, shape))
        except torch.OutOfMemoryError:
            log.warning("no memory for a CUDA graph", rows=shape.rows, blocks=shape.width)
        except Exception as error:
            log.warning("without CUDA graphs", model=type(self.eager.model).__name__, reason=str(error))
            self._possible = False
            self._graphs.clear()
            return None
        self._graphs[shape] = replay
        return replay

    def _make_outputs(self, shape: Shape) -> None:
        """Allocate what all graphs write their results to."""
        vocabulary = self._logits_of(shape).shape[1]
        rows, device = self.sizes[-1], self.eager.device
        self._logits = torch.empty((rows, vocabulary), dtype=torch.float32, device=device)
        self._best = torch.empty(rows, dtype=torch.int64, device=device)

    def _logits_of(self, shape: Shape) -> torch.Tensor:
        """Run the model on the inputs that are on the device: ``[rows, vocab]`` in the model's own dtype."""
        (ids, positions, slots, lengths), tables = self._inputs.views(shape)
        if self.eager.adapters is not None:
            self.eager.adapters.rows = {}
        # A new group each time: it keeps its masks, and a graph must make its own.
        borders = AttentionBatch(slots, [DecodeGroup(slice(None), tables, lengths)], [])
        return self.eager.run_model(ids, positions, borders)[0]

    def _run(self, shape: Shape) -> None:
        """What is captured: no allocation of it outlives it, and nothing in it waits for the device."""
        logits, best = self._logits[: shape.rows], self._best[: shape.rows]
        logits.copy_(self._logits_of(shape))
        best.copy_(likeliest(logits))


def batch_sizes(largest: int) -> list[int]:
    """Return the rows of graphs, rising: 1, 2, 4, 8, 16, 24, ... and ``largest``."""
    sizes = [1, 2, 4, *range(EVEN_ROWS, largest, EVEN_ROWS)]
    return [*(s for s in sizes if s < largest), largest]


def table_widths(narrowest: int, widest: int) -> list[int]:
    """Return the widths of block tables, rising by a half and a third in turn: 8, 12, 16, 24, ... and ``widest``."""
    widths = []
    while narrowest < widest:
        widths += [narrowest, narrowest + narrowest // 2]
        narrowest *= 2
    return [*sorted({w for w in widths if w < widest}), widest]
