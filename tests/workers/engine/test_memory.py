"""Out of memory is nobody's end but that of a request that cannot run even alone; the others' tokens stay the same."""

import queue
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.workers.engine.tiny import BYTE_VOCAB, EOS, byte_tokenizer, drain, job, prompts, tiny_engine, tiny_model
from workers.engine import ceiling, sampler
from workers.engine import engine as engine_module
from workers.engine.ceiling import Ceiling
from workers.engine.engine import Engine
from workers.engine.errors import GrammarError, OutOfMemory, StickyDeviceError
from workers.engine.flat_batch import Computed, FlatBatch
from workers.engine.grammar import GrammarCompiler
from workers.engine.recovery import is_out_of_memory, tamed
from workers.engine.worker import ServingLoop
from workers.messages import (
    BeamParams,
    Embedded,
    EmbedJob,
    Failed,
    GenerateJob,
    Grammar,
    Output,
    PromptLogprobs,
    Report,
    SamplingParams,
    Stats,
)

WARM = SamplingParams(temperature=0.9, top_p=0.9, seed=3)
PENALISED = SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.2, seed=4)
REGEX = Grammar(kind="regex", source="([a-z]{2,5} ){4,9}end")


def real_failure() -> None:
    """What torch itself says when the machine has not so much."""
    torch.empty(10**15)


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


NO_MEMORY: dict[str, Callable[[], None]] = {
    "device": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "pinned": raising(torch.AcceleratorError("CUDA error: out of memory")),
    "library": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "kernels": raising(MemoryError("no memory for a batch of this size")),
    "machine": real_failure,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), BYTE_VOCAB, [EOS])


def new_engine(**config: Any) -> Engine:
    return tiny_engine(tiny_model(vocab_size=BYTE_VOCAB), **config)


def orders(asked: int = 0) -> list[GenerateJob | EmbedJob]:
    """Requests of all kinds."""
    p = prompts(10, 20, 60, seed=5 + asked)
    greedy = SamplingParams(temperature=0)
    return [
        job("greedy", p[0], 30, sampling=greedy),
        job("seeded", p[1], 30, sampling=WARM, n=3),
        job("penalised", p[2], 30, sampling=PENALISED, min_tokens=10),
        job("beams", p[3], 16, beams=BeamParams(num_beams=3), n=2),
        job("scored beams", p[4], 12, beams=BeamParams(num_beams=2), logprobs=1),
        job("regex", p[5], 40, sampling=WARM, grammar=REGEX, n=2),
        job("logprobs", p[6], 20, sampling=WARM, logprobs=3),
        job("prompt", p[7], 10, sampling=greedy, prompt_logprobs=2),
        EmbedJob(id="embedding", prompt=p[8]),
        job("biased", p[9], 30, sampling=SamplingParams(temperature=0.7, top_k=9, logit_bias={50: 3.0}, seed=5)),
    ]


def answers(engine: Engine, compiler: GrammarCompiler, asked: list[GenerateJob | EmbedJob]) -> dict[Any, Any]:
    """Run the orders to their ends; return, for each choice, all that was reported of it."""
    reports: list[Report] = []
    for order in asked:
        matcher = compiler.compile(order.grammar) if isinstance(order, GenerateJob) and order.grammar else None
        reports += engine.submit(order, matcher)
    reports += drain(engine)
    found: dict[Any, Any] = {}
    for report in reports:
        if isinstance(report, Output):
            ids, scores, ends = found.setdefault((report.id, report.choice), ([], [], []))
            ids += report.ids
            scores += [(round(s.logprob, 3), [i for i, _ in s.top]) for s in report.logprobs]
            ends += [report.finish_reason] if report.finish_reason else []
        elif isinstance(report, PromptLogprobs):
            assert (report.id, "prompt") not in found
            found[report.id, "prompt"] = [round(s.logprob, 3) for s in report.logprobs]
        elif isinstance(report, Embedded):
            numbers = struct.unpack(f"<{len(report.vector) // 4}f", report.vector)
            found[report.id] = [round(x, 4) for x in numbers]
        elif isinstance(report, Failed):
            found[report.id] = report
    assert engine.scheduler.pool.used == 0
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    return found


