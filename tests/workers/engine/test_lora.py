"""Adapters chosen per request: each row gets its own adapter's update, and the bare base none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.workers.engine.tiny import CACHE, drain, ids_of, job, prompts, reference, tiny_model, tiny_tokenizer
from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.errors import LoadError
from workers.engine.loader import load
from workers.messages import BeamParams, Failed, SamplingParams, Started

GREEDY = SamplingParams(temperature=0)


def make_adapter(directory: Path, seed: int, **options: Any) -> None:
    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(**{**defaults, **options}))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "one", 1)
    # Another rank and other layers than the first.
    make_adapter(tmp_path / "two", 2, r=8, target_modules=["k_proj", "down_proj", "up_proj"], lora_alpha=16)
    (tmp_path / "run").mkdir()
    return tmp_path


def config(directory: Path, kernels: Any = "auto", **adapters: str) -> WorkerConfig:
    return WorkerConfig(
        cpu_kernels=kernels,
        base_model=str(directory / "base"),
        dtype="float32",
        adapters=adapters,
        prefill_chunk=16,
        runtime_dir=str(directory / "run"),
        cache_dir=str(CACHE),
    )


def silent(_progress: float, _stage: str) -> None:
    pass


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_adapters_and_the_base_share_a_batch_and_each_is_exact(directory: Path, kernels: str) -> None:
    settings = config(directory, kernels, first=str(directory / "one"), **{"a.second": str(directory / "two")})
    engine = build(load(settings, silent), settings)
    models = {
        "": tiny_model("llama"),
        "first": PeftModel.from_pretrained(tiny_model("llama"), directory / "one").eval(),
        "a.second": PeftModel.from_pretrained(tiny_model("llama"), directory / "two").eval(),
    }
    asked = prompts(4)
    orders = [job(f"{n}/{i}", p, 16, adapter=n, sampling=GREEDY) for n in models for i, p in enumerate(asked)]
    orders += [job(f"{n}/beam", asked[0], 10, adapter=n, beams=BeamParams(num_beams=3)) for n in models]
    reports = drain(engine, orders)
    different = set()
    for name, model in models.items():
        for i, prompt in enumerate(asked):
            assert ids_of(reports, f"{name}/{i}") == reference(model, prompt, 16)[0]
        assert ids_of(reports, f"{name}/beam") == reference(model, asked[0], 10, num_beams=3)[0]
        different.add(tuple(ids_of(reports, f"{name}/1")))
    assert len(different) == 3


def test_the_prefix_cache_keeps_adapters_apart(directory: Path) -> None:
    settings = config(directory, first=str(directory / "one"))
    engine = build(load(settings, silent), settings)
    prompt = prompts(1, 40, 40)[0]
    for name, cached in (("", 0), ("first", 0), ("", 32), ("first", 32)):
        reports = drain(engine, [job("x", prompt, 4, adapter=name)])
        assert [r.cached_tokens for r in reports if isinstance(r, Started)] == [cached]


def test_an_unknown_adapter_is_refused(directory: Path) -> None:
    settings = config(directory, first=str(directory / "one"))
    engine = build(load(settings, silent), settings)
    (report,) = engine.submit(job("x", [20, 21], adapter="second"))
    assert isinstance(report, Failed)
    assert "second" in report.message


def test_an_adapter_that_is_more_than_lora_is_refused(directory: Path) -> None:
    make_adapter(directory / "dora", 3, use_dora=True)
    with pytest.raises(LoadError, match="DoRA"):
        load(config(directory, bad=str(directory / "dora")), silent)
    make_adapter(directory / "saved", 3, modules_to_save=["lm_head"])
    with pytest.raises(LoadError, match="modules_to_save"):
        load(config(directory, bad=str(directory / "saved")), silent)
