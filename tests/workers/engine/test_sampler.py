"""The sampler's distributions are those of transformers' warpers."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tests.workers.engine.tiny import tiny_engine, tiny_model
from workers.engine import sampler
from workers.engine.noise import draw_key, gumbel_noise
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob, SamplingParams

VOCAB = 300
DRAWS = 10_000

CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.3, top_k=7),
    "top_p": SamplingParams(temperature=0.9, top_p=0.6),
    "min_p": SamplingParams(min_p=0.1),
    "typical_p": SamplingParams(typical_p=0.5),
    "all": SamplingParams(temperature=1.2, top_k=40, top_p=0.8, min_p=0.02, typical_p=0.9),
}


def reference_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0], dim=-1)


def sequence(params: SamplingParams, choice: int) -> Sequence:
    return Sequence(GenerateJob(id="x", prompt=[1], max_tokens=5, sampling=params), choice, [1], 6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vocab", [VOCAB, 3000])
def test_draws_follow_the_reference_distribution(name: str, vocab: int) -> None:
    params = CASES[name]
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 2
    expected = reference_probabilities(logits, params).double().numpy()
    counts = np.zeros(vocab)
    # Choices of one request stand for independent draws.
    for start in range(0, DRAWS, 1000):
        rows = [sequence(params, c) for c in range(start, start + 1000)]
        tokens = sampler.sample(logits.repeat(1000, 1), rows)
        counts += np.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0, "a token that the reference excludes was drawn"
    # Chi-square over bins of at least 5 expected draws; rarer tokens together are one bin.
    common = expected * DRAWS >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * DRAWS
    keep = wanted > 0
    statistic = float(((observed[keep] - wanted[keep]) ** 2 / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    # Wilson-Hilferty: the statistic's cube root is about normal; 4 standard deviations, deterministic seeds.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    logits = torch.zeros(VOCAB)
    logits[:3] = 2.0
    logits[3:9] = 1.0
    rows = [sequence(SamplingParams(top_k=5), c) for c in range(2000)]
    for draw in (lambda *a: sampler.sample(*a).tolist(), CompiledDraws()):
        assert set(draw(logits.repeat(2000, 1), rows)) == set(range(9))


def test_the_noise_is_standard_gumbel_and_a_pure_function_of_its_key() -> None:
    keys = torch.tensor([[draw_key(seed, 0, 3)] for seed in range(200)])
    ids = torch.arange(500)[None]
    noise = gumbel_noise(keys, ids)
    assert torch.equal(noise, gumbel_noise(keys, ids))
    assert torch.equal(noise[7, 33], gumbel_noise(keys[7:8], torch.tensor([[33]]))[0, 0])
    # Mean 0.5772 (Euler's constant), variance pi^2 / 6.
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.03
    assert len({draw_key(1, c, t) for c in range(100) for t in range(100)}) == 10_000


class CompiledDraws:
    """The compiled step's sampler without a model around it."""

    def __init__(self) -> None:
        self._step = tiny_engine(tiny_model(), cpu_kernels="compiled").model_step

    def __call__(self, scores: torch.Tensor, rows: list[Sequence]) -> list[int]:
        tokens: list[int] = self._step.sample(scores, rows).tolist()
        return tokens


MORE_CASES = {
    **CASES,
    "nearly everything": SamplingParams(temperature=3.0, top_p=0.999),
    "one token": SamplingParams(temperature=0.5, top_k=1),
    "all tokens": SamplingParams(temperature=0.5, top_k=10**6),
    "greedy": SamplingParams(temperature=0),
    "cold": SamplingParams(temperature=0.01),
    "typical of few": SamplingParams(temperature=1.0, typical_p=0.9, top_k=30),
}


@pytest.mark.parametrize("vocab", [VOCAB, 3000, 20_011])
def test_the_compiled_sampler_draws_the_same_tokens(vocab: int) -> None:
    compiled = CompiledDraws()
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(7)) * 2.5
    # What grammars leave behind: impossible tokens.
    logits[5:10, vocab // 50 :] = -torch.inf
    logits[15, :] = -torch.inf
    logits[15, 17] = 0.0
    for name, params in MORE_CASES.items():
        rows = [sequence(params, c) for c in range(40)]
        expected = sampler.sample(logits.clone(), rows).tolist()
        assert compiled(logits.clone(), rows) == expected, name