@pytest.fixture(scope="module")
def undisturbed(compiler: GrammarCompiler) -> dict[Any, Any]:
    found = answers(new_engine(), compiler, orders())
    assert not [report for report in found.values() if isinstance(report, Failed)]
    assert len(found) == 15
    return found


def failing(engine: Engine, when: Callable[[FlatBatch], bool], fail: Callable[[], None]) -> list[int]:
    """Let passes of ``engine`` fail; return a list that holds the tokens of each pass that did."""
    compute, hits = engine.model_step.compute, []

    def short(batch: FlatBatch) -> Computed:
        if when(batch):
            hits.append(batch.tokens)
            fail()
        return compute(batch)

    engine.model_step.compute = short  # type: ignore[method-assign]
    return hits


def every(k: int) -> Callable[..., bool]:
    """Each k-th call."""
    calls = 0

    def due(*_: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls % k == 0

    return due


LIMITS: dict[str, Callable[[], Callable[[FlatBatch], bool]]] = {
    "more than 40 tokens": lambda: lambda batch: batch.tokens > 40,
    "more than 5 tokens": lambda: lambda batch: batch.tokens > 5,
    "more than one token": lambda: lambda batch: batch.tokens > 1,
    "more than 3 rows": lambda: lambda batch: len(batch.items) > 3,
    "each second pass": lambda: every(2),
    "each seventh pass": lambda: every(7),
}


@pytest.mark.parametrize(
    ("limit", "kernels"),
    [*((limit, "compiled") for limit in LIMITS), ("more than 40 tokens", "torch")],
)
def test_passes_without_memory_change_no_token(
    compiler: GrammarCompiler, undisturbed: dict[Any, Any], limit: str, kernels: str
) -> None:
    engine = new_engine(cpu_kernels=kernels)
    hits = failing(engine, LIMITS[limit](), NO_MEMORY["device"])
    assert answers(engine, compiler, orders()) == undisturbed
    assert engine.stats().out_of_memory == len(hits) > 0


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_every_way_of_having_no_memory_is_known(
    compiler: GrammarCompiler, undisturbed: dict[Any, Any], kind: str
) -> None:
    engine = new_engine()
    hits = failing(engine, lambda batch: batch.tokens > 20, NO_MEMORY[kind])
    assert answers(engine, compiler, orders()) == undisturbed
    assert engine.stats().out_of_memory == len(hits) > 0


@pytest.mark.parametrize("culprit", [order.id for order in orders()])
def test_only_a_request_that_cannot_run_alone_fails(
    compiler: GrammarCompiler, undisturbed: dict[Any, Any], culprit: str
) -> None:
    engine = new_engine()
    failing(engine, lambda batch: any(i.sequence.job.id == culprit for i in batch.items), NO_MEMORY["device"])
    found = answers(engine, compiler, orders())
    failed = found.pop(culprit)
    assert (failed.kind, failed.cause) == ("unavailable", "memory")
    assert failed.retry_after > 0
    assert found == {key: value for key, value in undisturbed.items() if culprit not in (key, key[0])}
    # It was its fault alone: nobody else has to make do with less.
    assert not engine.scheduler.ceiling.lowered


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("where", ["logits", "draw", "mask", "scores"])
def test_the_memory_may_run_out_wherever_tokens_are_chosen(
    compiler: GrammarCompiler, undisturbed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, where: str, k: int
) -> None:
    engine, due, hits = new_engine(), every(k), []

    def spoiling(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if due():
                hits.append(1)
                if where in ("logits", "draw"):
                    # Half of the work is done, and that shall not be seen afterwards.
                    arguments[0].fill_(1.0)
                raise MemoryError(where)
            return real(*arguments, **options)

        return call

    if where == "logits":
        monkeypatch.setattr(sampler, "process_logits", spoiling(sampler.process_logits))
    elif where == "draw":
        engine.model_step.sample = spoiling(engine.model_step.sample)  # type: ignore[method-assign]
    elif where == "mask":
        monkeypatch.setattr(sampler, "allowed_tokens", spoiling(sampler.allowed_tokens))
    else:
        monkeypatch.setattr(engine_module, "scores_of_chosen", spoiling(engine_module.scores_of_chosen))
        monkeypatch.setattr(engine_module, "token_logprobs", spoiling(engine_module.token_logprobs))
    found = answers(engine, compiler, orders())
    if where == "scores":
        # A beam's scores are made when the search has gone on already: it cannot go back by one token.
        assert {key for key, value in found.items() if isinstance(value, Failed)} <= {"scored beams"}
        found = {key: value for key, value in found.items() if "scored beams" not in (key, key[0])}
        undisturbed = {key: value for key, value in undisturbed.items() if key[0] != "scored beams"}
    assert found == undisturbed
    assert hits
    assert engine.stats().out_of_memory >= len(hits) - (where == "scores")


@pytest.mark.parametrize("step", ["_embed", "_score_prompt"])
def test_the_memory_may_run_out_for_embeddings_and_scores_of_prompts(
    compiler: GrammarCompiler, undisturbed: dict[Any, Any], step: str
) -> None:
    engine, hits = new_engine(), []
    real = getattr(engine, step)

    def short(item: Any, numbers: torch.Tensor) -> Any:
        if len(numbers) > 3:
            hits.append(len(numbers))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(item, numbers)

    setattr(engine, step, short)
    assert answers(engine, compiler, orders()) == undisturbed
    assert hits


def test_passes_stay_small_for_a_while_and_grow_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "QUIET_PASSES", 5)
    engine = new_engine(max_batch=16)
    endless = SamplingParams(temperature=0, logit_bias={7: -100.0})
    for n, prompt in enumerate(prompts(16, 4, 9)):
        engine.submit(job(str(n), prompt, 400, sampling=endless))
    for _ in range(20):
        engine.step()
    assert len(engine.scheduler.running) == 16
    short = True
    failing(engine, lambda batch: short and len(batch.items) > 4, NO_MEMORY["device"])
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) <= 8
    assert engine.stats().waiting >= 8
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) <= 4
    short = False
    for _ in range(200):
        engine.step()
    assert len(engine.scheduler.running) == 16
    assert not engine.scheduler.ceiling.lowered
    stats = engine.stats()
    assert stats.preemptions >= 12
    assert stats.out_of_memory > 0


