"""From the sampling fields of a request, and the defaults for those it left out, to what the engine is told."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from app.text.card import Model
from app.text.errors import ContextLengthExceeded, RequestError
from workers.messages import BeamParams, SamplingParams

Defaults = Literal["demo", "model", "openai"]

DEMO_DEFAULTS: Mapping[str, float | int | bool] = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "max_new_tokens": 512,
    "do_sample": True,
    "num_beams": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a request says about choosing tokens; None is "not said"."""

    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    min_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    do_sample: bool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The engine's parameters for one request; ``max_tokens`` is settled for each prompt by `max_tokens_for`."""

    sampling: SamplingParams
    beams: BeamParams | None
    n: int
    stop_token_ids: list[int]
    asked_max_tokens: int | None
    max_tokens_field: str
    default_max_tokens: int | None
    min_tokens: int


def plan(wishes: Wishes, model: Model, defaults: Defaults) -> Plan:
    """Return the engine's parameters. Raises `RequestError` for values that contradict each other or the model."""
    base = _default_values(model, defaults)
    n = wishes.n or 1
    # A model's own default of several beams gives way to a request that wants to sample.
    num_beams = _integer(wishes.num_beams, 1 if wishes.do_sample else base.get("num_beams"), 1)
    if num_beams > 1 and wishes.do_sample:
        raise RequestError(
            "Beam search (num_beams > 1) is not combined with sampling: leave do_sample out or set it to false.",
            "do_sample",
        )
    if num_beams > 1 and n > num_beams:
        raise RequestError("With beam search, n cannot be greater than num_beams.", "n")
    for token_id in wishes.logit_bias:
        if not 0 <= token_id < model.card.vocab_size:
            raise RequestError(f"Token ids must be at least 0 and below {model.card.vocab_size}.", "logit_bias")
    if any(not 0 <= token_id < model.card.vocab_size for token_id in wishes.stop_token_ids):
        raise RequestError(f"Token ids must be at least 0 and below {model.card.vocab_size}.", "stop_token_ids")

    beams = None
    if num_beams > 1:
        beams = BeamParams(
            num_beams=num_beams,
            length_penalty=_number(wishes.length_penalty, base.get("length_penalty"), 1.0),
            early_stopping=wishes.early_stopping if wishes.early_stopping is not None else False,
        )
    own_stops = [] if wishes.ignore_eos else model.card.stop_token_ids
    return Plan(
        sampling=_sampling(wishes, base, greedy=beams is not None or _is_greedy(wishes, base)),
        beams=beams,
        n=n,
        stop_token_ids=sorted({*own_stops, *wishes.stop_token_ids}),
        asked_max_tokens=wishes.max_tokens,
        max_tokens_field=wishes.max_tokens_field,
        default_max_tokens=int(base["max_new_tokens"]) if base.get("max_new_tokens") else None,
        min_tokens=wishes.min_tokens or 0,
    )


def max_tokens_for(plan: Plan, model: Model, prompt_tokens: int, param: str) -> int:
    """Return how many tokens may follow a prompt of ``prompt_tokens``; none at all if that was asked for.

    Raises `ContextLengthExceeded` when the prompt leaves no room, or less than was asked for; ``param`` is the field
    that holds the prompt.
    """
    limit = model.card.max_model_len
    room = limit - prompt_tokens
    if room < (0 if plan.asked_max_tokens == 0 else 1):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, but the prompt has {prompt_tokens} tokens.", param
        )
    if plan.asked_max_tokens is not None:
        if plan.asked_max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens, but {prompt_tokens + plan.asked_max_tokens} "
                f"were requested ({prompt_tokens} in the prompt, {plan.asked_max_tokens} for the answer).",
                plan.max_tokens_field,
            )
        chosen = plan.asked_max_tokens
    else:
        chosen = min(plan.default_max_tokens or room, room)
    if plan.min_tokens > chosen:
        raise RequestError(f"min_tokens is more than the {chosen} tokens that the answer may have.", "min_tokens")
    return chosen


def _default_values(model: Model, defaults: Defaults) -> Mapping[str, float | int | bool]:
    match defaults:
        case "demo":
            return DEMO_DEFAULTS
        case "model":
            return model.card.sampling_defaults
        case "openai":
            return {}


def _is_greedy(wishes: Wishes, base: Mapping[str, float | int | bool]) -> bool:
    if wishes.do_sample is not None:
        return not wishes.do_sample
    if wishes.temperature is not None or wishes.top_p is not None or wishes.top_k is not None:
        # Whoever sets how to sample wants to sample, whatever the model's own default is.
        return False
    return base.get("do_sample") is False


def _sampling(wishes: Wishes, base: Mapping[str, float | int | bool], greedy: bool) -> SamplingParams:
    temperature = 0.0 if greedy else _number(wishes.temperature, base.get("temperature"), 1.0)
    draws = temperature > 0
    return SamplingParams(
        temperature=temperature,
        top_k=_integer(wishes.top_k, base.get("top_k"), 0) if draws else 0,
        top_p=_number(wishes.top_p, base.get("top_p"), 1.0) if draws else 1.0,
        min_p=_number(wishes.min_p, base.get("min_p"), 0.0) if draws else 0.0,
        typical_p=_number(wishes.typical_p, base.get("typical_p"), 1.0) if draws else 1.0,
        repetition_penalty=_number(wishes.repetition_penalty, base.get("repetition_penalty"), 1.0),
        presence_penalty=wishes.presence_penalty or 0.0,
        frequency_penalty=wishes.frequency_penalty or 0.0,
        logit_bias=dict(wishes.logit_bias),
        seed=wishes.seed if wishes.seed is not None else secrets.randbits(62),
    )


def _number(wish: float | None, default: float | int | bool | None, neutral: float) -> float:
    return float(wish if wish is not None else default if default is not None else neutral)


def _integer(wish: int | None, default: float | int | bool | None, neutral: int) -> int:
    return int(wish if wish is not None else default if default is not None else neutral)
