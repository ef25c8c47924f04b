"""CUDA graphs compute what eager passes compute, and a step waits for the device once: for its tokens."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.on_gpu import SHAPE, engine_of, save_model
from tests.workers.engine.tiny import EOS, drain, ids_of, job, join_and_leave, prompts, reference, tiny_model
from workers.engine.cuda_graphs import GraphedStep
from workers.engine.engine import Engine
from workers.messages import BeamParams, GenerateJob, SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0)
# Its rows do not end by themselves.
ENDLESS = SamplingParams(temperature=0, logit_bias={EOS: -100.0})


@pytest.fixture(params=["llama", "mistral-window", "gemma2"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    save_model(tmp_path, request.param)
    return request.param


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def endless(job_id: str, prompt: list[int], max_tokens: int) -> GenerateJob:
    """Return a greedy job that nothing ends early."""
    return GenerateJob(id=job_id, prompt=prompt, max_tokens=max_tokens, sampling=GREEDY)


def graphed(directory: Path, **changes: Any) -> Engine:
    engine = engine_of(directory, **changes)
    step = engine.model_step
    assert isinstance(step, GraphedStep), "the self-check refused the graphs"
    assert step._possible
    assert step._graphs
    return engine


def eager(directory: Path, **changes: Any) -> Engine:
    engine = engine_of(directory, **changes)
    if isinstance(engine.model_step, GraphedStep):
        engine.model_step = engine.model_step.eager
    return engine


def test_greedy_equals_generate_while_requests_join_and_leave(tmp_path: Path, family: str) -> None:
    engine, model = graphed(tmp_path), tiny_model(family, **SHAPE)
    asked = prompts(12)
    reports = join_and_leave(engine, [job(str(i), p, 16 + i, sampling=GREEDY) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(model, prompt, 16 + i)[0]


def test_seeds_choices_with_shared_blocks_and_beams_equal_those_of_eager_passes(tmp_path: Path, family: str) -> None:
    orders: list[Any] = [
        job(f"n{i}", p, 20, n=3, sampling=SamplingParams(seed=i, top_p=0.9)) for i, p in enumerate(prompts(4))
    ]
    orders += [job(f"b{i}", p, 12, beams=BeamParams(num_beams=3)) for i, p in enumerate(prompts(2, seed=2))]
    with_graphs = drain(graphed(tmp_path, block_size=4), list(orders))
    without = drain(eager(tmp_path, block_size=4), list(orders))
    for order in orders:
        for choice in range(order.n):
            assert ids_of(with_graphs, order.id, choice) == ids_of(without, order.id, choice)


def test_preemption_changes_nothing(tmp_path: Path) -> None:
    save_model(tmp_path)
    per_token = 2 * 2 * 2 * 64 * 4
    engine = graphed(tmp_path, block_size=4, kv_cache_bytes=24 * 4 * per_token)
    preempted: list[Any] = []
    original = engine.scheduler.preempt

    def preempt(victim: Any) -> None:
        preempted.append(victim)
        original(victim)

    engine.scheduler.preempt = preempt  # type: ignore[method-assign]
    orders = [endless(str(i), p, 24) for i, p in enumerate(prompts(8, shortest=10, longest=30, seed=4))]
    reports = drain(engine, list(orders))
    expected = drain(eager(tmp_path), list(orders))
    assert preempted
    for order in orders:
        assert ids_of(reports, order.id) == ids_of(expected, order.id)


class Watched:
    """Lets ``step`` compute, and fails when it waits for the device."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self.cache = step.cache

    def compute(self, batch: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._step.compute(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", [graphed, eager])
def test_no_pass_waits_for_the_device(tmp_path: Path, make: Any) -> None:
    save_model(tmp_path)
    engine = make(tmp_path)
    orders = [endless(str(i), p, 24) for i, p in enumerate(prompts(5))]
    # Once to capture what is captured when it is first needed.
    expected = drain(engine, list(orders))
    engine.model_step = Watched(engine.model_step)
    reports = drain(engine, list(orders))
    for order in orders:
        assert ids_of(reports, order.id) == ids_of(expected, order.id)


def test_a_greedy_decode_step_waits_once(tmp_path: Path) -> None:
    save_model(tmp_path)
    engine = graphed(tmp_path)
    for i, prompt in enumerate(prompts(4)):
        engine.submit(endless(str(i), prompt, 100))
    for _ in range(20):
        engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_in_graphs_gives_the_logits_of_eager_passes(tmp_path: Path, family: str) -> None:
    asked = [
        job(str(i), p, 12, sampling=ENDLESS, logprobs=3) for i, p in enumerate(prompts(5, shortest=3, longest=300))
    ]
    with_graphs = drain(graphed(tmp_path, dtype="float16", flash_attention=True), list(asked))
    without = drain(eager(tmp_path, dtype="float16", flash_attention=True), list(asked))
    for item in asked:
        left, right = (
            [s for r in reports if getattr(r, "id", "") == item.id for s in getattr(r, "logprobs", [])]
            for reports in (with_graphs, without)
        )
        # Up to the first different token, of which half precision allows some.
        assert left[0].logprob == pytest.approx(right[0].logprob, abs=0.05)
        assert left[1].logprob == pytest.approx(right[1].logprob, abs=0.05)
