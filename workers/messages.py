"""The typed messages that cross process borders, all of them in one place.

Three roads carry them, each in the frames of ``workers.wire``:

- HTTP worker -> pool: `ClientMessage` (over the pool's Unix socket)
- pool -> model worker: `Order` (over a multiprocessing queue)
- model worker -> pool -> HTTP worker: `Report` upwards; the pool passes `Event` s on inside `Events`

Only token ids cross, never text that a client would see. Decoding checks every field's type, so a damaged frame raises
`msgspec.DecodeError` and is treated as the death of its sender.
"""

from typing import Any, Literal

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of everything that is sent: immutable, tagged by its class name on the wire."""


# --- what a client asks for -------------------------------------------------------------------------------------------


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen from the logits; names and semantics as in ``transformers.generate``.

    The defaults switch every step off. ``temperature`` 0 is greedy decoding. ``presence_penalty`` and
    ``frequency_penalty`` count generated tokens only (OpenAI); ``repetition_penalty`` also counts the prompt
    (transformers). ``seed`` keys the random draws: the draw of output position t of choice c is a pure function of
    (seed, c, t).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class BeamParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Beam search as in ``transformers.generate(num_beams=..., do_sample=False)``."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


# White space in JSON that follows a grammar, as a regex: none, a space, or a line end with its indentation. Any more
# would let a small model, at every place where JSON allows it, go on with white space until its tokens run out.
JSON_WHITE_SPACE = r"\n {0,24}| "


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a text must match; ``source`` is the JSON schema (as JSON), the regex, or the Lark grammar."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str


class GenerateJob(Message, frozen=True):
    """One prompt to continue.

    ``id`` is unique for ever (the HTTP worker makes it). ``n`` choices are generated from the same prompt. A choice
    ends at the first token of ``stop_token_ids`` once it has ``min_tokens`` tokens (reason "stop"), or at
    ``max_tokens`` ("length"). ``emitted`` holds, per choice, tokens that were already delivered by an earlier run of
    the same job: they are forced, not sampled and not reported again, and generation goes on behind them.

    For the pool alone: ``start_within_s``, the longest wait in its queue (0: as long as it takes), and ``kept``, the id
    of the `Keep` that this job belongs to ("": its end is the end of its client's interest).
    """

    id: str
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    n: int = 1
    stop_token_ids: list[int] = []
    sampling: SamplingParams = SamplingParams()
    beams: BeamParams | None = None
    emitted: list[list[int]] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    adapter: str = ""
    salt: str = ""
    start_within_s: float = 0.0
    kept: str = ""


class EmbedJob(Message, frozen=True):
    """One token sequence to embed: the mean of the last hidden states, L2-normalised. ``salt``: whose it is;
    ``start_within_s`` as for `GenerateJob`.
    """

    id: str
    prompt: list[int]
    salt: str = ""
    start_within_s: float = 0.0


class Cancel(Message, frozen=True):
    """The client left, or has all it wants: stop choice ``choice`` of the job, or all of it (None).

    For the model worker alone: ``confirm`` asks for `Cancelled` as the last word about the job, known or not.
    """

    id: str
    choice: int | None = None
    confirm: bool = False


class Keep(Message, frozen=True):
    """The request ``id`` shall outlive its client: what its jobs produce is kept, and can be read again from the start.

    Sent before the request's ``jobs``, so many of them, which name it as ``kept``; answered with `Kept`. ``owner`` is
    the tenant; others cannot find it. ``key``, if not empty, is the owner's name for the request (Idempotency-Key): a
    second `Keep` with it founds nothing. ``digest`` says what was asked, ``note`` is whatever the text side needs to
    make its answer again: both mean nothing to the pool.

    After ``seconds`` (0: never) its time is over, whether somebody reads it or not: what has begun ends where it is.
    ``most``: so many that have not ended the owner may have (0: any number).
    """

    id: str
    owner: str
    jobs: int = 1
    seconds: float = 0.0
    most: int = 0
    key: str = ""
    digest: bytes = b""
    note: bytes = b""


class Attach(Message, frozen=True):
    """Read the kept request ``request``: everything from its first event on, then what comes. Answered with `Kept`.

    Its events come with ``alias`` in place of the request's id in theirs, so that several readers of one connection
    are told apart. `Cancel` of the alias ends the reading, and nothing else.
    """

    alias: str
    request: str
    owner: str


class StatusQuery(Message, frozen=True):
    """Ask the pool for a `PoolStatus` now."""


class LogAs(Message, frozen=True):
    """From now on log so; see `config.logs.LogSettings`. Taken by a model worker's first code, never by its engine."""

    level: str
    form: Literal["auto", "text", "json"]


Job = GenerateJob | EmbedJob
Order = GenerateJob | EmbedJob | Cancel
ClientMessage = GenerateJob | EmbedJob | Cancel | Keep | Attach | StatusQuery


# --- what comes back --------------------------------------------------------------------------------------------------


class Queued(Message, frozen=True):
    """The job waits in the pool's queue; ``position`` jobs are before it. Sent by the pool, when that has changed."""

    id: str
    position: int


class Kept(Message, frozen=True):
    """The pool's answer to `Keep` and `Attach`; ``id`` is theirs (the alias of an `Attach`).

    ``request`` is the kept request: the one just founded (the same id), the one that has the key already, or "" if
    there is none to be found, or no room to keep another. ``digest`` and ``note`` are those it was founded with; who
    has just founded it is told neither, and ``note`` is for who reads it (`Attach`).
    """

    id: str
    request: str
    digest: bytes = b""
    note: bytes = b""


class Started(Message, frozen=True):
    """The job left the queue and its prompt is being read; ``cached_tokens`` of it came from the prefix cache."""

    id: str
    cached_tokens: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, and the most likely alternatives (token id, log-probability), best first."""

    logprob: float
    top: list[tuple[int, float]] = []


class PromptLogprobs(Message, frozen=True):
    """The answer to ``prompt_logprobs``: one entry for each prompt token but the first, before the job's first
    output.
    """

    id: str
    logprobs: list[TokenLogprobs]


class Output(Message, frozen=True):
    """New tokens of one choice, all that one step produced.

    ``ids`` includes the stop token when one ended the choice; ``stop_token_id`` then names it (it is the last of
    ``ids`` and is no part of the text). ``finish_reason`` is set on a choice's last output; ``ids`` may then be empty.
    ``logprobs``, when asked for, has one entry for each of ``ids``. ``cut``, of a kept request alone: a reader had
    enough of the choice, or its time was over; who finds no reason in the text had no more time.
    """

    id: str
    choice: int = 0
    ids: list[int] = []
    finish_reason: Literal["stop", "length"] | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = []
    cut: bool = False


class Embedded(Message, frozen=True):
    """The answer to an `EmbedJob`: ``vector`` is little-endian float32, ``hidden_size`` numbers."""

    id: str
    vector: bytes


class Failed(Message, frozen=True):
    """The job ended without an answer.

    ``kind``: "invalid" the job cannot be served as asked (message is for the client); "overloaded" the queue is full;
    "unavailable" no model worker can take it now (loading, draining, dead); "internal" a fault of ours.
    ``retry_after`` in seconds. ``cause`` "grammar": the job's grammar cannot be used; ``line`` of its source (from 1; 0
    if that is not known) is to blame. "poison": it, or a job like it, has ended model workers. "queue_time": its
    ``start_within_s`` was over. "memory": the device has not enough of it.
    """

    id: str
    kind: Literal["invalid", "overloaded", "unavailable", "internal"]
    message: str
    retry_after: float | None = None
    cause: Literal["grammar", "poison", "queue_time", "memory"] | None = None
    line: int = 0


Event = Queued | Kept | Started | PromptLogprobs | Output | Embedded | Failed


class Loading(Message, frozen=True):
    """The model is being loaded: ``progress`` 0..1 and what is happening, for people."""

    progress: float
    stage: str


class Ready(Message, frozen=True):
    """A token can be produced now; ``card_path`` is the `ModelCard` as JSON in the runtime directory."""

    card_path: str


class Stats(Message, frozen=True):
    """Sign of life from the generation loop itself (never from a side thread), a few times a second while it works.

    ``steps`` counts forward passes since start; ``running`` and ``waiting`` count sequences; blocks are KV-cache
    blocks; ``memory_bytes`` is resident memory on the CPU, allocated memory on a GPU. Since start: ``prompt_tokens``
    read (``cached_tokens`` of them not computed, but found in the prefix cache), ``output_tokens`` chosen,
    ``preemptions`` of sequences for want of blocks, ``out_of_memory`` passes that the device had not enough memory for.
    """

    steps: int
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    memory_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    out_of_memory: int = 0


class Cancelled(Message, frozen=True):
    """The answer to a `Cancel` that asks for it: of the job, and of all that were cancelled before, nothing follows."""

    id: str


class Fatal(Message, frozen=True):
    """The model cannot be served as configured; starting again would not help. One clear line for the operator."""

    message: str


Report = Started | PromptLogprobs | Output | Embedded | Failed | Cancelled | Loading | Ready | Stats | Fatal


# --- what the pool tells an HTTP worker -------------------------------------------------------------------------------


class Events(Message, frozen=True):
    """Everything that became known in one turn of the pool's loop for this HTTP worker."""

    events: list[Event]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model worker as the pool sees it. ``idle_s``: seconds since its last progress; ``stats``: its own last word.

    ``cause``: how its last life ended, "" if it has had only one.
    """

    index: int
    device: str
    pid: int | None
    state: Literal["starting", "loading", "ready", "hung", "dead", "failed"]
    progress: float = 0.0
    stage: str = ""
    restarts: int = 0
    cause: str = ""
    jobs: int = 0
    idle_s: float = 0.0
    stats: Stats | None = None


class PoolCounters(msgspec.Struct, kw_only=True):
    """What the pool has counted since it started; jobs but for ``worker_deaths`` and ``hangs``.

    Not frozen, unlike all else here: the pool counts in one of its own, and sends copies.

    ``replayed`` were taken up again after a death, ``quarantined`` of them tried alone, ``poisoned`` given up as the
    cause of deaths and ``refused_poison`` refused for being like one of those; ``refused_full`` found no place in the
    queue, ``queue_timeouts`` got no worker in time. ``hangs`` are deaths by the watchdog.
    """

    admitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    replayed: int = 0
    quarantined: int = 0
    poisoned: int = 0
    refused_poison: int = 0
    refused_full: int = 0
    queue_timeouts: int = 0
    worker_deaths: int = 0
    hangs: int = 0


class PoolStatus(Message, frozen=True):
    """State of the pool: sent when an HTTP worker connects, when a worker's state changes, and on `StatusQuery`.

    ``queued`` and ``running`` count jobs, ``queued_tokens`` what those in the queue may take, ``kept`` the requests
    that outlive their clients; ``tokens_per_second`` is how fast the queue has been draining.
    """

    ready: bool
    draining: bool
    queued: int
    running: int
    card_path: str | None
    workers: list[WorkerStatus]
    queued_tokens: int = 0
    kept: int = 0
    tokens_per_second: float = 0.0
    counters: PoolCounters = msgspec.field(default_factory=PoolCounters)


PoolMessage = Events | PoolStatus


# --- what everybody must know of the model ----------------------------------------------------------------------------


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``app/`` needs to turn text into tokens and back, published by the model worker when it is ready.

    ``tokenizer_path`` is a ``tokenizer.json`` of the tokenizers library. ``chat_template`` is Jinja source, or None for
    a base model. ``stop_token_ids``: every id that ends a turn (model's and tokenizer's eos, and the token that the
    template puts behind an assistant message). ``special_tokens`` are the template's variables (``bos_token``...).
    ``sampling_defaults`` is the model's own generation_config, ``response_template`` what the tokenizer declares of the
    model's replies (transformers 5). Lengths are in tokens.
    """

    id: str
    names: list[str]
    tokenizer_path: str
    add_bos_token: bool
    chat_template: str | None
    special_tokens: dict[str, str]
    stop_token_ids: list[int]
    eos_token_id: int | None
    vocab_size: int
    hidden_size: int
    max_model_len: int
    created: int
    dtype: str
    device: str
    adapters: list[str] = []
    sampling_defaults: dict[str, float | int | bool] = {}
    response_template: dict[str, Any] | None = None
