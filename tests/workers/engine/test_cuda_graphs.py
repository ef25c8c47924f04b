"""Decode passes by graphs compute what eager passes compute. A recording of the pass stands in for the CUDA graph."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.workers.engine.tiny import (
    FAMILIES,
    drain,
    ids_of,
    job,
    join_and_leave,
    prompts,
    reference,
    tiny_engine,
    tiny_model,
)
from workers.engine import build as build_module
from workers.engine import cuda_graphs
from workers.engine.cuda_graphs import GraphedStep, Shape, StaticInputs, batch_sizes, table_widths
from workers.engine.engine import Engine
from workers.engine.flat_batch import FlatBatch, flatten
from workers.engine.kv_cache import BlockPool
from workers.engine.scheduler import Scheduled
from workers.engine.sequence import Sequence
from workers.messages import BeamParams, EmbedJob, GenerateJob, SamplingParams

GREEDY = SamplingParams(temperature=0)

# Operations that read the device from the host, or copy from the host's ordinary memory: none can be in a CUDA graph.
FORBIDDEN = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal"}


class Tape(TorchDispatchMode):
    """Notes each operation and its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in FORBIDDEN or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Do the operations again, on the memory that they used then: as a CUDA graph, but by the CPU."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording:
    """Captures like `workers.engine.cuda_graphs.CudaCapture`, on the CPU. ``replays``: each shape that was replayed."""

    def __init__(self) -> None:
        self.captured: list[Shape] = []
        self.replayed: list[Shape] = []

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(compute, partial)
        shape: Shape = compute.args[0]
        compute()
        with Tape() as tape:
            compute()
        self.captured.append(shape)

        def replay() -> None:
            self.replayed.append(shape)
            tape.replay()

        return replay


def graphed_engine(model: Any, capture: Any, **config: Any) -> Engine:
    """Return an engine whose model step is a `GraphedStep` with ``capture``."""
    engine = tiny_engine(model, cpu_kernels="torch", **config)
    scratch, most = engine.scheduler.pool.count, engine.scheduler.max_batch
    engine.model_step = GraphedStep(engine.model_step, capture, scratch, most, engine.max_model_len)  # type: ignore[arg-type]
    return engine


def decoding(lengths: list[int], block_size: int = 16, pool: BlockPool | None = None, **options: Any) -> FlatBatch:
    """Return a pass of sequences of these lengths, each with one token to compute."""
    pool = pool or BlockPool(1000, block_size)
    items = []
    for n, length in enumerate(lengths):
        ids = [n + 1] * length
        sequence = Sequence(GenerateJob(id=str(n), prompt=ids, max_tokens=1, **options), 0, ids, length + 1)
        sequence.reserve(length - 1, pool)
        sequence.computed = length - 1
        items.append(Scheduled(sequence, 1, sequence.reserve(1, pool)))
    return flatten(items)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_batch_sizes_double_then_grow_evenly_up_to_the_largest() -> None:
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(1) == [1]


