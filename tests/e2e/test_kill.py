"""The real model's process is killed in mid-stream, and every client gets to the token what it would have got."""

import os
import signal
from typing import Any

import psutil

from config.settings import embedded_model
from tests.e2e.test_tools import NAMED, PARAMETERS, QUESTION, WEATHER
from tests.faults.rig import CHAT, Ask, Rig

STREAM: dict[str, Any] = {"model": "llama-3-chinese", "stream": True, "stream_options": {"include_usage": True}}
STORY = [{"role": "user", "content": "Tell me a story of a fox and a crow."}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}

ASKS = [
    Ask("story", CHAT, {**STREAM, "messages": STORY, "max_tokens": 100, "temperature": 0}),
    Ask("seeded", CHAT, {**STREAM, "messages": STORY, "max_tokens": 100, "seed": 1, "n": 2}),
    # Ends somewhere in the text; beginnings of it come again and again.
    Ask("stop", CHAT, {**STREAM, "messages": STORY, "max_tokens": 100, "seed": 2, "stop": [" the crow", ". The "]}),
    Ask("tools", CHAT, {**STREAM, "messages": QUESTION, "tools": [WEATHER], "tool_choice": NAMED, "seed": 3,
                        "max_tokens": 120}),
    Ask("schema", CHAT, {**STREAM, "messages": QUESTION, "response_format": SCHEMA, "seed": 4, "max_tokens": 120}),
    Ask("whole", CHAT, {"model": "llama-3-chinese", "messages": STORY, "max_tokens": 60, "seed": 5, "logprobs": True,
                        "top_logprobs": 2}),
]  # fmt: skip


def test_a_killed_model_is_a_pause_for_stories_stop_strings_and_calls() -> None:
    product = {"engine": "workers.engine.worker:run", "cache_dir": os.path.expanduser("~/.cache/tailrace")}
    with Rig(step_s=0, base_model=embedded_model(), cpu_threads=2, **product) as rig:
        references = rig.alone(ASKS)
        assert references[ASKS[2].key].choices[0].finish_reason == "stop"
        assert references[ASKS[3].key].choices[0].calls[0][0] == "get_weather"
        crowd = rig.start(ASKS)
        crowd.wait_events(60)
        (pid,) = rig.worker_pids()
        in_flight = rig.pool_status().workers[0].jobs
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGKILL)
        records = crowd.finish()
        assert not process.is_running()
        assert in_flight >= 4
        for record in records:
            assert record.fault(references[record.ask.key]) == "", record.ask.name
        (worker,) = rig.pool_status().workers
        assert (worker.pid == pid, worker.restarts) == (False, 1)
