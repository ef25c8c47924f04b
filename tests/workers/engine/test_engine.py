"""What the engine promises about requests: choices, seeds, cancellation, containment, resumption."""

from typing import Any

import pytest
import torch

from tests.workers.engine.tiny import EOS, VOCAB, drain, ids_of, job, prompts, tiny_engine, tiny_model
from workers.engine.engine import Engine
from workers.engine.errors import LoadError, StickyDeviceError
from workers.engine.flat_batch import Computed, FlatBatch, likeliest
from workers.engine.kv_cache import BlockPool
from workers.engine.scheduler import Scheduled, Scheduler
from workers.messages import (
    BeamParams,
    Cancel,
    Embedded,
    EmbedJob,
    Failed,
    GenerateJob,
    Output,
    SamplingParams,
    Started,
)

WARM = SamplingParams(temperature=1.0, seed=11)
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=0.9, top_k=20, seed=2),
    SamplingParams(temperature=1.1, top_p=0.8, seed=3),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, typical_p=0.7, seed=5),
    SamplingParams(temperature=0.7, top_k=30, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.3, seed=6),
    SamplingParams(temperature=0.5, logit_bias={5: 3.0, 9: -100.0}, seed=7),
]


@pytest.fixture(params=["torch", "compiled"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny_engine(tiny_model(), cpu_kernels=request.param)


def outputs(reports: list[Any], job_id: str) -> list[Output]:
    return [r for r in reports if isinstance(r, Output) and r.id == job_id]


def test_every_kind_of_sampling_gives_the_same_tokens_alone_and_in_company(engine: Engine) -> None:
    asked = prompts(len(MIXED))
    jobs = [job(str(i), p, 30, sampling=s, n=2) for i, (p, s) in enumerate(zip(asked, MIXED, strict=True))]
    together = drain(
        engine, [*jobs, EmbedJob(id="e", prompt=asked[0]), job("b", asked[1], beams=BeamParams(num_beams=2))]
    )
    for item in jobs:
        alone = drain(engine, [item])
        for choice in (0, 1):
            assert ids_of(alone, item.id, choice) == ids_of(together, item.id, choice)


def test_choices_differ_and_a_seed_repeats_them(engine: Engine) -> None:
    prompt = prompts(1)[0]
    first = drain(engine, [job("x", prompt, n=4, sampling=WARM)])
    again = drain(engine, [job("x", prompt, n=4, sampling=WARM)])
    texts = [tuple(ids_of(first, "x", c)) for c in range(4)]
    assert texts == [tuple(ids_of(again, "x", c)) for c in range(4)]
    assert len(set(texts)) == 4
    assert {o.choice for o in outputs(first, "x") if o.finish_reason} == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", MIXED)
def test_a_run_that_is_cut_anywhere_goes_on_with_the_same_tokens(engine: Engine, sampling: SamplingParams) -> None:
    prompt = prompts(1, seed=13)[0]
    whole = drain(engine, [job("w", prompt, 20, n=2, sampling=sampling)])
    texts = [ids_of(whole, "w", c) for c in range(2)]
    for cut in (0, 1, 7, 20):
        emitted = [text[:cut] for text in texts]
        rest = drain(engine, [job("r", prompt, 20, n=2, sampling=sampling, emitted=emitted)])
        for choice in range(2):
            assert emitted[choice] + ids_of(rest, "r", choice) == texts[choice]
            assert [o.finish_reason is not None for o in outputs(rest, "r") if o.choice == choice][-1]


def test_min_tokens_keeps_the_stop_token_away_and_max_tokens_ends_with_length(engine: Engine) -> None:
    likely_stop = SamplingParams(temperature=1.0, logit_bias={EOS: 100.0})
    reports = drain(engine, [job("a", [20, 21], 30, sampling=likely_stop, min_tokens=5)])
    assert ids_of(reports, "a").index(EOS) == 5
    assert outputs(reports, "a")[-1].finish_reason == "stop"
    assert outputs(reports, "a")[-1].stop_token_id == EOS
    reports = drain(engine, [job("b", [20, 21], 6, sampling=SamplingParams(logit_bias={EOS: -100.0}))])
    assert len(ids_of(reports, "b")) == 6
    assert outputs(reports, "b")[-1].finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"beams": BeamParams(num_beams=3)}])
