"""Where settings come from, which source wins, and what a mistake looks like."""

import tomllib
from pathlib import Path

import pytest

from config.problems import ConfigError
from config.settings import GROUPS, Settings, load, unknown_variables
from config.sources import ROOT


def problems_of(**given: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(given)
    return caught.value.problems


def write_toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_demo():
    settings = load()
    assert (settings.host, settings.port, settings.gpus) == ("127.0.0.1", 19327, [0])
    assert not any(getattr(settings, name) for name in ("only_cpu", "load_in_8bit", "load_in_4bit", "strict"))
    assert settings.base_model.endswith(".gguf")


def test_command_line_wins_over_environment_over_platform_over_file_over_default(tmp_path, monkeypatch):
    path = write_toml(tmp_path, "port = 1001\nhttp_workers = 4\nmax_batch = 7\nmax_queue = 9\n")
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    monkeypatch.setenv("TAILRACE_PORT", "1002")
    monkeypatch.setenv("TAILRACE_MAX_BATCH", "8")
    settings = load({"config": str(path), "port": "1003"})
    assert settings.port == 1003
    assert settings.max_batch == 8
    assert settings.http_workers == 3
    assert settings.max_queue == 9
    assert settings.prefill_chunk == 128


def test_the_file_may_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILRACE_CONFIG", str(write_toml(tmp_path, "port = 1001\n")))
    assert load().port == 1001


def test_what_was_chosen_can_be_told_from_defaults(monkeypatch):
    monkeypatch.setenv("TAILRACE_PORT", "19327")
    assert load({"only_cpu": "true"}).model_fields_set >= {"port", "only_cpu"}
    assert "gpus" not in load().model_fields_set


def test_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("TAILRACE_PORT", "")
    assert load().port == 19327


@pytest.mark.parametrize(("text", "expected"), [("0", [0]), ("0,1", [0, 1]), ("[2, 3]", [2, 3]), (" 1 , 0 ", [1, 0])])
def test_gpus_are_a_list_with_commas(text, expected, monkeypatch):
    monkeypatch.setenv("TAILRACE_GPUS", text)
    assert load().gpus == expected


@pytest.mark.parametrize("text", ["0,0", "-1", "x", "", "[0"])
def test_bad_gpus_are_refused(text):
    (problem,) = problems_of(gpus=text)
    assert problem.startswith("--gpus: ")


def test_names_with_commas_survive_as_a_json_list(monkeypatch):
    monkeypatch.setenv("TAILRACE_SERVED_MODEL_NAME", '["a,b", "c"]')
    assert load().served_model_name == ["a,b", "c"]


def test_the_platforms_port_listens_on_every_address(monkeypatch):
    monkeypatch.setenv("PORT", "5000")
    settings = load()
    assert (settings.host, settings.port) == ("0.0.0.0", 5000)


def test_the_platforms_port_leaves_a_chosen_host_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PORT", "5000")
    assert load({"host": "127.0.0.1"}).host == "127.0.0.1"
    assert load({"config": str(write_toml(tmp_path, 'host = "::1"\n'))}).host == "::1"


def test_a_chosen_port_overrules_the_platforms_with_its_host(monkeypatch):
    monkeypatch.setenv("PORT", "5000")
    monkeypatch.setenv("TAILRACE_PORT", "6000")
    settings = load()
    assert (settings.host, settings.port) == ("127.0.0.1", 6000)


def test_a_problem_names_where_the_value_came_from(tmp_path, monkeypatch):
    assert problems_of(port="x")[0].startswith("--port: should be a valid integer")
    monkeypatch.setenv("TAILRACE_MAX_BATCH", "0")
    assert problems_of()[0].startswith("TAILRACE_MAX_BATCH: should be greater than or equal to 1 (got '0')")
    monkeypatch.delenv("TAILRACE_MAX_BATCH")
    monkeypatch.setenv("WEB_CONCURRENCY", "many")
    assert problems_of()[0].startswith("WEB_CONCURRENCY: ")
    monkeypatch.delenv("WEB_CONCURRENCY")
    path = write_toml(tmp_path, 'dtype = "int4"\n')
    assert problems_of(config=str(path))[0].startswith(f"{path}: dtype: ")


def test_each_bad_value_has_its_own_line():
    assert len(problems_of(port="0", max_queue="-1", kv_cache_gib="nan")) == 3


def test_a_bad_port_is_one_problem_though_other_defaults_depend_on_it():
    assert len(problems_of(port="0")) == 1


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest_name(tmp_path):
    path = write_toml(tmp_path, "prot = 1\n")
    assert problems_of(config=str(path)) == [f"{path}: unknown key 'prot' (did you mean port?)"]


def test_a_broken_or_missing_file_is_one_problem(tmp_path):
    assert problems_of(config=str(write_toml(tmp_path, "port = \n")))[0].startswith("--config: ")
    assert "No such file" in problems_of(config=str(tmp_path / "none.toml"))[0]


def test_an_unknown_variable_is_worth_a_warning_only():
    lines = unknown_variables({"TAILRACE_PRT": "1", "TAILRACE_PORT": "2", "OTHER": "3"})
    assert lines == ["TAILRACE_PRT: unknown setting, ignored (did you mean TAILRACE_PORT?)"]


def test_the_runtime_directory_belongs_to_user_and_port(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert load({"port": "8000"}).runtime_dir == tmp_path / "tailrace-8000"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert load({"port": "8000"}).runtime_dir.name.endswith("-8000")
    assert load({"runtime_dir": str(tmp_path / "r")}).pool_socket == tmp_path / "r" / "pool.sock"


def test_an_ipv6_address_is_bound_in_brackets():
    assert load({"host": "::1", "port": "80"}).bind == "[::1]:80"
    assert load().bind == "127.0.0.1:19327"


def test_every_setting_has_a_group_and_a_description():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["group"] in GROUPS, name


def test_the_sample_file_shows_every_setting_with_its_default():
    text = (ROOT / "config" / "example.toml").read_text(encoding="utf-8")
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and " = " in line[:30]]
    sample = tomllib.loads("\n".join(lines))
    assert set(sample) == set(Settings.model_fields) - {"config"}
    shown_as_example = {
        "base_model",
        "lora_model",
        "tokenizer_path",
        "served_model_name",
        "runtime_dir",
        "cache_dir",
        "state_dir",
    }
    shown_as_example |= {"api_key_file", "log_file"}
    defaults = load()
    for name in set(sample) - shown_as_example:
        assert sample[name] == getattr(defaults, name), name


def test_adapters_are_merged_or_named(tmp_path, monkeypatch):
    settings = load({"lora_model": '["/loras/a", "law=/loras/law", "art=org/art"]'})
    assert settings.merged_lora == "/loras/a"
    assert settings.adapters == {"law": "/loras/law", "art": "org/art"}
    assert load().merged_lora is None
    path = write_toml(tmp_path, 'lora_model = "law=/loras/law"')
    assert load({"config": str(path)}).adapters == {"law": "/loras/law"}
    path = write_toml(tmp_path, 'lora_model = ["/loras/a", "law=/loras/law"]')
    assert load({"config": str(path)}).lora_model == ["/loras/a", "law=/loras/law"]
    monkeypatch.setenv("TAILRACE_LORA_MODEL", "law=/loras/law,art=/loras/art")
    assert list(load().adapters) == ["law", "art"]


def test_an_equals_sign_in_a_directory_makes_no_name():
    assert load({"lora_model": "/loras/r=8"}).merged_lora == "/loras/r=8"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ('["/a", "/b"]', "only one adapter can be merged; give the others a name (NAME=DIR)"),
        ('["x=/a", "x=/b"]', "two adapters are named 'x'"),
        ("x=", "'x=' names no directory"),
        ('[" x=/a"]', "' x' is no name for an adapter"),
    ],
)
def test_adapters_that_cannot_be_told_apart_are_refused(given, reason):
    assert problems_of(lora_model=given)[0].startswith(f"--lora_model: {reason}")


