"""The typed messages that cross process borders, all of them in one place.

Three roads carry them, each in the frames of ``workers.wire``:

- HTTP worker -> pool: `ClientMessage` (over the pool's Unix socket)
- pool -> model worker: `Order` (over a multiprocessing queue)
- model worker -> pool -> HTTP worker: `Report` upwards; the pool passes `Event` s on inside `Events`

Only token ids cross, never text that a client would see. Decoding checks every field's type, so a damaged frame raises
`msgspec.DecodeError` and is treated as the death of its sender.
"""

from typing import Literal

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


class EmbedJob(Message, frozen=True):
    """One token sequence to embed: the mean of the last hidden states, L2-normalised."""

    id: str
    prompt: list[int]


class Cancel(Message, frozen=True):
    """The client left, or has all it wants: stop choice ``choice`` of the job, or all of it (None)."""

    id: str
    choice: int | None = None


class StatusQuery(Message, frozen=True):
    """Ask the pool for a `PoolStatus` now."""


Job = GenerateJob | EmbedJob
Order = GenerateJob | EmbedJob | Cancel
ClientMessage = GenerateJob | EmbedJob | Cancel | StatusQuery


# --- what a model worker answers --------------------------------------------------------------------------------------


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
    ``logprobs``, when asked for, has one entry for each of ``ids``.
    """

    id: str
    choice: int = 0
    ids: list[int] = []
    finish_reason: Literal["stop", "length"] | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = []


class Embedded(Message, frozen=True):
    """The answer to an `EmbedJob`: ``vector`` is little-endian float32, ``hidden_size`` numbers."""

    id: str
    vector: bytes


class Failed(Message, frozen=True):
    """The job ended without an answer.

    ``kind``: "invalid" the job cannot be served as asked (message is for the client); "overloaded" the queue is full;
    "unavailable" no model worker can take it now (loading, draining, dead); "internal" a fault of ours.
    ``retry_after`` in seconds.
    """

    id: str
    kind: Literal["invalid", "overloaded", "unavailable", "internal"]
    message: str
    retry_after: float | None = None


Event = Started | PromptLogprobs | Output | Embedded | Failed


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
    blocks; ``memory_bytes`` is resident memory on the CPU, allocated memory on a GPU.
    """

    steps: int
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    memory_bytes: int = 0


class Fatal(Message, frozen=True):
    """The model cannot be served as configured; starting again would not help. One clear line for the operator."""

    message: str


Report = Started | PromptLogprobs | Output | Embedded | Failed | Loading | Ready | Stats | Fatal


# --- what the pool tells an HTTP worker -------------------------------------------------------------------------------


class Events(Message, frozen=True):
    """Everything that became known in one turn of the pool's loop for this HTTP worker."""

    events: list[Event]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model worker as the pool sees it. ``idle_s``: seconds since its loop last gave a sign of life."""

    index: int
    device: str
    pid: int | None
    state: Literal["starting", "loading", "ready", "hung", "dead", "failed"]
    progress: float = 0.0
    stage: str = ""
    restarts: int = 0
    jobs: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    memory_bytes: int = 0
    idle_s: float = 0.0


class PoolStatus(Message, frozen=True):
    """State of the pool: sent when an HTTP worker connects, when a worker's state changes, and on `StatusQuery`."""

    ready: bool
    draining: bool
    queued: int
    running: int
    card_path: str | None
    workers: list[WorkerStatus]


PoolMessage = Events | PoolStatus


# --- what everybody must know of the model ----------------------------------------------------------------------------


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``app/`` needs to turn text into tokens and back, published by the model worker when it is ready.

    ``tokenizer_path`` is a ``tokenizer.json`` of the tokenizers library. ``chat_template`` is Jinja source, or None for
    a base model. ``stop_token_ids``: every id that ends a turn (model's and tokenizer's eos, and the token that the
    template puts behind an assistant message). ``special_tokens`` are the template's variables (``bos_token``...).
    ``sampling_defaults`` is the model's own generation_config. Lengths are in tokens.
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
