"""The engine's tokens are those of ``transformers.generate``, alone and in company, for several model families."""

from typing import Any

import pytest
import torch

from tests.workers.engine import tiny
from tests.workers.engine.tiny import (
    COMPILED,
    FAMILIES,
    drain,
    ids_of,
    job,
    prompts,
    reference,
    tiny_engine,
    tiny_model,
    vector_of,
)
from workers.messages import BeamParams, EmbedJob, SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(
    params=[(family, "torch") for family in sorted(FAMILIES)] + [(family, "compiled") for family in COMPILED]
)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Two copies of the same model: one for the reference, one that the engine takes over."""
    family, kernels = request.param
    monkeypatch.setattr(tiny, "KERNELS", kernels)
    return tiny_model(family), tiny_model(family)


def test_greedy_equals_generate_alone_and_in_company(pair: tuple[Any, Any]) -> None:
    model, served = pair
    engine = tiny_engine(served)
    asked = prompts(12)
    expected = [reference(model, p, 24)[0] for p in asked]
    together = drain(engine, [job(f"t{i}", p, sampling=GREEDY) for i, p in enumerate(asked)])
    for i, (prompt, tokens) in enumerate(zip(asked, expected, strict=True)):
        assert ids_of(together, f"t{i}") == tokens
        assert ids_of(drain(engine, [job(f"a{i}", prompt, sampling=GREEDY)]), f"a{i}") == tokens


def test_repetition_penalty_equals_generate(pair: tuple[Any, Any]) -> None:
    model, served = pair
    engine = tiny_engine(served)
    asked = prompts(6, seed=2)
    sampling = SamplingParams(temperature=0, repetition_penalty=1.3)
    reports = drain(engine, [job(str(i), p, sampling=sampling) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(model, prompt, 24, repetition_penalty=1.3)[0]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search_equals_generate(beams: int, length_penalty: float, early_stopping: Any) -> None:
    model, served = tiny_model(seed=3), tiny_model(seed=3)
    engine = tiny_engine(served)
    params = BeamParams(num_beams=beams, length_penalty=length_penalty, early_stopping=early_stopping)
    asked = prompts(4, seed=5)
    reports = drain(engine, [job(str(i), p, 16, beams=params, n=beams) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        expected = reference(
            model,
            prompt,
            16,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        assert [ids_of(reports, str(i), c) for c in range(beams)] == expected


def test_beam_search_beside_other_work_and_with_penalty_equals_generate(pair: tuple[Any, Any]) -> None:
    model, served = pair
    engine = tiny_engine(served)
    asked = prompts(6, seed=8)
    sampling = SamplingParams(temperature=0, repetition_penalty=1.2)
    orders: list[Any] = []
    for i, prompt in enumerate(asked):
        orders.append(job(f"b{i}", prompt, 12, beams=BeamParams(num_beams=3), sampling=sampling))
        orders.append(job(f"g{i}", prompt, 20, sampling=GREEDY))
        orders.append(EmbedJob(id=f"e{i}", prompt=prompt))
    reports = drain(engine, orders)
    for i, prompt in enumerate(asked):
        assert ids_of(reports, f"b{i}") == reference(model, prompt, 12, num_beams=3, repetition_penalty=1.2)[0]
        assert ids_of(reports, f"g{i}") == reference(model, prompt, 20)[0]


def test_embedding_is_the_normalised_mean_of_the_last_hidden_states(pair: tuple[Any, Any]) -> None:
    model, served = pair
    engine = tiny_engine(served)
    asked = prompts(5, longest=80, seed=9)
    reports = drain(engine, [EmbedJob(id=str(i), prompt=p) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        assert torch.cosine_similarity(vector_of(reports, str(i)), expected, dim=0) > 1 - 1e-4
        assert abs(float(vector_of(reports, str(i)).norm()) - 1) < 1e-5


@pytest.mark.parametrize(("kernels", "block_size"), [("torch", 4), ("compiled", 16)])
def test_preemption_changes_nothing(kernels: str, block_size: int) -> None:
    model, served = tiny_model(), tiny_model()
    # 24 or 10 blocks: two or three of these requests at a time.
    blocks = 24 if block_size == 4 else 10
    per_token = 2 * 2 * 2 * 16 * 4
    engine = tiny_engine(
        served, cpu_kernels=kernels, block_size=block_size, kv_cache_bytes=blocks * block_size * per_token
    )
    assert engine.scheduler.pool.count == blocks
    asked = prompts(8, shortest=10, longest=30, seed=4)
    preempted = 0
    original = engine.scheduler.preempt

    def count(victim: Any) -> None:
        nonlocal preempted
        preempted += 1
        original(victim)

    engine.scheduler.preempt = count  # type: ignore[method-assign]
    orders: list[Any] = [job(f"g{i}", p, sampling=GREEDY) for i, p in enumerate(asked)]
    orders += [job(f"b{i}", p[:8], 8, beams=BeamParams(num_beams=3)) for i, p in enumerate(asked)]
    reports = drain(engine, orders)
    assert preempted > 0
    for i, prompt in enumerate(asked):
        assert ids_of(reports, f"g{i}") == reference(model, prompt, 24)[0]
        assert ids_of(reports, f"b{i}") == reference(model, prompt[:8], 8, num_beams=3)[0]
    assert engine.scheduler.pool.used == 0


@pytest.mark.parametrize(("kernels", "block_size"), [("torch", 4), ("compiled", 16)])
def test_prefix_cache_changes_nothing_but_the_work(kernels: str, block_size: int) -> None:
    model, served = tiny_model(), tiny_model()
    engine = tiny_engine(served, cpu_kernels=kernels, block_size=block_size)
    shared = prompts(1, 48, 48)[0]
    asked = [shared + tail for tail in prompts(4, seed=6)]
    for i, prompt in enumerate(asked):
        reports = drain(engine, [job(str(i), prompt, sampling=GREEDY)])
        assert ids_of(reports, str(i)) == reference(model, prompt, 24)[0]
        cached = [r.cached_tokens for r in reports if type(r).__name__ == "Started"]
        assert cached == [0 if i == 0 else 48]
    other = drain(engine, [job("salted", asked[0], sampling=GREEDY, salt="another tenant")])
    assert [r.cached_tokens for r in other if type(r).__name__ == "Started"] == [0]
