"""Rows F15 and F16: a full disk, and model files that are damaged or hostile. Real service, tiny models."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.door.ledger import Ledger
from config.template_sandbox import fault_of
from tests.e2e.server import START_S, Server, wait_until
from tests.faults.rig import Rig, mixed, model_directory, tally
from tests.faults.table import Row

KEY = "sk-f15-secret-of-the-disk"
# Stands in every prompt of the rig's.
PROMPT = "website number"
STORED = "/v1/responses"


def limit_files(rig: Rig, soft: int | None) -> list[int]:
    """Let no process of the service write behind byte ``soft`` of any file; None takes it back. Returns the pids."""
    pids = []
    for process in rig.processes():
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard if soft is None else soft, hard))
        pids.append(process.pid)
    return pids


def store_one(rig: Rig, store: bool) -> httpx.Response:
    return rig.http.post(STORED, json={"input": "A website number 7?", "max_output_tokens": 4, "store": store})


def events_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a log of JSON; of a disk that was full, half of one may be there."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@contextmanager
def guarded_rig(**settings: object) -> Iterator[Rig]:
    rig = Rig(step_s=0.002, api_key=f"alice={KEY}", **settings)
    rig.http.headers["Authorization"] = rig._clients.headers["Authorization"] = f"Bearer {KEY}"
    with rig:
        yield rig


@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.nightly)])
def test_f15_a_full_disk_costs_lines_of_the_log_and_what_was_to_be_stored(row: Row, tmp_path: Path, count: int):
    """No process of the service can write to any file any more: neither the log, nor the store, nor the figures."""
    log = tmp_path / "service.log"
    with guarded_rig(log_file=log, log_format="json") as rig:
        row.fault = "no process can write to a file (RLIMIT_FSIZE): log, store, figures, temporary files"
        asks = mixed(count)
        references = rig.alone(asks)
        assert store_one(rig, True).status_code == 200
        born = limit_files(rig, 1)
        before = log.stat().st_size
        crowd = rig.start(asks)
        refused, harmless = store_one(rig, True), store_one(rig, False)
        tally(row, crowd.finish(), references)
        assert log.stat().st_size == before
        # What cannot be kept says so, and what it asks for besides is not to blame.
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert harmless.status_code == 200
        assert rig.http.get("/readyz").status_code == 200
        assert rig.http.get("/metrics").status_code == 200
        assert {process.pid for process in rig.processes()} == set(born)

        limit_files(rig, None)

        def told() -> list[dict[str, Any]]:
            # A connection of its own each time: any HTTP worker may take it.
            httpx.get(rig.url + "/v1/models", headers=dict(rig.http.headers), timeout=60)
            return [each for each in events_of(log) if each["event"] == "log lines lost"]

        wait_until(lambda: len({each["pid"] for each in told()}) == 2, "what each HTTP worker has lost", 60)
        assert {each["reason"] for each in told()} == {"File too large"}
        lost = sum(each["lines"] for each in told())
        # Of each request three lines: accepted, first token, finished.
        assert lost >= 2 * count
        wait_until(lambda: store_one(rig, True).status_code == 200, "the store", 60)
        row.hit = f"{lost} lines of the log lost and counted, `store: true` answered 503"
        spoken = rig.log + log.read_text()
        for line in log.read_text().split("\n"):
            # But for those that the disk took a part of: at most one of each process.
            assert len(line.encode()) <= 8192
        assert sum(bool(line) and not line.endswith("}") for line in log.read_text().split("\n")) <= len(born)
        assert KEY not in spoken
        assert PROMPT not in spoken
        assert "Traceback" not in spoken


def test_a_standard_error_that_takes_nothing_costs_nothing_else(tmp_path: Path):
    """M12: Python's logging would tell the surroundings of each line, keys included, to wherever it still can."""
    # The server's own lines go to /dev/full; what Python or a library would say by itself goes there as well.
    script = f"exec {sys.executable} -m app 2>/dev/full"
    server = Server(command=("bash", "-c", script), TAILRACE_BASE_MODEL=str(model_directory()), TAILRACE_API_KEY=KEY)
    try:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        server.wait_ready()
        ask = {"messages": PROMPT, "max_tokens": 4}
        assert server.http.post("/v1/chat/completions", json=ask).status_code == 200
        assert server.http.post("/v1/chat/completions", json={"messages": 3}).status_code == 400
        assert server.stop() == 0
    finally:
        if server.process.poll() is None:
            server.stop()


