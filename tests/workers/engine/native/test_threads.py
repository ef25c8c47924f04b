"""The thread pool of the compiled step."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.workers.engine.native.rig import Driver, native_step, random_ids, shared_model

TASKS = Path("/proc/self/task")


def thread_count() -> int:
    return len(list(TASKS.iterdir()))


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_closing_a_step_ends_its_threads(threads: int) -> None:
    model = shared_model("llama")
    # Whatever torch starts at its first work is there before counting.
    with native_step(model) as step:
        Driver(step).alone(random_ids(model, 4))
    before = thread_count()
    with native_step(model, threads=threads) as step:
        Driver(step).alone(random_ids(model, 40))
        assert thread_count() == before + threads - 1
    # A thread that has ended is still listed for a moment.
    deadline = time.monotonic() + 5
    while thread_count() > before and time.monotonic() < deadline:
        pass
    assert thread_count() == before


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_step_that_never_computed_can_be_closed(threads: int) -> None:
    with native_step(shared_model("llama"), threads=threads):
        pass


def test_thousands_of_tiny_passes_on_more_threads_than_processors() -> None:
    model = shared_model("llama")
    ids = random_ids(model, 250)
    with native_step(model) as step:
        expected = Driver(step).alone(ids)
    with native_step(model, threads=8) as step:
        for round_ in range(16):
            assert torch.equal(Driver(step, seed=round_).alone(ids, [1] * 250), expected)


def test_steps_of_several_models_compute_at_the_same_time() -> None:
    """Each has its own threads and buffers; ctypes lets them run side by side."""
    model = shared_model("llama")
    ids = random_ids(model, 200)
    with native_step(model) as step:
        expected = Driver(step).alone(ids)

    def compute(seed: int) -> bool:
        with native_step(model, threads=2) as step:
            return all(torch.equal(Driver(step, seed=seed).alone(ids, [150, 1, 1, 48]), expected) for _ in range(5))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compute, range(6)))
