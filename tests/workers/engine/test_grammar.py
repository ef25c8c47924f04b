"""Text that was asked to match a grammar matches it, in every mode, and a bad grammar hurts nobody else."""

import json
import queue
import re
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.workers.engine.tiny import BYTE_VOCAB, EOS, byte_tokenizer, drain, ids_of, job, tiny_engine, tiny_model
from workers.engine.engine import Engine
from workers.engine.errors import GrammarError
from workers.engine.grammar import GrammarCompiler
from workers.engine.worker import ServingLoop
from workers.messages import BeamParams, Cancel, Failed, Grammar, Output, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
REGEX = Grammar(kind="regex", source="[a-c]{3,6}(-[0-9]{2})?")
CHOICE = Grammar(kind="lark", source='start: "yes" | "no" | "也许"')


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), BYTE_VOCAB, [EOS])


@pytest.fixture
def engine() -> Engine:
    return tiny_engine(tiny_model(vocab_size=BYTE_VOCAB))


def text_of(reports: list[Any], job_id: str, choice: int = 0) -> str:
    ids = [i for i in ids_of(reports, job_id, choice) if i != EOS]
    return str(byte_tokenizer().decode(ids))


def check(grammar: Grammar, text: str) -> None:
    if grammar is JSON:
        value = json.loads(text)
        assert set(value) == {"name", "age"}
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 99
    elif grammar is REGEX:
        assert re.fullmatch(REGEX.source, text)
    else:
        assert text in {"yes", "no", "也许"}


@pytest.mark.parametrize("grammar", [JSON, REGEX, CHOICE], ids=["json", "regex", "choice"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampling": SamplingParams(temperature=0)},
        {"sampling": SamplingParams(temperature=1.0, seed=4), "n": 4},
        {"sampling": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=5), "n": 2},
        {"beams": BeamParams(num_beams=3), "n": 2},
    ],
    ids=["greedy", "sampled", "filtered", "beams"],
)
def test_the_text_matches_its_grammar(
    engine: Engine, compiler: GrammarCompiler, grammar: Grammar, options: dict[str, Any]
) -> None:
    beside = job("plain", [30, 31], 40, sampling=SamplingParams(seed=8))
    expected = ids_of(drain(engine, [beside]), "plain")
    asked = job("x", [40, 41, 42], 200, grammar=grammar, **options)
    engine.submit(beside)
    reports = engine.submit(asked, compiler.compile(grammar)) + drain(engine)
    for choice in range(options.get("n", 1)):
        check(grammar, text_of(reports, "x", choice))
        last = [o for o in reports if isinstance(o, Output) and (o.id, o.choice) == ("x", choice)][-1]
        assert last.finish_reason == "stop"
    assert ids_of(reports, "plain") == expected


@pytest.mark.parametrize("grammar", [JSON, REGEX, CHOICE], ids=["json", "regex", "choice"])
def test_a_guided_run_that_is_cut_goes_on_with_the_same_tokens(
    engine: Engine, compiler: GrammarCompiler, grammar: Grammar
) -> None:
    options: dict[str, Any] = {"grammar": grammar, "n": 2, "sampling": SamplingParams(seed=4)}
    whole = engine.submit(job("w", [40, 41], 200, **options), compiler.compile(grammar)) + drain(engine)
    texts = [ids_of(whole, "w", c) for c in range(2)]
    for cut in (1, 3, len(texts[0])):
        again = job("r", [40, 41], 200, emitted=[t[:cut] for t in texts], **options)
        rest = engine.submit(again, compiler.compile(grammar)) + drain(engine)
        assert [t[:cut] + ids_of(rest, "r", c) for c, t in enumerate(texts)] == texts


