"""How a request gets into the pool: its jobs, what it is known by, and whether another one has said the same before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flask import g

from app.api import life
from app.api.kept import Ticket, enter
from app.api.schemas import GenerationRequest
from app.api.service import deadline_of, now, service, tenant_salt
from app.pool_stream import Stream
from app.text.card import Model
from app.text.deadline import Deadline
from app.text.errors import RequestError
from app.text.generation import Generation
from app.text.prompts import Echo
from app.text.sampling import Plan, max_tokens_for
from workers.messages import GenerateJob, Grammar

# The pool answers at once, if the machine lets it; a grammar is looked at by a model worker.
REFUSAL_PATIENCE_S = 0.2
GRAMMAR_PATIENCE_S = 2.0
# The pool ends kept requests in time. Should it ever fail to, their readers wait so much longer and no more.
_BACKSTOP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Held:
    """What an answer is held to; ``param``: the field that asks for it, ``lines``: the fields of single lines of it."""

    grammar: Grammar | None = None
    param: str | None = None
    lines: Mapping[int, str] = field(default_factory=dict)


def start_generation(
    stream: Stream,
    request_id: str,
    body: GenerationRequest,
    model: Model,
    name: str,
    adapter: str,
    settled: Plan,
    prompts: Sequence[list[int]],
    param: str,
    echoes: Sequence[Echo] = (),
    held: Held | None = None,
    visible_tokens: frozenset[int] = frozenset(),
    thinking: bool | None = None,
) -> tuple[Generation, Ticket]:
    """Hand the request's jobs to the pool. Raises whatever keeps it from being admitted.

    A request that has been kept under the same key is joined instead: the ticket is then its ticket. ``name``: the
    model as the client calls it; ``held`` is the grammar of the answer, where it is not simply the request's own;
    ``visible_tokens`` as for `Generation`, ``thinking`` for the ticket.
    """
    logprobs, prompt_logprobs = wanted_scores(body, bool(echoes))
    deadline = deadline_of(body.timeout)
    if held is None:
        held = Held(*(body.grammar() or (None, None)))
    grammar = held.grammar
    jobs = []
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError("The prompt has no tokens.", param)
        jobs.append(
            GenerateJob(
                id=request_id if len(prompts) == 1 else f"{request_id}/{place}",
                prompt=prompt,
                max_tokens=max_tokens_for(settled, model, len(prompt), param),
                min_tokens=settled.min_tokens,
                n=settled.n,
                stop_token_ids=settled.stop_token_ids,
                sampling=settled.sampling,
                beams=settled.beams,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
                adapter=adapter,
                salt=tenant_salt(),
                start_within_s=deadline.start_within_s,
            )
        )
    ticket = Ticket(
        id=request_id,
        created=now(),
        name=name,
        jobs=jobs,
        seconds=deadline.seconds or 0.0,
        thinking=thinking,
        grammar_param=held.param,
        grammar_lines=dict(held.lines),
        warnings=list(g.get("warnings", ())),
    )
    ticket, joined = enter(stream, ticket)
    if joined:
        return continued(stream, ticket, body, model, echoes, visible_tokens), ticket
    generation = _generation(stream, ticket, body, model, deadline, echoes, visible_tokens)
    service().meter.watch(stream, generation)
    most = sum(len(job.prompt) + job.n * job.max_tokens for job in jobs)

    def used() -> int:
        # What goes on without its client is nobody's to count: then it is all that it may take.
        return most if stream.left_behind else _used(generation)

    service().reserve_tokens(stream, generation.usage.prompt_tokens, most, used)
    generation.submit(REFUSAL_PATIENCE_S if grammar is None else GRAMMAR_PATIENCE_S)
    life.accepted(request_id, stream, generation)
    return generation, ticket


def continued(
    stream: Stream,
    ticket: Ticket,
    body: GenerationRequest,
    model: Model,
    echoes: Sequence[Echo] = (),
    visible_tokens: frozenset[int] = frozenset(),
) -> Generation:
    """Return the generation of a kept request that ``stream`` reads from its first event on."""
    # The pool says where its time was over: what was said before must not be cut off by reading it later.
    deadline = Deadline(ticket.seconds or None, late_s=_BACKSTOP_S)
    return _generation(stream, ticket, body, model, deadline, echoes, visible_tokens)


def _generation(
    stream: Stream,
    ticket: Ticket,
    body: GenerationRequest,
    model: Model,
    deadline: Deadline,
    echoes: Sequence[Echo],
    visible_tokens: frozenset[int],
) -> Generation:
    return Generation(
        stream,
        model,
        ticket.jobs,
        body.stop,
        deadline,
        echoes=echoes,
        grammar_param=ticket.grammar_param,
        grammar_lines=ticket.grammar_lines,
        visible_tokens=visible_tokens,
    )


def _used(generation: Generation) -> int:
    """Tokens read and written; none if no model worker has begun."""
    usage = generation.usage
    return usage.prompt_tokens + usage.completion_tokens if generation.started else 0


def wanted_scores(body: GenerationRequest, echo: bool) -> tuple[int | None, int | None]:
    """Return the engine's ``logprobs`` and ``prompt_logprobs``: what the client asks for and what we need ourselves."""
    logprobs, prompt_logprobs = body.top_alternatives, body.prompt_logprobs
    if echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    if body.asked_max_tokens == 0 and prompt_logprobs is None:
        # An engine without anything to generate must have something to do.
        prompt_logprobs = 0
    if body.picks_best and logprobs is None:
        logprobs = 0
    return logprobs, prompt_logprobs
