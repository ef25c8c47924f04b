"""Whatever a random model draws, held to the grammar it writes calls that parse, match and are allowed."""

import json

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from app.text.detokenizer import DetokenizerFactory
from app.text.errors import RequestError
from app.text.reply.formats import Llama3Format, MistralFormat, ReplyFormat
from app.text.reply.parts import Reply, Tool, ToolChoice, parse_whole
from app.text.reply.thinking import Marks
from tests.workers.engine.tiny import BYTE_VOCAB, EOS, byte_tokenizer, drain, ids_of, job, tiny_engine, tiny_model
from workers.engine.engine import Engine
from workers.engine.errors import GrammarError
from workers.engine.grammar import GrammarCompiler
from workers.messages import Grammar, Output, SamplingParams

MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>"]
THINK = Marks("<think>", "</think>")
REQUIRED, AUTO = ToolChoice("required"), ToolChoice("auto")

PERSON = Tool(
    "person",
    parameters={
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"$ref": "#/$defs/age"},
            # Marks of every format, in a string.
            "note": {"const": '</tool_call>"[TOOL_CALLS]}; {<tool_call>'},
        },
        "required": ["name", "age", "note"],
        "$defs": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
    strict=True,
)
CLOCK = Tool("clock")
LIGHT = Tool("light", parameters={"properties": {"on": {"type": "boolean"}}, "required": ["on"]})
TOOLS = [PERSON, CLOCK, LIGHT]


class Setup:
    """A random model, with the marks among its tokens or without them."""

    def __init__(self, marks: bool) -> None:
        self.tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
        if marks:
            # Special and not, as they are in real tokenizers.
            self.tokenizer.add_tokens(
                [AddedToken(w, special=place % 2 == 0, normalized=False) for place, w in enumerate(MARKS)]
            )
        self.token_ids = {w: i for w, i in self.tokenizer.get_added_vocab().items() if w in MARKS}
        size = BYTE_VOCAB + len(self.token_ids)
        self.engine: Engine = tiny_engine(tiny_model(vocab_size=size))
        self.compiler = GrammarCompiler(self.tokenizer, size, [EOS])
        self.detokenizers = DetokenizerFactory(self.tokenizer.backend_tokenizer)

    def formats(self) -> dict[str, ReplyFormat]:
        ids = self.token_ids
        return {
            "hermes": ReplyFormat(ids, template_tools=True, marks=THINK),
            "mistral": MistralFormat(ids, marks=None, named=False),
            "mistral-named": MistralFormat(ids, marks=None, named=True),
            "llama3": Llama3Format(ids, marks=None, single=False),
        }

    def texts(
        self, grammar: Grammar, visible: frozenset[int], n: int = 4, likes: dict[int, float] | None = None
    ) -> list[tuple[str, bool]]:
        """What the model writes in ``n`` choices, and whether each came to its end."""
        sampling = SamplingParams(temperature=1.5, seed=11, logit_bias=likes or {})
        asked = job("x", [40, 41, 42], 450, n=n, grammar=grammar, sampling=sampling)
        reports = self.engine.submit(asked, self.compiler.compile(grammar)) + drain(self.engine)
        texts = []
        for choice in range(n):
            ids = ids_of(reports, "x", choice)
            reader = self.detokenizers.start(visible=visible)
            text = reader.push([i for i in ids if i != EOS]) + reader.flush()
            ends = [r.finish_reason for r in reports if isinstance(r, Output) and r.choice == choice]
            texts.append((text, ends[-1] == "stop"))
        return texts


@pytest.fixture(scope="module")
def with_tokens() -> Setup:
    return Setup(marks=True)


@pytest.fixture(scope="module")
def with_words() -> Setup:
    return Setup(marks=False)


@pytest.fixture(params=["tokens", "words"])
def setup(request: pytest.FixtureRequest) -> Setup:
    found: Setup = request.getfixturevalue(f"with_{request.param}")
    return found


def check(reply: Reply, complete: bool, strict_only: bool = False) -> None:
    """Every call but one that was cut off has arguments that match its schema."""
    for call in reply.calls if complete else reply.calls[:-1]:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        if call.name == "person":
            assert list(arguments) == ["name", "age", "note"]
            assert len(arguments["name"]) <= 6
            assert 0 <= arguments["age"] <= 99
            assert arguments["note"] == PERSON.parameters["properties"]["note"]["const"]  # type: ignore[index]
        elif not strict_only:
            assert arguments == {} if call.name == "clock" else isinstance(arguments["on"], bool)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "single"])
