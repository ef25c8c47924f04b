"""What an operator copies: units, Procfile, nginx sample, gunicorn's configuration."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import Settings
from tests.workers.pool.harness import ROOT

UNITS = sorted((ROOT / "systemd").glob("*.service"))
POOL_STOP_S = 10


def read_unit(path: Path) -> dict[str, list[str]]:
    """The settings of [Service], repeated ones in order."""
    service = path.read_text().partition("[Service]")[2].partition("[Install]")[0]
    settings: dict[str, list[str]] = {}
    for line in service.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_no_fault_with_the_units(tmp_path):
    for unit in UNITS:
        # The program is not installed here.
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/tailrace/.venv/bin/python", "/bin/true"))
    command = ["systemd-analyze", "verify", *(str(tmp_path / unit.name) for unit in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_counts_little_that_the_units_may_reach(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_started_means_ready_a_standstill_is_noticed_and_only_hopeless_cases_stay_down(unit):
    settings = read_unit(unit)
    assert (settings["Type"], settings["NotifyAccess"]) == (["notify"], ["main"])
    # The pool mends a hanging model worker first.
    assert int(settings["WatchdogSec"][0]) >= 2 * Settings().watchdog_s
    assert settings["Restart"] == ["on-failure"]
    assert settings["RestartPreventExitStatus"] == ["2"]
    assert "StartLimitIntervalSec=0\n" in unit.read_text()


def test_the_sample_of_etc_default_has_settings_only(directory):
    text = (ROOT / "systemd" / "tailrace.default").read_text()
    names = re.findall(r"^#?TAILRACE_(\w+)=", text, re.MULTILINE)
    assert len(names) > 8
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert all(line.startswith("#") or not line for line in text.splitlines())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_stopping_gives_streams_their_time_and_then_leaves_nothing(unit):
    settings = read_unit(unit)
    assert settings["KillMode"] == ["mixed"]
    assert int(settings["TimeoutStopSec"][0]) > Settings().graceful_timeout_s + POOL_STOP_S
    assert "MemoryDenyWriteExecute" not in settings
    assert settings["EnvironmentFile"] == ["-/etc/default/tailrace"]
    if "gunicorn" in settings["ExecStart"][0]:
        assert settings["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    else:
        assert "ExecReload" not in settings


def test_only_units_with_a_model_see_devices():
    for unit in UNITS:
        settings = read_unit(unit)
        holds_model = unit.stem != "tailrace-http"
        assert ("DeviceAllow" in settings) == holds_model
        assert ("PrivateDevices" in settings) != holds_model


def test_the_files_parse_as_ini_apart_from_repetitions():
    for unit in UNITS:
        parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(unit.read_text())
        assert parser.sections() == ["Unit", "Service", "Install"]


def test_the_procfile_becomes_gunicorn_and_leaves_time_before_the_platforms_kill():
    (line,) = [line for line in (ROOT / "Procfile").read_text().splitlines() if not line.startswith("#")]
    name, _, command = line.partition(": ")
    assert name == "web"
    shown = command.replace("exec python -m gunicorn -c gunicorn.conf.py", "env")
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    assert "TAILRACE_GRACEFUL_TIMEOUT_S=20" in done.stdout
    assert 20 + POOL_STOP_S <= 30


def test_the_nginx_sample_says_what_streams_need():
    text = re.sub(r"#.*", "", (ROOT / "config" / "nginx.conf").read_text())
    for needed in (
        "proxy_http_version 1.1;",
        'proxy_set_header Connection "";',
        "proxy_buffering off;",
        "proxy_request_buffering on;",
        "gzip off;",
        "proxy_ignore_client_abort off;",
    ):
        assert needed in text
    assert "non_idempotent" not in text
    assert text.count("{") == text.count("}")
    assert int(re.search(r"keepalive_timeout (\d+)s", text)[1]) < Settings().http_keepalive_s  # type: ignore[index]
    assert int(re.search(r"proxy_read_timeout (\d+)s", text)[1]) > Settings().request_timeout_s  # type: ignore[index]
    assert int(re.search(r"client_max_body_size (\d+)m", text)[1]) * 2**20 >= Settings().max_body_bytes  # type: ignore[index]


def test_gunicorn_is_told_what_the_settings_say(directory):
    names = ["bind", "workers", "keepalive", "graceful_timeout", "timeout"]
    names += ["max_requests", "control_socket_disable", "preload_app"]
    code = (
        "import json, runpy; conf = runpy.run_path('gunicorn.conf.py');"
        f"print(json.dumps({{name: conf[name] for name in {names}}}))"
    )
    environ = {"PATH": os.defpath, "HOME": str(directory), "TAILRACE_RUNTIME_DIR": str(directory)}
    environ |= {"TAILRACE_ONLY_CPU": "1", "PORT": "18999", "WEB_CONCURRENCY": "3", "TAILRACE_HTTP_KEEPALIVE_S": "33"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["bind"], told["workers"], told["keepalive"]) == ("0.0.0.0:18999", 3, 33)
    assert told["graceful_timeout"] == 120
    assert 30 <= told["timeout"] <= 60
    assert (told["max_requests"], told["control_socket_disable"], told["preload_app"]) == (0, True, False)