def test_a_rotated_log_and_a_changed_form_of_it_are_followed_by_every_process(tmp_path: Path):
    log, old, toml = tmp_path / "service.log", tmp_path / "service.log.1", tmp_path / "tailrace.toml"
    toml.write_text('log_level = "info"\nlog_format = "text"\n')
    with guarded_rig(log_file=log, config=toml) as rig:
        born = {process.pid for process in rig.processes()}
        log.rename(old)
        rig.signal(signal.SIGUSR1)
        wait_until(lambda: log.exists() and "Handling signal: usr1" in log.read_text(), "the new file", 60)

        def open_files() -> set[str]:
            paths = (Path(f"/proc/{pid}/fd") for pid in [rig.process.pid, *rig.http_workers()])
            return {str(each.readlink()) for path in paths for each in path.iterdir() if each.exists()}

        wait_until(lambda: str(old) not in open_files(), "arbiter and HTTP workers to close the old file", 60)
        assert {process.pid for process in rig.processes()} == born

        toml.write_text('log_level = "debug"\nlog_format = "json"\n')
        rig.signal(signal.SIGHUP)

        def reloaded() -> set[str]:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            return {each["process"] for each in map(json.loads, lines)}

        wait_until(lambda: reloaded() >= {"arbiter", "http", "pool", "worker-0"}, "lines of all in the new form", 60)
        wait_until(
            lambda: rig.http.get("/livez").status_code == 200 and '"route":"/livez"' in log.read_text(), "it", 60
        )
        assert "Traceback" not in rig.log + old.read_text() + log.read_text()


def _can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_a_ledger_that_the_disk_has_no_room_for_is_refused_when_it_is_made(tmp_path: Path):
    """Its pages are all there from the start: one that a full disk has no room for would kill the process later."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not _can_mount(folder):
        pytest.skip("this user cannot mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"):
            Ledger(folder / "ledger")
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)
    ledger = Ledger(tmp_path / "ledger")
    found = (tmp_path / "ledger").stat()
    assert found.st_blocks * 512 >= found.st_size
    ledger.close()


# --- F16 --------------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path, canary: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flip_header(folder: Path, canary: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(3)
        file.write(b"\x7f")


def flip_offsets(folder: Path, canary: Path) -> None:
    """A header that promises more than the file has."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 40
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])


