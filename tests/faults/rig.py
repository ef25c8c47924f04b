"""A whole real service that is quick to start, many mixed requests to it at once, and a judge of what they got.

The service is the real one (gunicorn, HTTP application, pool, engine) with a tiny random Llama in float32, so that an
undisturbed run of the same request says to the token what must come::

    with Rig(step_s=0.004) as rig:                      # Rig(max_queue=4, engine="my.module:run", workers=2)
        asks = mixed(32)                                # or of your own: Ask("name", CHAT, {"messages": ...})
        references = rig.alone(asks)                    # the same requests one by one, undisturbed
        crowd = rig.start(asks)                         # all at once, a thread for each
        crowd.wait_events(200)                          # in mid-stream
        os.kill(rig.worker_pids()[0], signal.SIGKILL)
        records = crowd.finish()
        tally(row, records, references)                 # into a row of the faults' table

Each `Record` is what one client saw: text, reasoning, calls, log-probabilities and finish_reason of each choice, the
ids, usage, error event, whether [DONE] came, how the connection ended, the longest gap between two data events.
`Record.verdict` says "complete" (whole, and equal to the reference), "error" (an error that says so), "refused" (429 or
503 before any of the answer) or "lost": anything else.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.app.tiny import tokenizer
from tests.app.tool_models import THINKING
from tests.e2e.server import Server, wait_until
from tests.faults.table import Row
from tests.workers.engine.tiny import CACHE
from tests.workers.pool.harness import pool_status
from workers.messages import PoolStatus

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
CONTEXT = 2048
PATIENCE_S = 180.0

Verdict = Literal["complete", "error", "refused", "lost"]

_COMMAND = ("-m", "gunicorn", "-c", "tests/faults/gunicorn_pool.conf.py", "app:create_app()")


@cache
def model_directory() -> Path:
    """Write the tiny model, once for a test run; return where."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="tailrace-rig-model-")) / "tiny"
    backend = tokenizer()
    end = backend.token_to_id("<|im_end|>")
    words = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **words)
    wrapped.chat_template = THINKING
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Wide random weights: narrow ones make all tokens about equally likely.
        initializer_range=0.3,
        eos_token_id=end,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    return folder


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request: ``name`` says for people what is special about it; whether it streams stands in the ``body``."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def key(self) -> str:
        """The same for the same request."""
        return self.path + json.dumps(self.body, sort_keys=True)


_DAY = {"type": "integer", "minimum": 0, "maximum": 999}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Za-z ]{10,20}$"},
        "days": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
_DRAWN = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.0}
_ENDLESS = {"ignore_eos": True}
_TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}

# The template knows of reasoning, so before a grammar's text may stand any thoughts, which this model never ends.
# name -> path and the fields that make the kind. Each is asked streaming and, but for a few, not streaming, too.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, {**_GREEDY, **_ENDLESS}),
    "seeded": (CHAT, {**_DRAWN, **_ENDLESS}),
    "penalised": (CHAT, {**_DRAWN, **_ENDLESS, "repetition_penalty": 1.2, "presence_penalty": 0.5,
                         "frequency_penalty": 0.3, "logit_bias": {"50": 2}}),
    "n=4": (CHAT, {**_DRAWN, **_ENDLESS, "n": 4}),
    "logprobs": (CHAT, {**_DRAWN, **_ENDLESS, "logprobs": True, "top_logprobs": 3}),
    # The beginnings of these strings come often, the strings themselves sooner or later.
    "stop": (CHAT, {**_DRAWN, **_ENDLESS, "stop": ["al", "绍绍", "is", "apa"], "min_tokens": 20}),
    "regex": (CHAT, {**_DRAWN, "guided_regex": "([a-z]{3,9} ){4,6}end"}),
    "schema": (CHAT, {**_DRAWN, "response_format": _JSON}),
    "tools": (CHAT, {**_DRAWN, "tools": [_TOOL], "tool_choice": _NAMED, "n": 2, "max_tokens": 160}),
    "beams": (COMPLETIONS, {"num_beams": 3, "n": 2, "do_sample": False, "repetition_penalty": 1.0}),
    "echo": (COMPLETIONS, {**_DRAWN, **_ENDLESS, "echo": True, "logprobs": 2}),
    "prompts": (COMPLETIONS, {**_DRAWN, **_ENDLESS, "prompt": ["The quick brown", "How do I make"]}),
    "embedding": (EMBEDDINGS, {}),
}  # fmt: skip