def test_min_tokens_gives_way_where_the_grammar_has_no_way_on(engine: Engine, compiler: GrammarCompiler) -> None:
    asked = job("x", [40], 50, grammar=CHOICE, min_tokens=20, sampling=SamplingParams(temperature=0))
    check(CHOICE, text_of(engine.submit(asked, compiler.compile(CHOICE)) + drain(engine), "x"))


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar(kind="json_schema", source='{"const": "a <mark> b"}'), '"a <mark> b"'),
        (Grammar(kind="regex", source="<mark>/"), "<mark>/"),
        (Grammar(kind="lark", source='start: "x<mark>"'), "x<mark>"),
    ],
)
def test_a_text_may_hold_the_name_of_a_special_token(grammar: Grammar, text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<mark>", special=False, normalized=False)])
    compiler = GrammarCompiler(tokenizer, BYTE_VOCAB + 1, [EOS])
    engine = tiny_engine(tiny_model(vocab_size=BYTE_VOCAB + 1))
    reports = engine.submit(job("x", [40], 50, grammar=grammar), compiler.compile(grammar)) + drain(engine)
    assert text_of(reports, "x") == text


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="json_schema", source='{"type": "strin"}'),
        Grammar(kind="json_schema", source="not json"),
        Grammar(kind="regex", source="(unclosed"),
        Grammar(kind="lark", source="start: missing_rule"),
    ],
)
def test_a_bad_grammar_is_an_error_in_one_line(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_loop_compiles_beside_running_work_and_refuses_only_the_bad_one(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Any] = []
    ended: set[str] = set()

    def emit(batch: list[Any]) -> None:
        reports.extend(batch)
        for r in batch:
            if isinstance(r, Failed) or (isinstance(r, Output) and r.finish_reason):
                ended.add(r.id)
        if ended >= {"good", "bad", "plain"}:
            inbox.put(None)

    inbox.put(job("plain", [30, 31], 40, sampling=SamplingParams(seed=8)))
    inbox.put(job("good", [40, 41], 200, grammar=JSON))
    inbox.put(job("bad", [40, 41], 20, grammar=Grammar(kind="regex", source="(unclosed")))
    inbox.put(job("gone", [40, 41], 20, grammar=REGEX))
    inbox.put(Cancel(id="gone"))
    ServingLoop(engine, compiler, inbox, emit).run()
    check(JSON, text_of(reports, "good"))
    (failed,) = [r for r in reports if isinstance(r, Failed)]
    assert (failed.id, failed.kind) == ("bad", "invalid")
    assert "gone" not in ended


def schema(**fields: Any) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(fields))


# Each of these took seconds, or never ended, or was found out only while it ran beside other requests.
@pytest.mark.parametrize(
    "grammar",
    [
        schema(type="integer", multipleOf=99_999_999),
        schema(type="number", multipleOf=0.0123456),
        schema(type="integer", allOf=[{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]),
        Grammar(kind="lark", source=r'start: %json {"type":"integer","multiple\u004ff" : 99999999}'),
        schema(**{"$ref": "#"}),
        schema(**{"$ref": "http://127.0.0.1:1/x"}),
        schema(type="object", properties={f"property_{i}": {"type": "string"} for i in range(6000)}),
        schema(type="strin"),
        schema(type="string", pattern="(a"),
        schema(type="string", maxLength=2**40),
        Grammar(kind="regex", source="(" * 100_000 + "a" + ")" * 100_000),
        Grammar(kind="lark", source="start: start"),
        Grammar(kind="lark", source="start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    ],
)
def test_a_hostile_grammar_is_refused_when_it_is_compiled(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(GrammarError) as found:
        compiler.compile(grammar)
    assert "\n" not in str(found.value)
    assert "compute_time" not in str(found.value)


@pytest.mark.parametrize(
    "grammar",
    [
        schema(
            type="object", properties={f"p{m}": {"type": "number", "multipleOf": m} for m in (0.01, 7, 11, 997, 5000)}
        ),
        schema(allOf=[{"multipleOf": 6}, {"multipleOf": 4}], type="integer"),
        Grammar(kind="regex", source="(a+)+$"),
        Grammar(kind="regex", source="[a-z]{1,100000}"),
    ],
)
def test_what_only_looks_hostile_is_compiled(compiler: GrammarCompiler, grammar: Grammar) -> None:
    assert not compiler.compile(grammar).is_error()


def test_a_grammar_that_comes_to_its_limits_is_the_clients_error(engine: Engine, compiler: GrammarCompiler) -> None:
    wide = schema(type="object", properties={f"p{i}": {"type": "string"} for i in range(1500)})
    reports = engine.submit(job("wide", [5, 6], max_tokens=40, grammar=wide), compiler.compile(wide))
    reports += drain(engine)
    (failed,) = [each for each in reports if isinstance(each, Failed)]
    assert failed.kind == "invalid"
    assert failed.message.startswith("the grammar failed")