def weights_that_are_no_numbers(folder: Path, canary: Path) -> None:
    """Bits of exponents flipped: the format cannot know, the self-check does."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in range(begin + 3, len(data), 4):
        data[place] |= 0x7F
        data[place - 1] |= 0x80
    path.write_bytes(data)


def lose_a_shard(folder: Path, canary: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    places = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def junk_tokenizer(folder: Path, canary: Path) -> None:
    (folder / "tokenizer.json").write_bytes(os.urandom(4096))


def half_a_tokenizer(folder: Path, canary: Path) -> None:
    path = folder / "tokenizer.json"
    os.truncate(path, path.stat().st_size // 2)


def code_of_its_own(folder: Path, canary: Path) -> None:
    edit(
        folder / "config.json",
        model_type="canary",
        architectures=["Canary"],
        auto_map={"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Canary"},
    )
    (folder / "canary.py").write_text(f"open({str(canary)!r}, 'w')\n")


def attention_from_the_hub(folder: Path, canary: Path) -> None:
    """CVE-2026-4372."""
    edit(folder / "config.json", _attn_implementation_internal="nobody/canary")


def pickled(folder: Path, canary: Path) -> None:
    import pickle

    class Canary:
        def __reduce__(self) -> Any:
            return open, (str(canary), "w")

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def template(source: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, canary: Path) -> None:
        (folder / "chat_template.jinja").write_text(source.replace("CANARY", str(canary)))

    return write


HARMS: dict[str, Callable[[Path, Path], None]] = {
    "half a weights file": truncate,
    "a bit of its header": flip_header,
    "a header that promises too much": flip_offsets,
    "weights that are no numbers": weights_that_are_no_numbers,
    "a shard less": lose_a_shard,
    "a tokenizer of noise": junk_tokenizer,
    "half a tokenizer": half_a_tokenizer,
    "auto_map with code": code_of_its_own,
    "a pickle": pickled,
    "attention from the hub": attention_from_the_hub,
}
HARMS |= {
    "a template that reaches for the system": template(
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}{{ messages[0].content }}"
    ),
    "a template that looks around": template("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"),
    "a template of a thousand million letters": template("{{ 'a' * 10**9 }}{{ messages[0].content }}"),
    "a template without an end": template("{% for x in range(10**9) %}{{ x }}{% endfor %}"),
    "a template that is none": template("{% for m in messages %}{{ m.content }"),
}


def start_with(folder: Path) -> tuple[int, str]:
    """Start the service as an operator would; return its exit code and its last words."""
    server = Server("--base_model", str(folder), "--dtype", "float32", "--cpu_threads", "1")
    try:

        def ended() -> bool:
            assert server._status_code("/readyz") != 200, f"it serves {folder.name}\n{server.log}"
            return server.process.poll() is not None

        wait_until(ended, f"the end of {folder.name}", START_S)
        return server.process.returncode, server.log
    finally:
        server.stop()


def check_refusal(folder: Path, harm: str, canary: Path) -> None:
    """One clear line, exit code 2, a single try, and no code of the model's has run."""
    code, log = start_with(folder)
    assert code == 2, (harm, code, log)
    assert not canary.exists(), harm
    assert "Traceback" not in log, (harm, log)
    lines = log.splitlines()
    # Either nothing was started at all, or a worker has tried, once.
    if len(lines) == 1:
        assert lines[0].startswith("tailrace: error: "), harm
    else:
        assert log.count(" started the pool ") == log.count(" model worker started ") == 1, (harm, log)
        reasons = [line for line in lines if " cannot serve the model " in line]
        assert len(reasons) == 1, (harm, log)
        assert " reason=" in reasons[0], harm


def check_refusals(row: Row, tmp_path: Path, names: Sequence[str]) -> None:
    row.fault = f"start with a model that has {', '.join(names)}"

    def refuse(numbered: tuple[int, str]) -> None:
        number, harm = numbered
        folder, canary = tmp_path / f"model-{number}", tmp_path / f"canary-{number}"
        shutil.copytree(model_directory(), folder)
        HARMS[harm](folder, canary)
        check_refusal(folder, harm, canary)

    with ThreadPoolExecutor(2) as several:
        for _ in several.map(refuse, enumerate(names)):
            row.requests += 1
            row.refused += 1
    row.hit = f"{row.refused} starts, each ended with code 2 and one line that says why; no code of the model's ran"
    row.notes.append("requests are starts of the service")


# Those that the checks before any process see, and one of each kind that only the model worker can see.
QUICK = [
    "half a weights file",
    "a bit of its header",
    "a header that promises too much",
    "a shard less",
    "a pickle",
    "attention from the hub",
    "auto_map with code",
    "a tokenizer of noise",
    "a template that reaches for the system",
]


def test_f16_damaged_and_hostile_models_are_refused_in_one_line(row: Row, tmp_path: Path):
    check_refusals(row, tmp_path, QUICK)


@pytest.mark.nightly
def test_f16_every_damaged_or_hostile_model_is_refused_in_one_line(row: Row, tmp_path: Path):
    check_refusals(row, tmp_path, list(HARMS))


@pytest.mark.parametrize("name", [name for name in HARMS if "template" in name])
def test_each_template_is_seen_through(name: str, tmp_path: Path):
    HARMS[name](tmp_path, tmp_path / "canary")
    assert fault_of((tmp_path / "chat_template.jinja").read_text(), {"bos_token": "<s>"})
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_a_template_that_does_its_work_has_no_fault(source: str):
    assert fault_of(source, {"bos_token": "<s>"}) is None