def test_prompts_give_way_before_sequences_do() -> None:
    limit = Ceiling(32, 512)
    limit.lower(20, 100)
    assert (limit.rows, limit.tokens) == (32, 50)
    limit.lower(20, 0)
    assert (limit.rows, limit.tokens) == (10, 50)
    for _ in range(10):
        limit.lower(1, 0)
        limit.lower(1, limit.tokens)
    assert (limit.rows, limit.tokens) == (1, 1)
    while limit.lowered:
        limit.note_quiet_pass()
    assert (limit.rows, limit.tokens) == (32, 512)


def test_more_choices_than_may_run_at_once_take_turns(compiler: GrammarCompiler) -> None:
    wanted = [
        job("many", [40, 41, 42], 30, sampling=WARM, n=8),
        job("beams", [43, 44], 8, beams=BeamParams(num_beams=6)),
    ]
    expected = answers(new_engine(), compiler, list(wanted))
    engine = new_engine()
    failing(engine, lambda batch: len(batch.items) > 2, NO_MEMORY["device"])
    assert answers(engine, compiler, list(wanted)) == expected


def test_a_lost_device_ends_the_process_also_when_memory_was_short_before() -> None:
    engine = new_engine()
    calls = iter([NO_MEMORY["device"], raising(RuntimeError("CUDA error: an illegal memory access was encountered"))])
    failing(engine, lambda _: True, lambda: next(calls)())
    engine.submit(job("a", [40, 41], 9))
    engine.submit(job("b", [40, 41], 9))
    with pytest.raises(StickyDeviceError):
        engine.step()


