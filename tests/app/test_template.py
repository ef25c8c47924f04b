"""The chat template renders what transformers renders, and a hostile or odd conversation is refused."""

from typing import Any

import jinja2
import pytest

from app.text.errors import RequestError
from app.text.template import ChatTemplate
from tests.app.tiny import SMOLLM2_TEMPLATE

LLAMA3_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TRICKY = (
    "{%- set ns = namespace(last='') -%}\n"
    "{% for message in messages %}\n"
    "    {% if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {% generation %}{% set ns.last = message.content %}{{ message.content }}{% endgeneration %}\n"
    "    {{ {'b': '<é>', 'a': 1} | tojson }}|{{ dict(x=1) | tojson(indent=2) }}\n"
    "{% endfor %}{{ ns.last }}{{ flavour | default('plain') }}{{ strftime_now('%Y') }}"
)
CONVERSATION = [
    {"role": "user", "content": "如何制作个人网站? <b>"},
    {"role": "assistant", "content": " Well, "},
    {"role": "user", "content": "go on 😀"},
]


def reference(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, bos_token="<s>", **options)[0][0]


@pytest.mark.parametrize("source", [SMOLLM2_TEMPLATE, LLAMA3_LIKE, TRICKY])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_what_transformers_renders(source: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    text = template.render(CONVERSATION, add_generation_prompt=add_generation_prompt, variables={"flavour": "x"})
    assert text == reference(source, CONVERSATION, add_generation_prompt=add_generation_prompt, flavour="x")


@pytest.mark.parametrize("source", [SMOLLM2_TEMPLATE, LLAMA3_LIKE])
def test_continues_a_final_message_as_transformers_does(source: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    messages = CONVERSATION[:2]
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == reference(source, messages, continue_final_message=True)


def test_a_system_message_of_the_client_replaces_the_templates_own() -> None:
    template = ChatTemplate(SMOLLM2_TEMPLATE, {})
    assert "named SmolLM" in template.render([{"role": "user", "content": "x"}])
    assert "named SmolLM" not in template.render([{"role": "system", "content": "s"}, {"role": "user", "content": "x"}])


def test_a_refusal_by_the_template_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate') }}", {})
    with pytest.raises(RequestError, match="Roles must alternate"):
        template.render(CONVERSATION)


@pytest.mark.parametrize(
    "source", ["{{ messages[7].content }}", "{{ 1 + 'a' }}", "{{ ''.__class__.__mro__ }}", "{{ 1/0 }}"]
)
def test_a_template_that_fails_is_the_requests_error_without_details(source: str) -> None:
    with pytest.raises(RequestError, match="cannot render this conversation") as caught:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert caught.value.__cause__ is None


def test_a_template_that_is_none_is_found_at_once() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        ChatTemplate("{% for %}", {})