@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-named", "llama3"])
def test_required_calls_match_their_schemas(setup: Setup, name: str, parallel: bool) -> None:
    reply_format = setup.formats()[name]
    held = reply_format.grammar(TOOLS, REQUIRED, parallel=parallel, thinking=False)
    assert held is not None
    visible = reply_format.visible_tokens(tools=True, thinking=False)
    seen = set()
    for text, complete in setup.texts(held.grammar, visible):
        reply = parse_whole(reply_format.parser(TOOLS, thinking=False), text)
        assert reply.calls
        if complete:
            assert reply.content == ""
            assert parallel or len(reply.calls) == 1
        check(reply, complete)
        seen |= {call.name for call in reply.calls}
    assert seen


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-named", "llama3"])
def test_only_named_tools_are_called(setup: Setup, name: str) -> None:
    reply_format = setup.formats()[name]
    held = reply_format.grammar(TOOLS, ToolChoice("required", ("light",)), parallel=False, thinking=False)
    assert held is not None
    visible = reply_format.visible_tokens(tools=True, thinking=False)
    for text, complete in setup.texts(held.grammar, visible):
        reply = parse_whole(reply_format.parser(TOOLS, thinking=False), text)
        assert complete
        assert [call.name for call in reply.calls] == ["light"]
        check(reply, complete)


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-named", "llama3"])
def test_free_text_may_stand_before_calls_and_strict_ones_match(with_tokens: Setup, name: str) -> None:
    setup, reply_format = with_tokens, with_tokens.formats()[name]
    held = reply_format.grammar(TOOLS, AUTO, parallel=False, thinking=False)
    assert held is not None
    visible = reply_format.visible_tokens(tools=True, thinking=False)
    # The model is made to like what calls begin with.
    begin = setup.token_ids.get({"hermes": "<tool_call>"}.get(name, "[TOOL_CALLS]"), 0)
    likes = {"llama3": setup.tokenizer.encode("{")[0]}.get(name, begin)
    found = 0
    for text, complete in setup.texts(held.grammar, visible, 6, {likes: 40.0 if name == "llama3" else 9.0}):
        reply = parse_whole(reply_format.parser(TOOLS, thinking=False), text)
        assert len(reply.calls) <= 1
        assert not any(mark in reply.content for mark in ("<tool_call>", "[TOOL_CALLS]"))
        check(reply, complete, strict_only=True)
        found += len(reply.calls)
    assert found


@pytest.mark.parametrize("thinking", [True, None])
def test_reasoning_is_free_before_a_required_call(setup: Setup, thinking: bool | None) -> None:
    reply_format = setup.formats()["hermes"]
    held = reply_format.grammar([LIGHT], REQUIRED, thinking=thinking)
    assert held is not None
    visible = reply_format.visible_tokens(tools=True, thinking=thinking)
    likes = {setup.token_ids[mark]: 6.0 for mark in ("<think>", "</think>") if mark in setup.token_ids}
    for text, complete in setup.texts(held.grammar, visible, 4, likes):
        reply = parse_whole(reply_format.parser([LIGHT], thinking=thinking), text)
        assert not complete or (reply.calls and not reply.content)
        assert not likes or not thinking or "</think>" in text
        check(reply, complete)


def test_an_answer_in_a_grammar_comes_behind_the_reasoning(with_tokens: Setup) -> None:
    reply_format = with_tokens.formats()["hermes"]
    likes = {with_tokens.token_ids["</think>"]: 8.0}
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
    schema["additionalProperties"] = False
    for grammar, fits in [
        (Grammar(kind="json_schema", source=json.dumps(schema)), lambda text: 0 <= json.loads(text)["a"] <= 9),
        (Grammar(kind="regex", source="(a/b|\nc)"), lambda text: text in ("a/b", "\nc", "c")),
        (Grammar(kind="lark", source='start: x "!"\nx: "yes" | "no"'), lambda text: text in ("yes!", "no!")),
    ]:
        assert reply_format.with_reasoning(grammar, thinking=False) == grammar
        held = reply_format.with_reasoning(grammar, thinking=True)
        for text, complete in with_tokens.texts(held, reply_format.visible_tokens(tools=False), 4, likes):
            reply = parse_whole(reply_format.parser(thinking=True), text)
            assert complete
            assert fits(reply.content), text


def test_a_reply_is_held_only_where_the_request_asks_for_it(with_words: Setup) -> None:
    reply_format = with_words.formats()["hermes"]
    loose = [CLOCK, LIGHT]
    assert reply_format.grammar(loose, AUTO) is None
    assert reply_format.grammar(TOOLS, ToolChoice("none")) is None
    assert reply_format.grammar([], REQUIRED) is None
    assert reply_format.grammar(loose, AUTO, parallel=False) is not None
    assert reply_format.grammar(loose, ToolChoice("auto", ("clock",))) is not None
    assert reply_format.grammar(TOOLS, AUTO) is not None


def test_a_schema_that_is_none_of_an_object_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        ReplyFormat({}, template_tools=True, marks=None).grammar(
            [CLOCK, Tool("bad", parameters={"type": "string"})], REQUIRED
        )
    assert caught.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-named", "llama3"])
def test_the_line_of_a_schema_that_cannot_be_used_leads_to_its_tool(with_words: Setup, name: str) -> None:
    bad = Tool("bad", parameters={"type": "object", "properties": {"a": {"type": "strin"}}})
    held = with_words.formats()[name].grammar([CLOCK, LIGHT, bad, PERSON], REQUIRED)
    assert held is not None
    with pytest.raises(GrammarError) as caught:
        with_words.compiler.compile(held.grammar)
    assert held.params[caught.value.line] == "tools[2].function.parameters"
    assert "strin" in str(caught.value)