def ask_of(kind: str, number: int, *, stream: bool, max_tokens: int = 80) -> Ask:
    """Return a request of ``kind``, different for each ``number`` and the same for the same arguments."""
    path, fields = KINDS[kind]
    text = f"Tell me of the website number {number}. " + "The capital of France is Paris. " * (number % 7)
    if path == EMBEDDINGS:
        return Ask(kind, path, {"model": "tiny", "input": [text, text * 3]})
    body: dict[str, Any] = {"model": "tiny", "max_tokens": max_tokens, "seed": number, **fields}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body.setdefault("prompt", text)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Ask(f"{kind}{'' if stream else ', whole'}", path, body)


def mixed(count: int, *, max_tokens: int = 80, first: int = 0) -> list[Ask]:
    """Return ``count`` requests of all kinds, two of three streaming, each with a prompt and a seed of its own."""
    kinds = list(KINDS)
    return [
        ask_of(kinds[n % len(kinds)], first + n, stream=bool((n // len(kinds) + n) % 3), max_tokens=max_tokens)
        for n in range(count)
    ]


# --- what comes back --------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One choice as a client puts it together. ``logprobs``: (token, log-probability), ``calls``: name, arguments."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    logprobs: list[tuple[str, float | None]] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, told: dict[str, Any]) -> None:
        """Add what a chunk, or the whole answer, tells of this choice."""
        said = told.get("delta") or told.get("message") or {}
        self.text += (said.get("content") or "") + (told.get("text") or "")
        self.reasoning += said.get("reasoning_content") or ""
        for place, call in enumerate(said.get("tool_calls") or []):
            name_and_arguments = self.calls.setdefault(call.get("index", place), ["", ""])
            name_and_arguments[0] += call["function"].get("name") or ""
            name_and_arguments[1] += call["function"].get("arguments") or ""
        scores = told.get("logprobs") or {}
        rows = [(row["token"], row["logprob"]) for row in scores.get("content") or []]
        rows += list(zip(scores.get("tokens", []), scores.get("token_logprobs", []), strict=True))
        self.logprobs += [(token, None if value is None else round(value, 3)) for token, value in rows]
        self.finish_reason = told.get("finish_reason") or self.finish_reason


@dataclass
class Record:
    """All that one client saw of one request. Times are monotonic, in seconds; ``status`` 0: no answer at all."""

    ask: Ask
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    choices: dict[int, Choice] = field(default_factory=dict)
    vectors: list[list[float]] = field(default_factory=list)
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    cut: str = ""
    events: int = 0
    comments: list[str] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    longest_gap_s: float = 0.0

    def verdict(self, reference: "Record | None" = None) -> Verdict:
        """Say what became of the request; without ``reference`` a whole answer is complete, whatever its text."""
        if self.status in (429, 503):
            return "refused"
        if self.error is not None and not self.done:
            return "error"
        return "lost" if self.fault(reference) else "complete"

    def fault(self, reference: "Record | None" = None) -> str:
        """Return what is wrong with an answer that should be complete, "" for nothing."""
        if self.status != 200 or self.cut:
            return f"status {self.status}, {self.cut or 'not cut'}, {self.error}"
        if self.ask.streams and not self.done:
            return "the stream ended without [DONE]"
        if self.ask.path != EMBEDDINGS and not all(c.finish_reason for c in self.choices.values()):
            return "a choice without finish_reason"
        if not self.choices and not self.vectors:
            return "nothing in it"
        if self.ask.path != EMBEDDINGS and len(self.ids) != 1:
            return f"{len(self.ids)} ids: {self.ids}"
        if reference is None:
            return ""
        for name in ("choices", "usage", "vectors"):
            got, wanted = getattr(self, name), getattr(reference, name)
            if got != wanted:
                return f"{name} differ: {got} instead of {wanted}"
        return ""

    # --- reading

    def read(self, response: httpx.Response) -> None:
        """Take the whole answer as it comes."""
        self.status = response.status_code
        self.headers = dict(response.headers)
        if "text/event-stream" not in response.headers.get("content-type", ""):
            self._take(json.loads(response.read()))
            return
        last = self.began
        for line in response.iter_lines():
            if line.startswith(":"):
                self.comments.append(line)
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self._take(json.loads(line[6:]))
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - last)
                last = now

    def _take(self, body: dict[str, Any]) -> None:
        self.events += 1
        if body.get("error"):
            self.error = body["error"]
            return
        if "id" in body:
            self.ids.add(body["id"])
        for told in body.get("choices", []):
            self.choices.setdefault(told["index"], Choice()).take(told)
        for vector in body.get("data", []):
            self.vectors.append([round(x, 4) for x in vector["embedding"]])
        if body.get("usage"):
            self.usage = {k: v for k, v in body["usage"].items() if isinstance(v, int)}


def tally(row: Row, records: Sequence[Record], references: dict[str, Record]) -> list[Record]:
    """Add the records to ``row`` of the faults' table; return those that ended in an error. Says what is wrong with
    the first one that is lost."""
    failed = []
    for record in records:
        reference = references.get(record.ask.key)
        verdict = record.verdict(reference)
        row.requests += 1
        row.complete += verdict == "complete"
        row.errors += verdict == "error"
        row.refused += verdict == "refused"
        row.lost += verdict == "lost"
        row.longest_gap_s = max(row.longest_gap_s, record.longest_gap_s)
        if verdict == "error":
            failed.append(record)
        if verdict == "lost":
            row.notes.append(f"{record.ask.name}: {record.fault(reference)}")
    assert not row.lost, row.notes[0]
    return failed


class Crowd:
    """Requests that run at once."""

    def __init__(self, rig: "Rig", asks: Sequence[Ask]) -> None:
        self.records = [Record(ask) for ask in asks]
        self._threads = [threading.Thread(target=rig.fill, args=(record,), daemon=True) for record in self.records]
        for thread in self._threads:
            thread.start()

    @property
    def events(self) -> int:
        """Data events that have come to all clients together."""
        return sum(record.events for record in self.records)

    @property
    def finished(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def wait_events(self, count: int, seconds: float = PATIENCE_S) -> None:
        """Return when so many data events have come; fail if all requests have ended before."""
        wait_until(lambda: self.events >= count or self.finished, f"{count} events", seconds)
        assert not self.finished, f"all requests ended with {self.events} events"

    def finish(self, seconds: float = PATIENCE_S) -> list[Record]:
        """Wait for the end of all of them; return what they saw, in the order of the asks."""
        deadline = time.monotonic() + seconds
        for thread, record in zip(self._threads, self.records, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"{record.ask.name} has had no end after {seconds:.0f} s: {record}"
        return self.records


class Rig(Server):
    """The service. ``step_s`` is added to each forward pass, so that there is a middle of a stream to disturb.

    ``workers`` model workers share the CPU. ``engine`` ("module:function") replaces `tests.faults.rig_engine`, whose
    faults are asked for by seeds. ``settings`` are those of `config.settings`.
    """

    def __init__(self, *, step_s: float = 0.004, workers: int = 1, engine: str = "", **settings: object) -> None:
        defaults: dict[str, object] = {
            "base_model": model_directory(),
            "dtype": "float32",
            "cache_dir": CACHE,
            "max_batch": 64,
            "cpu_threads": 1,
            "request_timeout_s": PATIENCE_S,
        }
        environment = {f"TAILRACE_{name.upper()}": str(value) for name, value in (defaults | settings).items()}
        environment |= {"RIG_STEP_S": str(step_s), "POOL_WORKERS": str(workers)}
        environment["POOL_ENGINE"] = engine or "tests.faults.rig_engine:run"
        super().__init__(command=[sys.executable, *_COMMAND], **environment)
        self.workers = workers
        self.runtime_dir = self._home / "run"
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._clients = httpx.Client(base_url=self.url, timeout=PATIENCE_S, limits=unlimited, verify=False)

    def __enter__(self) -> "Rig":
        try:
            self.wait_ready()
            self.wait_workers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        self._clients.close()
        return super().stop()

    # --- the processes

    def pool_status(self) -> PoolStatus:
        """Ask the pool itself. Raises OSError or EOFError when there is none."""
        return pool_status(self.runtime_dir / "pool.sock")

    def worker_pids(self) -> list[int]:
        """The pids of the model workers that live."""
        return [worker.pid for worker in self.pool_status().workers if worker.pid is not None]

    def wait_workers(self, seconds: float = PATIENCE_S) -> None:
        """Return when all model workers are ready."""

        def ready() -> bool:
            try:
                return all(worker.state == "ready" for worker in self.pool_status().workers)
            except (OSError, EOFError):
                return False

        wait_until(ready, "all model workers", seconds)

    # --- the clients

    def ask(self, ask: Ask) -> Record:
        """Ask, and wait for the whole answer."""
        record = Record(ask)
        self.fill(record)
        return record

    def fill(self, record: Record) -> None:
        """Ask what ``record`` is for."""
        record.began = time.monotonic()
        try:
            with self._clients.stream("POST", record.ask.path, json=record.ask.body) as response:
                record.read(response)
        except httpx.HTTPError as error:
            record.cut = f"{type(error).__name__}: {error}"
        finally:
            record.ended = time.monotonic()

    def start(self, asks: Sequence[Ask]) -> Crowd:
        """Ask all of it at once."""
        return Crowd(self, asks)

    def alone(self, asks: Sequence[Ask]) -> dict[str, Record]:
        """Ask one by one; return the records by `Ask.key`. Fails unless each answer is whole."""
        references = {}
        for ask in asks:
            record = self.ask(ask)
            assert not record.fault(), f"{ask.name}: {record.fault()}"
            references[ask.key] = record
        return references
