"""Log-probabilities of output and prompt are the model's own, in every mode."""

from typing import Any

import pytest
import torch

from tests.workers.engine.tiny import drain, ids_of, job, prompts, tiny_engine, tiny_model
from workers.engine.engine import Engine
from workers.messages import BeamParams, Output, PromptLogprobs, SamplingParams, TokenLogprobs


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def engine() -> Engine:
    return tiny_engine(tiny_model())


def expected(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Return the log-probabilities ``[len(output), vocab]`` of each next token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0]
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]


def scores_of(reports: list[Any], job_id: str, choice: int = 0) -> list[TokenLogprobs]:
    return [s for r in reports if isinstance(r, Output) and (r.id, r.choice) == (job_id, choice) for s in r.logprobs]


def assert_equal(scores: list[TokenLogprobs], reference: torch.Tensor, ids: list[int], top: int) -> None:
    assert len(scores) == len(ids)
    for score, row, token in zip(scores, reference, ids, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(top) if top else None
        assert [t for t, _ in score.top] == (best.indices.tolist() if best else [])
        for (_, value), wanted in zip(score.top, best.values.tolist() if best else [], strict=True):
            assert value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("top", [0, 1, 5])
def test_output_scores_are_those_of_the_model_before_penalties(engine: Engine, model: Any, top: int) -> None:
    sampling = SamplingParams(temperature=0.7, repetition_penalty=1.5, seed=3)
    asked = prompts(4)
    reports = drain(engine, [job(str(i), p, sampling=sampling, n=2, logprobs=top) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        for choice in range(2):
            ids = ids_of(reports, str(i), choice)
            assert_equal(scores_of(reports, str(i), choice), expected(model, prompt, ids), ids, top)


def test_scores_are_given_only_to_the_request_that_asks(engine: Engine) -> None:
    reports = drain(engine, [job("a", prompts(1)[0], logprobs=2), job("b", prompts(1)[0])])
    assert len(scores_of(reports, "a")) == len(ids_of(reports, "a"))
    assert scores_of(reports, "b") == []


def test_beams_carry_the_scores_of_their_own_tokens(engine: Engine, model: Any) -> None:
    prompt = prompts(1, seed=5)[0]
    reports = drain(engine, [job("x", prompt, 12, beams=BeamParams(num_beams=4), n=3, logprobs=2)])
    for choice in range(3):
        ids = ids_of(reports, "x", choice)
        assert_equal(scores_of(reports, "x", choice), expected(model, prompt, ids), ids, 2)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 90])
def test_prompt_scores_cover_all_but_the_first_token_whatever_the_chunks(
    engine: Engine, model: Any, length: int
) -> None:
    prompt = prompts(1, length, length)[0]
    orders = [job("x", prompt, 3, prompt_logprobs=2, n=2), job("busy", prompts(1)[0], 30), job("y", prompt, 3)]
    # Twice: the second run finds the prompt in the prefix cache and must compute it all the same.
    for _ in range(2):
        reports = drain(engine, orders)
        (report,) = [r for r in reports if isinstance(r, PromptLogprobs)]
        first_output = next(i for i, r in enumerate(reports) if isinstance(r, Output) and r.id == "x")
        assert reports.index(report) < first_output
        assert_equal(report.logprobs, expected(model, prompt[:1], prompt[1:]), prompt[1:], 2)


def test_a_prompt_can_be_scored_without_generating(engine: Engine, model: Any) -> None:
    prompt = prompts(1, 30, 30)[0]
    reports = drain(engine, [job("x", prompt, 0, prompt_logprobs=0)])
    assert [type(r).__name__ for r in reports] == ["Started", "PromptLogprobs", "Output"]
    assert reports[-1] == Output(id="x", finish_reason="length")
    assert_equal(reports[1].logprobs, expected(model, prompt[:1], prompt[1:]), prompt[1:], 0)


def test_a_resumed_request_goes_on_with_the_same_scores(engine: Engine) -> None:
    options: dict[str, Any] = {"sampling": SamplingParams(seed=9), "logprobs": 1}
    prompt = prompts(1)[0]
    whole = drain(engine, [job("w", prompt, 16, **options)])
    ids, scores = ids_of(whole, "w"), scores_of(whole, "w")
    rest = drain(engine, [job("r", prompt, 16, emitted=[ids[:6]], **options)])
    assert ids_of(rest, "r") == ids[6:]
    for left, right in zip(scores_of(rest, "r"), scores[6:], strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-5)