def test_table_widths_rise_by_less_than_half_and_end_at_the_widest() -> None:
    assert table_widths(8, 100) == [8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert table_widths(8, 5) == [5]
    assert table_widths(1, 4) == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def step() -> GraphedStep:
    engine = graphed_engine(tiny_model(), Recording())
    assert isinstance(engine.model_step, GraphedStep)
    return engine.model_step


def test_a_pass_takes_the_next_larger_shape(step: GraphedStep) -> None:
    assert step.shape_of(decoding([5])) == Shape(1, 8)
    assert step.shape_of(decoding([5] * 3)) == Shape(4, 8)
    assert step.shape_of(decoding([5] * 9 + [129])) == Shape(16, 12)
    assert step.shape_of(decoding([128] * 9)) == Shape(16, 8)
    assert step.shape_of(decoding([512])) == Shape(1, 32)


def test_only_passes_of_next_tokens_of_the_model_itself_are_graphed(step: GraphedStep) -> None:
    assert step.shape_of(decoding([5] * 33)) is None
    assert step.shape_of(decoding([5, 5], prompt_logprobs=0)) is None
    pool = BlockPool(10, 16)

    def alone(sequence: Sequence, tokens: int) -> FlatBatch:
        return flatten([Scheduled(sequence, tokens, sequence.reserve(tokens, pool))])

    def generated() -> Sequence:
        return Sequence(GenerateJob(id="x", prompt=[1, 2, 3], max_tokens=1), 0, [1, 2, 3], 4)

    assert step.shape_of(alone(generated(), 3)) is None
    assert step.shape_of(alone(generated(), 1)) is None
    assert step.shape_of(alone(Sequence(EmbedJob(id="e", prompt=[1]), 0, [1], 1), 1)) is None


def test_rows_with_adapters_are_not_graphed(step: GraphedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.eager, "adapters", object())
    assert step.shape_of(decoding([5, 5])) == Shape(2, 8)
    assert step.shape_of(decoding([5, 5], adapter="a")) is None


def test_a_pass_that_would_mostly_gather_padding_is_not_graphed(
    step: GraphedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlike = [500] + [5] * 31
    assert step.shape_of(decoding([5] * 32)) == Shape(32, 8)
    assert step.shape_of(decoding([500] * 31)) == Shape(32, 32)
    assert step.shape_of(decoding(unlike)) is None
    monkeypatch.setattr(step.eager.attention.backend, "gathers", False)
    assert step.shape_of(decoding(unlike)) == Shape(32, 32)


def test_a_pass_that_would_gather_too_many_bytes_is_not_graphed(
    step: GraphedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_block = 2 * 16 * 2 * 16 * 4
    monkeypatch.setattr(cuda_graphs, "MOST_GATHERED_BYTES", 4 * 8 * per_block)
    assert step.shape_of(decoding([5] * 4)) == Shape(4, 8)
    assert step.shape_of(decoding([5] * 5)) is None


def test_an_attention_that_reads_the_tables_has_one_width() -> None:
    engine = tiny_engine(tiny_model(), cpu_kernels="torch")
    engine.model_step.attention.backend.gathers = False  # type: ignore[attr-defined]
    step = GraphedStep(engine.model_step, Recording(), 1, 4, 512)  # type: ignore[arg-type]
    assert step.widths == [32]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_hold_each_row_and_then_padding_in_the_scratch_block() -> None:
    inputs = StaticInputs(8, 6, 4, 99, torch.device("cpu"))
    shape = Shape(4, 3)
    inputs.fill(shape, None)
    batch = decoding([9, 1, 8], block_size=4)
    inputs.fill(shape, batch)
    (ids, positions, slots, lengths), tables = inputs.views(shape)
    assert ids.tolist() == [1, 2, 3, 0]
    assert positions.tolist() == [8, 0, 7, 0]
    assert lengths.tolist() == [9, 1, 8, 1]
    own = [item.sequence.blocks for item in batch.items]
    assert slots.tolist() == [own[0][2] * 4, own[1][0] * 4, own[2][1] * 4 + 3, 99 * 4]
    assert tables.tolist() == [own[0], [own[1][0], 99, 99], [*own[2], 99], [99, 99, 99]]


def test_inputs_stay_at_their_address_and_keep_nothing_of_an_earlier_pass() -> None:
    inputs = StaticInputs(8, 6, 4, 99, torch.device("cpu"))
    shape = Shape(4, 3)
    addresses = [view.data_ptr() for view in inputs.views(shape)]
    inputs.fill(shape, decoding([9, 9, 9, 9], block_size=4))
    inputs.fill(Shape(8, 6), decoding([21] * 8, block_size=4))
    inputs.fill(shape, decoding([2], block_size=4))
    columns, tables = inputs.views(shape)
    assert [columns.data_ptr(), tables.data_ptr()] == addresses
    assert columns[:, 1:].tolist() == [[0] * 3, [0] * 3, [99 * 4] * 3, [1] * 3]
    assert bool((tables[1:] == 99).all())


# --- the same tokens as without graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_generate_for_each_family_while_requests_join_and_leave(family: str) -> None:
    model, capture = tiny_model(family), Recording()
    engine = graphed_engine(tiny_model(family), capture)
    asked = prompts(5)
    reports = join_and_leave(engine, [job(str(i), p, 10 + i, sampling=GREEDY) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(model, prompt, 10 + i)[0]
    assert len(capture.replayed) > 4
    assert len(set(capture.captured)) == len(capture.captured)


@pytest.mark.parametrize("family", ["llama-gqa-tied", "mistral-window", "gemma2"])
def test_seeds_choices_and_beams_equal_those_of_eager_passes(family: str) -> None:
    orders: list[Any] = [
        job(f"n{i}", p, 20, n=3, sampling=SamplingParams(seed=i, top_p=0.9)) for i, p in enumerate(prompts(3))
    ]
    orders += [job(f"b{i}", p, 12, beams=BeamParams(num_beams=3)) for i, p in enumerate(prompts(2, seed=2))]
    orders += [job("l", prompts(1, seed=3)[0], 12, sampling=GREEDY, logprobs=2)]
    capture = Recording()
    # Blocks of 4: the choices share half-full blocks, which are copied before they are written.
    graphed = drain(graphed_engine(tiny_model(family), capture, block_size=4), list(orders))
    eager = drain(tiny_engine(tiny_model(family), cpu_kernels="torch", block_size=4), list(orders))
    assert capture.replayed
    for order in orders:
        for choice in range(order.n):
            assert ids_of(graphed, order.id, choice) == ids_of(eager, order.id, choice)


def test_preemption_changes_nothing() -> None:
    model, capture = tiny_model(), Recording()
    per_token = 2 * 2 * 2 * 16 * 4
    engine = graphed_engine(tiny_model(), capture, block_size=4, kv_cache_bytes=24 * 4 * per_token)
    preempted: list[Any] = []
    original = engine.scheduler.preempt

    def preempt(victim: Sequence) -> None:
        preempted.append(victim)
        original(victim)

    engine.scheduler.preempt = preempt  # type: ignore[method-assign]
    asked = prompts(8, shortest=10, longest=30, seed=4)
    reports = drain(engine, [job(str(i), p, sampling=GREEDY) for i, p in enumerate(asked)])
    assert preempted
    assert capture.replayed
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(model, prompt, 24)[0]


def test_padding_writes_to_the_scratch_block_and_nowhere_else() -> None:
    engine = graphed_engine(tiny_model(), Recording())
    step = engine.model_step
    assert isinstance(step, GraphedStep)
    scratch = engine.scheduler.pool.count
    keys = step.cache.keys[0]
    assert len(keys) == scratch + 1
    keys.fill_(7)
    batch = decoding([5, 5, 5], pool=engine.scheduler.pool)
    step.compute(batch)
    written = {int(block) for block in (keys != 7).flatten(1).any(1).nonzero()}
    assert written == {scratch, *(b for item in batch.items for b in item.sequence.blocks)}


def test_nan_in_blocks_of_others_does_not_reach_a_graphed_pass() -> None:
    engine = graphed_engine(tiny_model(), Recording())
    # Prompt and answer fit into one block: there is nothing to take from the others.
    prompt = prompts(1, 5, 5)[0]
    reports = engine.submit(job("a", prompt, 8, sampling=GREEDY)) + engine.step()
    (sequence,) = engine.scheduler.running
    for storage in (*engine.model_step.cache.keys, *engine.model_step.cache.values):
        others = [b for b in range(engine.scheduler.pool.count) if b not in sequence.blocks]
        storage[others] = np.nan
    reports += drain(engine)
    assert ids_of(reports, "a") == reference(tiny_model(), prompt, 8)[0]


# --- capturing --------------------------------------------------------------------------------------------------------


def test_graphs_are_captured_ahead_from_the_largest_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Recording()
    engine = graphed_engine(tiny_model(), capture, max_batch=8)
    step = engine.model_step
    assert isinstance(step, GraphedStep)
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(cuda_graphs.time, "monotonic", lambda: next(clock))
    step.capture_ahead(2.5)
    assert capture.captured == [Shape(8, 8), Shape(4, 8)]
    step.compute(decoding([5] * 7))
    assert capture.captured == [Shape(8, 8), Shape(4, 8)]
    assert capture.replayed == [Shape(8, 8)]


def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.model.layers[1].register_forward_hook(lambda _m, _i, out: out + (out.sum().item() * 0))
    capture = Recording()
    engine = graphed_engine(model, capture)
    caplog.set_level(logging.WARNING)
    asked = prompts(4)
    reports = drain(engine, [job(str(i), p, sampling=GREEDY) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(tiny_model(), prompt, 24)[0]
    assert not capture.captured
    (told,) = (r.__dict__["fields"] for r in caplog.records if "CUDA graphs" in r.message)
    assert told == {
        "model": "LlamaForCausalLM",
        "reason": "operation not permitted when stream is capturing: item",
    }


def test_a_shape_without_memory_is_computed_eagerly_and_the_others_by_graphs() -> None:
    capture = Recording()

    def short_of_memory(compute: Any) -> Any:
        if compute.args[0].rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(compute)

    engine = graphed_engine(tiny_model(), short_of_memory)
    asked = prompts(6)
    orders = [job(str(i), p, 4 * (i + 1), sampling=GREEDY) for i, p in enumerate(asked)]
    reports = drain(engine, list(orders))
    assert {shape.rows for shape in capture.replayed} <= {1, 2}
    assert capture.replayed
    for order in orders:
        assert ids_of(reports, order.id) == reference(tiny_model(), order.prompt, order.max_tokens)[0]


@pytest.mark.parametrize("right", [True, False])
def test_the_self_check_keeps_graphs_only_when_they_compute_the_right_thing(right: bool) -> None:
    model = tiny_model()
    ids = torch.tensor(prompts(1, 40, 40))
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[0]
    step = graphed_engine(tiny_model(), Recording()).model_step
    assert isinstance(step, GraphedStep)
    if not right:
        step._capture = lambda _compute: lambda: None  # type: ignore[assignment]
    kept = build_module._with_graphs(step, ids, expected, 1e-3)
    assert kept is (step if right else step.eager)