def test_the_base_model_is_served_under_its_names_and_the_demos():
    assert load({"base_model": "/srv/My-Model/"}).served_names == ["My-Model", "llama-3-chinese"]
    assert load({"base_model": "/srv/m.Q4.gguf"}).served_names == ["m.Q4", "llama-3-chinese"]
    assert load({"served_model_name": "a,b"}).served_names == ["a", "b", "llama-3-chinese"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trusted_proxies", "nginx"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("allowed_hosts", "http://x.example"),
        ("allowed_hosts", "x.example:80"),
        ("cors_origins", "app.example.org"),
        ("cors_origins", "https://app.example.org/"),
        ("api_key", "a b"),
    ],
)
def test_bad_names_of_who_may_come_in_are_refused(name, value):
    (problem,) = problems_of(**{name: value})
    assert problem.startswith(f"--{name}: ")


def test_who_may_come_in():
    settings = load({"allowed_hosts": "LLM.example.org,.x.example", "trusted_proxies": '["10.0.0.0/8", "::1"]'})
    assert settings.allowed_hosts == ["llm.example.org", ".x.example"]
    assert settings.trusted_proxies == ["10.0.0.0/8", "::1"]
    assert load({"cors_origins": "https://a.example,*"}).cors_origins == ["https://a.example", "*"]
    assert not load().has_keys
    assert load({"api_key": "k"}).has_keys


def test_systemds_credential_is_the_file_of_keys_if_it_was_handed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert Settings().api_key_file is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "of-somebody-else"))
    assert Settings().api_key_file, "keys that cannot be read are not the same as none"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "tailrace.keys").write_text("alice: sk-1\n")
    assert Settings().api_key_file == tmp_path / "tailrace.keys"
    assert Settings(api_key_file=tmp_path / "mine").api_key_file == tmp_path / "mine"
