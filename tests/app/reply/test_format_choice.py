"""The format follows from the model's template, its tokens, and what its tokenizer declares."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from app.text.card import Model
from app.text.reply.formats import DeclaredFormat, Llama3Format, MistralFormat, ReplyFormat, reply_format
from app.text.reply.parts import Call, Content, Tool, parse_whole
from app.text.reply.thinking import Marks
from tests.app.reply.samples import TEMPLATES
from tests.app.tiny import SMOLLM2_TEMPLATE, tokenizer, write_card

# What makes templates of these families different, and no more.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HERMES = "{% if tools %}{{ tools | tojson }} in <tool_call></tool_call>{% endif %}" + CHATML
QWEN3 = HERMES + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
CODER = "{% for t in tools or [] %}<tool_call>\n<function=f>\n<parameter=p>{{ t }}{% endfor %}" + CHATML
MISTRAL = "{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}[TOOL_CALLS] {{ messages }}"
MISTRAL_NEW = MISTRAL + "[ARGS]"
LLAMA31 = "{% if tools %}{{ tools }}{% endif %}{{ 'ipython' }}<|python_tag|>"
LLAMA32 = """{% if tools is not none %}{{ tools }}{% endif %}ipython {{ '"parameters": ' }}
{{- raise_exception("This model only supports single tool-calls at once!") }}"""
OTHER = "{% if tools %}<|odd_call|>{{ tools }}{% endif %}" + CHATML
OWN_TOOLS = "{% set tools = 1 %}<tool_call>{{ tools }}" + CHATML


def model(folder: Path, template: str | None, *, tokens: tuple[str, ...] = (), **card: Any) -> Model:
    """A model with this template, and with ``tokens`` among its special ones."""
    path = write_card(folder, chat_template=template, **card)
    own = Tokenizer.from_str(tokenizer().to_str())
    own.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    own.save(str(folder / "tokenizer.json"))
    return Model.load(str(path))


@pytest.mark.parametrize(
    ("template", "kind", "tools"),
    [
        (None, ReplyFormat, False),
        (SMOLLM2_TEMPLATE, ReplyFormat, False),
        (HERMES, ReplyFormat, True),
        (QWEN3, ReplyFormat, True),
        (CODER, DeclaredFormat, True),
        (MISTRAL, MistralFormat, True),
        (MISTRAL_NEW, MistralFormat, True),
        (LLAMA31, Llama3Format, True),
        (LLAMA32, Llama3Format, True),
        (OTHER, ReplyFormat, False),
        (OWN_TOOLS, ReplyFormat, False),
    ],
)
def test_the_template_decides(tmp_path: Path, template: str | None, kind: type[ReplyFormat], tools: bool) -> None:
    found = reply_format(model(tmp_path, template))
    assert type(found) is kind
    assert found.template_tools is tools


def test_details_of_the_families(tmp_path: Path) -> None:
    formats = [reply_format(model(tmp_path, template)) for template in (MISTRAL, MISTRAL_NEW, LLAMA31, LLAMA32)]
    old, new, several, single = formats
    assert isinstance(old, MistralFormat)
    assert isinstance(new, MistralFormat)
    assert (old.named, new.named) == (False, True)
    assert (several.single, single.single) == (False, True)


@pytest.mark.parametrize(
    ("template", "tokens", "marks"),
    [
        (QWEN3, (), Marks("<think>", "</think>")),
        (HERMES, ("<think>", "</think>"), Marks("<think>", "</think>")),
        (MISTRAL, ("[THINK]", "[/THINK]"), Marks("[THINK]", "[/THINK]")),
        (HERMES, ("<think>",), None),
        (SMOLLM2_TEMPLATE, (), None),
    ],
)
def test_reasoning_is_known_by_its_marks(
    tmp_path: Path, template: str, tokens: tuple[str, ...], marks: Marks | None
) -> None:
    assert reply_format(model(tmp_path, template, tokens=tokens)).marks == marks


def test_what_the_tokenizer_declares_comes_first(tmp_path: Path) -> None:
    found = reply_format(model(tmp_path, HERMES, response_template=TEMPLATES["json"]))
    assert isinstance(found, DeclaredFormat)
    assert found.marks == Marks("<think>", "</think>")
    assert found.declared.lead == "<|call|>"


def test_a_declaration_that_is_not_understood_leaves_the_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = reply_format(model(tmp_path, MISTRAL, response_template={"fields": {"tool_calls": {"open": "<c>"}}}))
    assert isinstance(found, MistralFormat)
    assert "response template is not used" in caplog.text


def test_only_the_marks_that_a_parser_needs_are_visible(tmp_path: Path) -> None:
    own = model(tmp_path, QWEN3, tokens=("<tool_call>", "</tool_call>", "<think>", "</think>", "<|other|>"))
    ids = {word: own.tokenizer.token_to_id(word) for word in ("<tool_call>", "</tool_call>", "<think>", "</think>")}
    found = reply_format(own)
    assert found.visible_tokens(tools=True) == set(ids.values())
    assert found.visible_tokens(tools=False) == {ids["<think>"], ids["</think>"]}
    assert found.visible_tokens(tools=False, thinking=False) == frozenset()
    every = [*ids.values(), own.tokenizer.token_to_id("<|other|>"), *own.tokenizer.encode("x").ids]
    assert own.detokenizers.start(visible=found.visible_tokens(tools=True)).push(every) == "".join([*ids, "x"])
    assert own.detokenizers.start(visible=found.visible_tokens(tools=False)).push(every) == "<think></think>x"
    assert own.detokenizers.start().push(every) == "x"


def test_the_history_without_a_template_for_it_reads_back(tmp_path: Path) -> None:
    found = reply_format(model(tmp_path, SMOLLM2_TEMPLATE))
    tools = [Tool("f", "Does it.", {"type": "object", "properties": {"x": {"type": "string"}}}), Tool("g")]
    call = Call("call_1", "f", '{"x": "北京 </tool_call>"}')
    (read,) = parse_whole(found.parser(tools), found.write_call(call)).calls
    assert (read.name, read.arguments) == (call.name, call.arguments)
    assert found.write_result("12°") == "<tool_response>\n12°\n</tool_response>"
    assert json.loads(found.write_result("12°", "f").splitlines()[1]) == {"name": "f", "content": "12°"}
    prompt = found.tools_prompt(tools)
    described = [json.loads(line)["function"] for line in prompt.splitlines() if line.startswith('{"type"')]
    assert [each["name"] for each in described] == ["f", "g"]
    assert described[0]["description"] == "Does it."
    # The example in the prompt is a call as the parser reads it.
    assert parse_whole(found.parser([Tool("the tool's name")]), prompt).calls


def test_without_a_template_everything_is_content(tmp_path: Path) -> None:
    found = reply_format(model(tmp_path, None))
    assert found.parser().push("<think>") == [Content("<think>")]