def test_cancel_frees_everything_at_any_time(engine: Engine, steps: int, options: dict[str, Any]) -> None:
    engine.submit(job("gone", prompts(1, 20, 20)[0], 100, sampling=WARM, **options))
    engine.submit(job("stays", [30, 31, 32], 5, sampling=SamplingParams(temperature=0)))
    for _ in range(steps):
        engine.step()
    engine.submit(Cancel(id="gone"))
    reports = drain(engine)
    assert not outputs(reports, "gone")
    assert engine.scheduler.pool.used == 0
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting


def test_cancel_of_one_choice_leaves_the_others(engine: Engine) -> None:
    engine.submit(job("x", prompts(1)[0], 20, n=3, sampling=SamplingParams(logit_bias={EOS: -100.0})))
    for _ in range(5):
        engine.step()
    engine.submit(Cancel(id="x", choice=1))
    rest = outputs(drain(engine), "x")
    assert {o.choice for o in rest if o.finish_reason} == {0, 2}


def test_a_choice_can_be_cancelled_before_its_prompt_is_read(engine: Engine) -> None:
    engine.submit(job("x", prompts(1)[0], 8, n=3, sampling=SamplingParams(logit_bias={EOS: -100.0})))
    engine.submit(Cancel(id="x", choice=0))
    assert {o.choice for o in outputs(drain(engine), "x")} == {1, 2}
    engine.submit(job("y", prompts(1)[0], 8, n=2))
    engine.submit(Cancel(id="y", choice=0))
    engine.submit(Cancel(id="y", choice=1))
    assert not outputs(drain(engine), "y")
    engine.submit(job("z", prompts(1)[0], 8))
    engine.submit(Cancel(id="z", choice=0))
    assert not engine.has_work
    assert engine.scheduler.pool.used == 0


def test_slices_of_a_prompt_get_shorter_where_the_machine_is_slow(engine: Engine) -> None:
    engine.scheduler = Scheduler(engine.scheduler.pool, 32, 64)
    engine.submit(job("x", prompts(1, 200, 200)[0], 5))
    (first,) = engine.scheduler.schedule()
    assert first.tokens == 200
    # As if 16 tokens took a second.
    for _ in range(30):
        engine.scheduler.note_pass([Scheduled(first.sequence, 16)], 1.0)
    assert [item.tokens for item in engine.scheduler.schedule()] == [16]


def test_slices_of_a_prompt_get_shorter_while_others_wait_for_their_next_token(engine: Engine) -> None:
    engine.scheduler = Scheduler(engine.scheduler.pool, 32, 128)
    engine.submit(job("runs", [40, 41], 60, sampling=SamplingParams(temperature=0, logit_bias={EOS: -100.0})))
    engine.step()
    (decode,) = engine.scheduler.schedule()
    # As if a step took 10 ms, and 1 ms were needed for each token of a prompt.
    for _ in range(30):
        engine.scheduler.note_pass([decode], 0.010)
        engine.scheduler.note_pass([Scheduled(decode.sequence, 100)], 0.100)
    engine.submit(job("long", prompts(1, 200, 200)[0], 5))
    (_, item) = engine.scheduler.schedule()
    assert 4 <= item.tokens <= 12


