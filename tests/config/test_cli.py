"""The command line as an operator meets it."""

import os
import re
import subprocess
import sys

import pytest

from config import __version__, cli
from config.problems import ConfigError
from config.settings import GROUPS, Settings
from config.sources import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def problem_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.parse(arguments)
    return str(caught.value)


def test_flags_become_variables_with_the_same_meaning():
    given = cli.parse(["--base_model", "m", "--only_cpu", "--gpus", "0,1", "--port=8000"])
    assert cli.as_environment(given) == {
        "TAILRACE_BASE_MODEL": "m",
        "TAILRACE_ONLY_CPU": "true",
        "TAILRACE_GPUS": "0,1",
        "TAILRACE_PORT": "8000",
    }


def test_dashes_are_taken_for_underscores_in_flags_but_not_in_values():
    assert cli.parse(["--base-model", "my-model", "--lora-model=a-b"]) == {
        "base_model": "my-model",
        "lora_model": '["a-b"]',
    }


def test_lists_are_repeatable():
    assert cli.parse(["--gpus", "0", "--gpus", "1,2"]) == {"gpus": "0,1,2"}
    assert cli.parse(["--served_model_name", "a,b", "--served_model_name", "c"]) == {
        "served_model_name": '["a,b", "c"]'
    }


def test_a_switch_can_be_switched_off():
    assert cli.parse(["--only_cpu=false"]) == {"only_cpu": "false"}


def test_a_typo_is_answered_with_the_nearest_flag():
    assert problem_of("--prot", "1") == "unknown flag --prot (did you mean --port?)"
    assert problem_of("--load-in-8bits") == "unknown flag --load_in_8bits (did you mean --load_in_8bit?)"
    assert problem_of("--base") == "unknown flag --base"


def test_other_mistakes_are_one_line_too():
    assert problem_of("--port") == "--port: expected one argument"
    assert problem_of("--host", "") == "--host: expected a value that is not empty"
    assert problem_of("model") == "unexpected argument 'model': every setting is given as --name value"


def test_help_shows_every_flag_in_its_group_with_unit_and_default():
    shown = run("--help", COLUMNS="110")
    assert shown.returncode == 0
    text = re.sub(r"\s+", " ", shown.stdout)
    positions = [text.index(f"{group}:") for group in GROUPS]
    assert positions == sorted(positions)
    for name in Settings.model_fields:
        assert f"--{name} " in text
    assert "(tokens; default: 128)" in text
    assert "(default: 19327)" in text
    assert "Undefined" not in text


def test_version_is_printed():
    shown = run("--version")
    assert (shown.returncode, shown.stdout.strip()) == (0, f"tailrace {__version__}")


def test_the_package_states_the_same_version():
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--prot", "1"], "unknown flag --prot (did you mean --port?)"),
        (["--port", "70000"], "--port: should be less than or equal to 65535 (got '70000')"),
        (["--base_model", "/no/such"], "--base_model: /no/such: no such file or directory"),
        (["--load_in_8bit", "--load_in_4bit", "--base_model", "some-org/some-model"],
         "--load_in_8bit, --load_in_4bit: choose one of them"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line_and_exit_code_2(arguments, line, tmp_path):
    ended = run("--only_cpu", "--runtime_dir", str(tmp_path / "run"), *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"tailrace: error: {line}" in ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr


def test_a_bad_variable_ends_the_same_way(tmp_path):
    ended = run("--only_cpu", "--runtime_dir", str(tmp_path / "run"), TAILRACE_PORT="x")
    assert ended.returncode == 2
    assert ended.stderr.startswith("tailrace: error: TAILRACE_PORT: ")
