"""The engine on a CUDA device: the same tokens as ``transformers.generate`` there, with each back end.

Run with ``make test-gpu`` on a machine with an NVIDIA GPU; the ordinary test run leaves these out.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.on_gpu import SHAPE, engine_of, save_model
from tests.workers.engine.tiny import EOS, drain, ids_of, job, prompts, reference, tiny_model, vector_of
from workers.messages import BeamParams, EmbedJob, SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(tmp_path)
    return tmp_path


def test_greedy_beams_and_embeddings_beside_each_other_are_exact(directory: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = engine_of(directory)
    model = tiny_model("llama", **SHAPE)
    asked = prompts(12)
    orders: list[Any] = [job(f"g{i}", p, sampling=GREEDY) for i, p in enumerate(asked)]
    orders += [job(f"b{i}", p, 12, beams=BeamParams(num_beams=4)) for i, p in enumerate(asked)]
    orders += [EmbedJob(id=f"e{i}", prompt=p) for i, p in enumerate(asked)]
    reports = drain(engine, orders)
    for i, prompt in enumerate(asked):
        assert ids_of(reports, f"g{i}") == reference(model, prompt, 24)[0]
        assert ids_of(reports, f"b{i}") == reference(model, prompt, 12, num_beams=4)[0]
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        assert torch.cosine_similarity(vector_of(reports, f"e{i}"), states.mean(dim=0), dim=0) > 1 - 1e-4


def test_seeds_give_the_same_tokens_alone_and_in_company(directory: Path) -> None:
    engine = engine_of(directory)
    asked = [job(str(i), p, 20, n=2, sampling=SamplingParams(seed=i, top_p=0.9)) for i, p in enumerate(prompts(6))]
    together = drain(engine, list(asked))
    for item in asked:
        alone = drain(engine, [item])
        assert [ids_of(alone, item.id, c) for c in (0, 1)] == [ids_of(together, item.id, c) for c in (0, 1)]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_models_are_served(directory: Path, quantization: Any) -> None:
    engine = engine_of(directory, dtype="float16", quantization=quantization)
    reports = drain(engine, [job(str(i), p, sampling=GREEDY) for i, p in enumerate(prompts(4))])
    assert all(ids_of(reports, str(i)) for i in range(4))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_gives_the_logits_of_the_other_back_end(directory: Path) -> None:
    prompt = prompts(1, 300, 300)[0]
    asked = [job("x", prompt, 8, sampling=SamplingParams(temperature=0, logit_bias={EOS: -100.0}), logprobs=5)]
    plain = drain(engine_of(directory, dtype="float16"), list(asked))
    flash = drain(engine_of(directory, dtype="float16", flash_attention=True), list(asked))
    for left, right in zip(plain, flash, strict=True):
        for a, b in zip(getattr(left, "logprobs", []), getattr(right, "logprobs", []), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=0.05)