@pytest.mark.parametrize(
    ("order", "word"),
    [
        (GenerateJob(id="x", prompt=[], max_tokens=1), "empty"),
        (GenerateJob(id="x", prompt=[1, VOCAB], max_tokens=1), "vocabulary"),
        (GenerateJob(id="x", prompt=[-1], max_tokens=1), "vocabulary"),
        (GenerateJob(id="x", prompt=[1], max_tokens=0), "max_tokens"),
        (GenerateJob(id="x", prompt=[1], max_tokens=512), "context"),
        (GenerateJob(id="x", prompt=[1], max_tokens=1, n=33), "rows"),
        (GenerateJob(id="x", prompt=[1], max_tokens=1, n=3, beams=BeamParams(num_beams=2)), "num_beams"),
        (GenerateJob(id="x", prompt=[1], max_tokens=1, sampling=SamplingParams(logit_bias={VOCAB: 1.0})), "vocabulary"),
        (EmbedJob(id="x", prompt=[1] * 513), "context"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_door(engine: Engine, order: Any, word: str) -> None:
    (report,) = engine.submit(order)
    assert isinstance(report, Failed)
    assert report.kind == "invalid"
    assert word in report.message
    assert not engine.has_work


def test_a_request_with_invalid_logits_ends_alone(engine: Engine) -> None:
    compute = engine.model_step.compute

    @torch.inference_mode()
    def poisoned(batch: FlatBatch) -> Computed:
        result = compute(batch)
        for n, row in batch.next_places:
            if batch.items[n].sequence.job.id == "bad":
                result.logits[row] = float("nan")
        return Computed(result.logits, likeliest(result.logits), result.hidden)

    expected = ids_of(drain(engine, [job("good", [40, 41, 42], sampling=WARM)]), "good")
    engine.model_step.compute = poisoned  # type: ignore[method-assign]
    reports = drain(engine, [job("bad", [50, 51]), job("good", [40, 41, 42], sampling=WARM)])
    assert [r.id for r in reports if isinstance(r, Failed)] == ["bad"]
    assert ids_of(reports, "good") == expected


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("options", [{}, {"n": 2}, {"beams": BeamParams(num_beams=2)}, None])
def test_numbers_that_are_none_do_not_outlive_their_request_in_the_cache(
    engine: Engine, options: dict[str, Any] | None, after: int
) -> None:
    compute = engine.model_step.compute
    cache = engine.model_step.cache
    bad, good = prompts(2, 40, 40)
    never = SamplingParams(temperature=0, logit_bias={EOS: -100.0})
    culprit = EmbedJob(id="bad", prompt=bad) if options is None else job("bad", bad, 8, sampling=never, **options)

    @torch.inference_mode()
    def poisoned(batch: FlatBatch) -> Computed:
        result = compute(batch)
        places = dict(batch.next_places)
        for n, item in enumerate(batch.items):
            if item.sequence.job.id == "bad" and (item.sequence.output_length >= after or item.sequence.is_embedding):
                for storage in (*cache.keys, *cache.values):
                    storage[item.sequence.blocks] = float("nan")
                if n in places:
                    result.logits[places[n]] = float("nan")
                if result.hidden is not None:
                    result.hidden[:] = float("nan")
        return Computed(result.logits, likeliest(result.logits), result.hidden)

    expected = [ids_of(drain(engine, [job("x", p, sampling=WARM)]), "x") for p in (good, bad)]
    engine.scheduler.pool = BlockPool(engine.scheduler.pool.count, engine.scheduler.pool.block_size)
    engine.model_step.compute = poisoned  # type: ignore[method-assign]
    assert any(isinstance(r, Failed) for r in drain(engine, [culprit]))
    assert not any(storage.isnan().any() for storage in (*cache.keys, *cache.values))
    # The same blocks again; and the prompt that failed is not found as a prefix.
    assert [ids_of(drain(engine, [job("x", p, sampling=WARM)]), "x") for p in (good, bad)] == expected


def test_an_embedding_does_not_show_how_its_prompt_was_sliced() -> None:
    vectors = set()
    for size in (4, 7, 16, 200):
        engine = tiny_engine(tiny_model(), cpu_kernels="compiled")
        engine.scheduler.ceiling.tokens = size
        reports = drain(engine, [EmbedJob(id="e", prompt=prompts(1, 150, 150)[0])])
        (report,) = [report for report in reports if isinstance(report, Embedded)]
        vectors.add(report.vector)
    assert len(vectors) == 1


def test_embeddings_leave_the_cached_prompts_of_others_alone(engine: Engine) -> None:
    engine.scheduler.pool = BlockPool(8, engine.scheduler.pool.block_size)
    asked = prompts(1, 40, 40)[0]
    drain(engine, [job("x", asked, 2)])
    for seed in range(3):
        drain(engine, [EmbedJob(id="e", prompt=prompts(1, 64, 64, seed=seed)[0])])
    started = [r for r in drain(engine, [job("y", asked, 2)]) if isinstance(r, Started)]
    assert [r.cached_tokens for r in started] == [32]


def test_a_request_that_makes_the_model_raise_ends_alone(engine: Engine) -> None:
    compute = engine.model_step.compute

    def fragile(batch: FlatBatch) -> Computed:
        if any(item.sequence.job.id == "bad" for item in batch.items):
            raise RuntimeError("shape mismatch somewhere")
        return compute(batch)

    expected = ids_of(drain(engine, [job("good", [40, 41, 42], sampling=WARM)]), "good")
    engine.model_step.compute = fragile  # type: ignore[method-assign]
    reports = drain(engine, [job("good", [40, 41, 42], sampling=WARM), job("bad", [50, 51])])
    assert [(r.id, r.kind) for r in reports if isinstance(r, Failed)] == [("bad", "internal")]
    assert ids_of(reports, "good") == expected
    assert engine.scheduler.pool.used == 0


def test_a_lost_device_is_not_contained(engine: Engine) -> None:
    def lost(_batch: FlatBatch) -> Computed:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine.model_step.compute = lost  # type: ignore[method-assign]
    engine.submit(job("x", [1, 2, 3]))
    with pytest.raises(StickyDeviceError):
        engine.step()


def test_a_long_prompt_does_not_stop_running_sequences(engine: Engine) -> None:
    engine.submit(job("runs", [40, 41], 60, sampling=SamplingParams(temperature=0, logit_bias={EOS: -100.0})))
    engine.step()
    engine.submit(job("long", prompts(1, 200, 200)[0], 5, sampling=WARM))
    while not outputs(got := engine.step(), "long"):
        assert len(outputs(got, "runs")) == 1


def test_a_short_prompt_is_not_stuck_behind_a_long_one(engine: Engine) -> None:
    engine.submit(job("long", prompts(1, 400, 400)[0], 5, sampling=WARM))
    engine.submit(job("short", [40, 41], 5, sampling=WARM))
    assert outputs(engine.step(), "short")


def test_a_model_that_is_computed_wrongly_is_refused() -> None:
    model = tiny_model()
    inner = model.model.layers[0].self_attn
    forward = inner.forward

    def different_with_cache(*args: Any, **options: Any) -> Any:
        out, weights = forward(*args, **options)
        # Like a model that treats a batch of one row as one sequence: right without our cache, wrong with it.
        return (out if (args and args[0].shape[1] > 30) or options["hidden_states"].shape[1] > 30 else out * 2), weights

    inner.forward = different_with_cache
    with pytest.raises(LoadError, match="differ"):
        tiny_engine(model, cpu_kernels="torch")


def test_a_model_without_plain_attention_layers_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(LoadError, match="cannot be served"):
        tiny_engine(model)


def test_the_draws_do_not_depend_on_global_generators(engine: Engine) -> None:
    first = ids_of(drain(engine, [job("x", [40, 41], sampling=WARM)]), "x")
    torch.manual_seed(999)
    assert ids_of(drain(engine, [job("x", [40, 41], sampling=WARM)]), "x") == first