def test_what_is_said_of_memory_and_devices_is_told_apart() -> None:
    with pytest.raises(StickyDeviceError):
        tamed(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(2, "No such file"))
    assert not is_out_of_memory(ValueError("out of memory"))
    # Words of a client's grammar in an error are nothing that the device says.
    error = GrammarError('"CUDA error" is out of memory')
    assert tamed(error) is error
    assert not is_out_of_memory(error)


def test_a_failure_for_want_of_memory_keeps_no_tensor_alive() -> None:
    def use() -> None:
        big = torch.zeros(10)
        raise torch.OutOfMemoryError(f"CUDA out of memory. {big.shape}")

    try:
        use()
    except RuntimeError as error:
        kept = tamed(error)
    assert isinstance(kept, OutOfMemory)
    assert kept.__traceback__ is kept.__context__ is kept.__cause__ is None


def test_a_job_that_cannot_even_be_taken_is_refused_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    engine.submit(job("runs", [40, 41], 9))
    monkeypatch.setattr(engine_module, "Sequence", lambda *_: real_failure())
    (failed,) = engine.submit(job("big", [40, 41], 9))
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.cause) == ("unavailable", "memory")
    assert not [r for r in drain(engine) if isinstance(r, Failed)]


def test_a_beam_search_that_fails_half_way_leaves_no_block_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    real, calls = engine_module._consume, 0

    def consume(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise GrammarError("enough")
        real(*arguments)

    monkeypatch.setattr(engine_module, "_consume", consume)
    (failed,) = [
        r for r in drain(engine, [job("x", [40] * 30, 20, beams=BeamParams(num_beams=4))]) if isinstance(r, Failed)
    ]
    assert failed.kind == "invalid"
    assert engine.scheduler.pool.used == 0


def test_a_grammar_that_there_is_no_memory_for_is_no_fault_of_the_client() -> None:
    class Short(GrammarCompiler):
        def compile(self, grammar: Grammar) -> Any:
            raise MemoryError

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Report] = []

    def emit(new: list[Report]) -> None:
        reports.extend(new)
        if any(isinstance(report, Failed) for report in new):
            inbox.put(None)

    inbox.put(job("x", [40], 9, grammar=REGEX))
    ServingLoop(new_engine(), Short(byte_tokenizer(), BYTE_VOCAB, [EOS]), inbox, emit).run()
    (failed,) = [report for report in reports if isinstance(report, Failed)]
    assert (failed.kind, failed.cause) == ("unavailable", "memory")


def test_tokens_are_counted(compiler: GrammarCompiler) -> None:
    engine = new_engine()
    asked = orders()
    found = answers(engine, compiler, asked)
    stats = engine.stats()
    assert isinstance(stats, Stats)
    assert stats.prompt_tokens == sum(len(order.prompt) for order in asked)
    assert stats.cached_tokens == 0
    plain = sum(len(value[0]) for key, value in found.items() if isinstance(value, tuple) and "beams" not in key[0])
    beams = sum(len(value[0]) for key, value in found.items() if isinstance(value, tuple) and "beams" in key[0])
    assert stats.output_tokens == plain + beams
    assert (stats.preemptions, stats.out_of_memory) == (0, 0)
    # The same prompts once more: whole blocks of them are there.
    answers(engine, compiler, asked[:3])
    again = engine.stats()
    assert again.prompt_tokens == stats.prompt_tokens + sum(len(order.prompt) for order in asked[:3])
    assert again.cached_tokens == sum((len(order.prompt) - 1) // 16 * 16 for order in asked[:3])
