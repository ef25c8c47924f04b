"""Wrong combinations end before anything is loaded, each in one clear line."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from config import checks, gpus
from config.checks import preflight
from config.problems import ConfigError
from config.settings import load
from tests.config.model_files import (
    HIDDEN,
    INNER,
    VOCABULARY,
    llama_shapes,
    lora_shapes,
    write_adapter,
    write_gguf,
    write_model,
    write_shards,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def problems(**given: Any) -> list[str]:
    """The problems found with these settings, on the CPU unless told otherwise."""
    try:
        preflight(load({"only_cpu": "true", **{name: str(value) for name, value in given.items()}}), port=False)
    except ConfigError as error:
        return error.problems
    return []


# --- base model


def test_each_kind_of_base_model_is_accepted(tmp_path, model):
    assert problems() == []
    assert problems(base_model=model) == []
    assert problems(base_model=write_shards(tmp_path / "shards")) == []
    assert problems(base_model=write_gguf(tmp_path / "m.gguf")) == []
    assert problems(base_model="some-org/some-model") == []


@pytest.mark.parametrize("name", ["no-such-model", "./org/model", "/no/such/model", "tests/model"])
def test_a_path_that_does_not_exist_is_no_hub_id(name):
    assert problems(base_model=name) == [f"--base_model: {Path(name)}: no such file or directory"]


def test_a_directory_without_a_model_is_refused(tmp_path):
    assert "is no model directory: no config.json" in problems(base_model=tmp_path)[0]
    write_gguf(tmp_path / "m.gguf")
    assert f"give the GGUF file itself, such as {tmp_path / 'm.gguf'}" in problems(base_model=tmp_path)[0]


def test_a_directory_without_weights_or_with_pickled_ones_is_refused(model):
    (model / "model.safetensors").unlink()
    assert "has no weights" in problems(base_model=model)[0]
    (model / "pytorch_model.bin").touch()
    assert "as pickle files only" in problems(base_model=model)[0]


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which the index names, is missing" in problems(base_model=folder)[0]


def test_damaged_files_are_refused(tmp_path, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "an incomplete copy?" in problems(base_model=model)[0]
    (model / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is no valid JSON" in problems(base_model=model)[0]
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    assert "is neither a model directory nor a GGUF file" in problems(base_model=tmp_path / "junk.gguf")[0]
    assert "give its directory" in problems(base_model=weights)[0]


def test_a_length_beyond_the_models_own_is_refused(tmp_path, model):
    assert problems(base_model=model, max_model_len=64) == []
    line = "--max_model_len: 65 tokens, but the model's limit is 64"
    assert problems(base_model=model, max_model_len=65) == [line]
    assert problems(base_model=write_gguf(tmp_path / "m.gguf"), max_model_len=65) == [line]
    stretched = write_model(tmp_path / "yarn", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert problems(base_model=stretched, max_model_len=256) == []


# --- LoRA


def test_an_adapter_that_fits_is_accepted(tmp_path, model):
    adapter = write_adapter(tmp_path / "lora")
    assert problems(base_model=model, lora_model=adapter) == []
    assert problems(base_model=write_gguf(tmp_path / "m.gguf"), lora_model=adapter) == []
    assert problems(base_model="some-org/some-model", lora_model=adapter) == []


def test_an_adapter_with_a_longer_vocabulary_is_accepted(tmp_path, model):
    shapes = lora_shapes("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN)
    shapes["base_model.model.model.embed_tokens.modules_to_save.weight"] = (VOCABULARY + 5, HIDDEN)
    shapes["base_model.model.lm_head.weight"] = (VOCABULARY + 5, HIDDEN)
    assert problems(base_model=model, lora_model=write_adapter(tmp_path / "lora", shapes)) == []


def test_an_adapter_on_the_embedding_is_compared_by_the_hidden_size(tmp_path, model):
    start = "base_model.model.model.embed_tokens.lora_embedding_"
    good = {start + "A": (4, VOCABULARY), start + "B": (HIDDEN, 4)}
    assert problems(base_model=model, lora_model=write_adapter(tmp_path / "good", good)) == []
    bad = {start + "A": (4, VOCABULARY), start + "B": (HIDDEN + 1, 4)}
    assert "does not fit" in problems(base_model=model, lora_model=write_adapter(tmp_path / "bad", bad))[0]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_an_adapter_of_other_shape_is_refused(tmp_path, model, kind):
    base = model if kind == "safetensors" else write_gguf(tmp_path / "m.gguf")
    adapter = write_adapter(tmp_path / "lora", lora_shapes("model.layers.0.mlp.up_proj", HIDDEN + 1, INNER))
    (line,) = problems(base_model=base, lora_model=adapter)
    assert line == (
        f"--lora_model: {adapter}: does not fit the base model: "
        "model.layers.0.mlp.up_proj is 16x8 in the base model and 16x9 in the adapter"
    )


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("module", ["model.layers.2.self_attn.q_proj", "model.layers.0.self_attn.qkv", "transformer.x"])
def test_an_adapter_for_modules_that_are_not_there_is_refused(tmp_path, model, kind, module):
    base = model if kind == "safetensors" else write_gguf(tmp_path / "m.gguf")
    adapter = write_adapter(tmp_path / "lora", lora_shapes(module, HIDDEN, HIDDEN))
    assert problems(base_model=base, lora_model=adapter)[0].endswith(f"it has no module {module}")


def test_a_file_that_leaves_out_the_leading_part_of_the_names_is_compared_all_the_same(tmp_path):
    base = write_model(tmp_path / "model", llama_shapes(prefix=""))
    assert problems(base_model=base, lora_model=write_adapter(tmp_path / "lora")) == []
    wrong = write_adapter(tmp_path / "wrong", lora_shapes("model.layers.0.mlp.up_proj", HIDDEN, INNER + 1))
    assert "does not fit" in problems(base_model=base, lora_model=wrong)[0]


def test_a_directory_that_is_no_adapter_is_refused(tmp_path, model):
    folder = tmp_path / "lora"
    assert problems(base_model=model, lora_model=folder) == [f"--lora_model: {folder}: no such directory"]
    folder.mkdir()
    assert "no adapter_config.json" in problems(base_model=model, lora_model=folder)[0]
    write_adapter(folder, peft_type="IA3")
    assert "of type IA3, not LORA" in problems(base_model=model, lora_model=folder)[0]
    write_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "as a pickle file only" in problems(base_model=model, lora_model=folder)[0]
    (folder / "adapter_model.bin").unlink()
    assert "has no weights" in problems(base_model=model, lora_model=folder)[0]


def test_adapters_chosen_by_name_are_checked_each(tmp_path, model):
    good = write_adapter(tmp_path / "good")
    assert problems(base_model=model, lora_model=json.dumps([f"{good}", f"a={good}", f"b={good}"])) == []
    bad = write_adapter(tmp_path / "bad", lora_shapes("model.layers.9.x", HIDDEN, HIDDEN))
    assert problems(base_model=model, lora_model=json.dumps([f"a={good}", f"b={bad}", "c=/no/such"])) == [
        f"--lora_model: b={bad}: does not fit the base model: it has no module model.layers.9.x",
        "--lora_model: c=/no/such: no such directory",
    ]


@pytest.mark.parametrize("name", ["llama-3-chinese", "model", "mine"])
def test_an_adapter_may_not_take_a_name_of_the_base_model(tmp_path, model, name):
    adapter = write_adapter(tmp_path / "lora")
    served = {"served_model_name": "mine"} if name == "mine" else {}
    assert problems(base_model=model, lora_model=f"{name}={adapter}", **served) == [
        f"--lora_model: {name}={adapter}: {name} is the name of the base model"
    ]


@pytest.mark.parametrize(
    ("config", "what"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "biases")],
)
def test_an_adapter_that_is_more_than_low_rank_can_be_merged_but_not_chosen(tmp_path, model, config, what):
    adapter = write_adapter(tmp_path / "lora", **config)
    assert problems(base_model=model, lora_model=adapter) == []
    assert problems(base_model=model, lora_model=f"a={adapter}") == [
        f"--lora_model: a={adapter}: uses {what}, which cannot be chosen per request; without a name it can be merged"
    ]


def test_quantised_weights_take_adapters_in_one_way_only(tmp_path, model):
    adapter = write_adapter(tmp_path / "lora")
    assert problems(base_model=model, lora_model=f"a={adapter}", load_in_4bit="true") == []
    assert problems(base_model=model, lora_model=f"{adapter},a={adapter}", load_in_4bit="true") == [
        "--lora_model: quantised weights take either one adapter without a name or adapters with names"
    ]


# --- tokenizer


def test_one_of_the_three_places_must_have_a_tokenizer(tmp_path):
    base = write_model(tmp_path / "model", tokenizer=False)
    assert problems(base_model=base) == [f"--tokenizer_path: needed, since {base} has no tokenizer (tokenizer.json)"]
    adapter = write_adapter(tmp_path / "lora")
    (adapter / "tokenizer.json").touch()
    assert problems(base_model=base, lora_model=adapter) == []
    own = tmp_path / "tokenizer"
    assert problems(base_model=base, tokenizer_path=own) == [f"--tokenizer_path: {own}: no such directory"]
    own.mkdir()
    assert "has no tokenizer" in problems(base_model=base, tokenizer_path=own)[0]
    (own / "tokenizer.model").touch()
    assert problems(base_model=base, tokenizer_path=own) == []


# --- quantisation and attention


def test_quantisation_works_on_the_cpu_but_not_twice(tmp_path, model):
    assert problems(base_model=model, load_in_8bit="true") == []
    assert problems(base_model=model, load_in_4bit="true") == []
    assert problems(base_model=model, load_in_8bit="true", load_in_4bit="true") == [
        "--load_in_8bit, --load_in_4bit: choose one of them"
    ]
    quantized = write_model(tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    assert "is quantised already" in problems(base_model=quantized, load_in_4bit="true")[0]


def test_a_gguf_is_not_quantised_again(tmp_path):
    (line,) = problems(base_model=write_gguf(tmp_path / "m.gguf"), load_in_4bit="true")
    assert line.startswith("--load_in_4bit: a GGUF file has its own quantisation")


def test_a_missing_package_is_named(model, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert problems(base_model=model, load_in_8bit="true") == ["--load_in_8bit: bitsandbytes is not installed"]
    assert problems(base_model=model, use_flash_attention_2="true") == [
        "--use_flash_attention_2: flash-attn works on a GPU only"
    ]
    monkeypatch.setattr(gpus, "count", lambda: 1)
    assert problems(base_model=model, use_flash_attention_2="true", only_cpu="false") == [
        "--use_flash_attention_2: flash-attn is not installed (see requirements-gpu.txt)"
    ]


# --- devices


def test_without_a_gpu_the_cpu_is_used_and_said_so(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 0)
    result = preflight(load(), port=False)
    assert result.settings.only_cpu
    assert [line for line in result.notices if line.endswith("running on the CPU")]


def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 0)
    assert problems(only_cpu="false", gpus="0")[0].startswith("--gpus: there is no GPU 0: ")


def test_gpus_that_were_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 2)
    assert problems(only_cpu="false", gpus="0,1") == []
    assert problems(only_cpu="false", gpus="1,2") == ["--gpus: there is no GPU 2 on this machine (0 to 1)"]


def test_only_cpu_asks_no_driver(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: pytest.fail("asked"))
    assert problems(gpus="7") == []


@pytest.mark.parametrize("found", [0, 2])
def test_the_driver_is_asked_once_in_a_process_and_not_at_a_reload(monkeypatch, found):
    monkeypatch.setattr(gpus, "count", lambda: found)
    before = preflight(load(), port=False).settings
    monkeypatch.setattr(gpus, "count", lambda: pytest.fail("asked again"))
    monkeypatch.setattr(gpus, "present", lambda: pytest.fail("asked again"))
    assert preflight(load(), port=False).settings == before


def test_hidden_gpus_do_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.present() == 0


# --- address


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = load({"only_cpu": "true", "port": str(port)})
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1 is in use"):
            preflight(settings)
        preflight(settings, port=False)


def test_an_address_found_free_is_not_tried_again_in_the_same_process():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = load({"only_cpu": "true", "port": str(port)})
    preflight(settings)
    with socket.create_server(("127.0.0.1", port)):
        preflight(settings)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1"])
def test_a_host_that_is_not_ours_is_refused(host):
    with pytest.raises(ConfigError) as caught:
        preflight(load({"only_cpu": "true", "host": host}))
    assert caught.value.problems[0].startswith("--host: ")


def test_several_problems_are_all_told(tmp_path):
    assert len(problems(base_model=tmp_path, load_in_8bit="true", load_in_4bit="true", tokenizer_path="/none")) == 3


def test_the_http_side_of_a_pool_of_its_own_looks_at_neither_model_nor_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: pytest.fail("asked"))
    settings = load({"launch_pool": "false", "base_model": "/not/visible/here", "gpus": "7"})
    assert preflight(settings, port=False, model=False).settings == settings


def access_notices(**given: object) -> list[str]:
    notices: list[str] = []
    assert checks._check_access(load(given), notices) == []
    return notices


def test_a_server_for_the_world_without_keys_says_so_in_one_line(tmp_path):
    (line,) = access_notices(host="0.0.0.0")
    assert "no --api_key" in line
    (line,) = access_notices(host="llm.example.org", port="80")
    assert "llm.example.org:80" in line
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert access_notices(host=host) == []
    assert access_notices(host="0.0.0.0", api_key="alice=0123456789abcdef") == []
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("alice: 0123456789abcdef\n")
    assert access_notices(host="0.0.0.0", api_key_file=str(path)) == []


def test_limits_without_keys_are_worth_a_warning():
    assert access_notices(key_max_concurrent="3") == ["limits for each key have no effect without keys"]


def test_a_key_file_that_cannot_be_used_ends_the_start(tmp_path):
    path = tmp_path / "keys"
    path.write_text("alice: a b\n")
    (problem,) = checks._check_access(load({"api_key_file": str(path)}), [])
    assert problem.startswith(f"--api_key_file: {path}: line 1: ")
