"""One round of one server: start it, warm it up, put it through the scenarios, stop it."""

import http.client
import os
import socket
import time
from collections.abc import Callable, Sequence

from benchmarks import machine, scenarios
from benchmarks.processes import MemoryWatch, NotStarted, Process, running
from benchmarks.prompts import TokenCounter
from benchmarks.results import Load, Round, Start
from benchmarks.scenarios import Sizes, Target
from benchmarks.servers import Server

_START_LIMIT_S = 300.0
_SETTLE_LIMIT_S = 60.0
# At this many clients, or at the most there are, memory is watched.
_BUSY = 32

Say = Callable[[str], None]


def measure(server: Server, number: int, wanted: Sequence[str], sizes: Sizes, count: TokenCounter, say: Say) -> Round:
    """Return what was measured; if the server fails, what was measured until then and why it ended."""
    result = Round(number)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began, busy, own = time.perf_counter(), machine.busy_s(), time.process_time()
    command = [part.format(port=port) for part in server.command]
    try:
        with running(command, server.environment, port) as process:
            target = _start(server, process, number, count, result)
            assert result.start is not None
            say(f"first token {result.start.first_token_s:.1f} s after the command")
            result.settled = _warm_up(target, process)
            _measure(server, target, process, [each for each in server.scenarios if each in wanted], sizes, result, say)
            ours = process.cpu_s() + time.process_time() - own
            machine_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
            result.others_cpu = max(0.0, (machine.busy_s() - busy - ours) / machine_s)
    except (NotStarted, OSError, http.client.HTTPException, ValueError, LookupError) as error:
        result.failure = str(error) or type(error).__name__
        say(f"failed: {result.failure}")
    return result


def _start(server: Server, process: Process, number: int, count: TokenCounter, result: Round) -> Target:
    """Wait until the server has produced a token. Raises `NotStarted`."""
    ready_s = process.wait_ready(server.ready_path, _START_LIMIT_S)
    model = server.model or process.get("/v1/models")["data"][0]["id"]
    target = Target(("127.0.0.1", process.port), model, server.fields, count, seed=number)
    before = time.perf_counter()
    answer = target.one("Hello!", 1, _START_LIMIT_S)
    if answer.error:
        raise NotStarted(f"ready, but no token: {answer.error}")
    result.start = Start(ready_s, ready_s + time.perf_counter() - before)
    return target


def _warm_up(target: Target, process: Process) -> bool:
    """A few answers at once, then time for background work that follows a start. Returns False if that had no end."""
    scenarios.throughput(target, 4, Sizes(output_tokens=16))
    return process.wait_idle(_SETTLE_LIMIT_S)


def _measure(
    server: Server, target: Target, process: Process, wanted: Sequence[str], sizes: Sizes, result: Round, say: Say
) -> None:
    if "prompts" in wanted:
        result.prompts = prompts = scenarios.cold_and_repeated_prompts(target, sizes)
        say(f"first token of long prompts: new {_seconds(prompts.cold_s)}, again {_seconds(prompts.again_s)}")
    if "throughput" in wanted:
        levels = [each for each in server.concurrency if sizes.concurrency is None or each in sizes.concurrency]
        for clients in levels:
            with MemoryWatch(process) as watch:
                load = scenarios.throughput(target, clients, sizes)
            result.loads.append(load)
            if clients == _BUSY and watch.most.processes:
                result.memory_busy = watch.most
            say(f"{clients} clients: {_figures(load)}")
        result.memory_idle = process.memory()
        say(f"memory {result.memory_idle.pss_bytes / 1e9:.2f} GB")
    if "rate" in wanted:
        result.rate = scenarios.fixed_rate(target, sizes)
        say(f"{sizes.requests_per_s:g} requests/s: {_figures(result.rate)}")
    if "gaps" in wanted:
        result.disturbance = gaps = scenarios.disturbed_streams(target, sizes)
        say(
            f"token gaps of {gaps.streams} streams: alone {gaps.alone.p50 * 1000:.0f} ms (longest "
            f"{gaps.alone.longest * 1000:.0f}), with long prompts longest {gaps.with_prompts.longest * 1000:.0f} ms"
        )


def _seconds(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values) + " s"


def _figures(load: Load) -> str:
    told = f"{load.tokens_per_s:.1f} tokens/s, first token {load.first_token.p50 * 1000:.0f} ms"
    told += f", client CPU {load.client_cpu_s / load.seconds:.1%}" if load.seconds else ""
    told += f", {load.short} short answers" if load.short else ""
    told += f", {load.failed} failed ({load.error})" if load.failed else ""
    return told + (", cut by the time limit" if load.cut else "")
