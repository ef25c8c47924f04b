"""Every field that the anthropic client can send is done, refused by name, or known to have no influence.

The lists are those of anthropic 2.12.0: ``types.MessageCreateParams``, ``types.MessageCountTokensParams``, their beta
forms less what goes into headers, ``types.ToolParam``, and the blocks of content that a request may have.
"""

import pytest
from flask.testing import FlaskClient

from app.api.messages.blocks import TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock
from app.api.messages.known import AnthropicRequest
from app.api.messages.request import (
    CountTokensRequest,
    InputMessage,
    InputTool,
    InputToolChoice,
    MessagesRequest,
    OutputConfig,
    OutputFormat,
    Thinking,
)

CREATE = """
max_tokens messages model cache_control container diagnostics inference_geo metadata output_config service_tier speed
stop_sequences system thinking tool_choice tools user_profile_id workspace_id stream
"""
CREATE_BETA = """
billing_policy compaction context_management fallback_credit_token fallbacks mcp_servers thread output_format
"""
# Of earlier clients, and of the service behind them.
CREATE_EARLIER = "temperature top_p top_k"
COUNT = """
messages model cache_control output_config speed system thinking tool_choice tools user_profile_id workspace_id
context_management mcp_servers
"""
FIELDS: dict[type[AnthropicRequest], str] = {
    MessagesRequest: f"{CREATE} {CREATE_BETA} {CREATE_EARLIER}",
    CountTokensRequest: COUNT,
    InputMessage: "role content",
    InputTool: """
        input_schema name allowed_callers cache_control defer_loading description eager_input_streaming input_examples
        strict type
    """,
    InputToolChoice: "type name disable_parallel_tool_use",
    Thinking: "type budget_tokens display",
    OutputConfig: "effort format",
    OutputFormat: "type schema",
    TextBlock: "text type cache_control citations",
    ThinkingBlock: "signature thinking type",
    ToolUseBlock: "id input name type cache_control caller toolset_name",
    ToolResultBlock: "tool_use_id type cache_control content is_error toolset_name",
}


@pytest.mark.parametrize("model", FIELDS, ids=lambda model: model.__name__)
def test_every_field_of_the_client_is_known(model: type[AnthropicRequest]) -> None:
    done = {field.alias or name for name, field in model.model_fields.items()}
    sample = model.model_construct()
    refused, harmless = set(sample.refused()), sample.harmless()
    assert set(FIELDS[model].split()) <= done | refused | harmless
    assert not done & refused
    assert not done & harmless
    assert not refused & harmless


# The other blocks and tools of the client's types.
BLOCKS = """
image document search_result redacted_thinking server_tool_use web_search_tool_result web_fetch_tool_result
code_execution_tool_result bash_code_execution_tool_result text_editor_code_execution_tool_result
tool_search_tool_result container_upload
"""
TOOLS = """
bash_20250124 code_execution_20250522 code_execution_20250825 code_execution_20260120 code_execution_20260521
browser_toolset_20260801 memory_20250818 computer_toolset_20260801 text_editor_20250124 text_editor_20250429
text_editor_20250728 web_search_20250305 web_fetch_20250910 web_search_20260209 web_fetch_20260209 web_fetch_20260309
web_search_20260318 web_fetch_20260318 tool_search_tool_bm25_20251119 tool_search_tool_regex_20251119
"""


def refusal(client: FlaskClient, **fields: object) -> str:
    response = client.post(
        "/v1/messages", json={"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], **fields}
    )
    assert response.status_code == 400, response.text
    return str(response.get_json()["error"]["message"])


@pytest.mark.parametrize("kind", BLOCKS.split())
def test_blocks_that_cannot_be_read_are_refused_by_name(client: FlaskClient, kind: str) -> None:
    said = refusal(client, messages=[{"role": "user", "content": [{"type": kind}]}])
    assert said == f"messages[0].content[0].type: this server does not read content of type '{kind}' here."


@pytest.mark.parametrize("kind", TOOLS.split())
def test_tools_of_the_service_are_refused_by_name(client: FlaskClient, kind: str) -> None:
    assert refusal(client, tools=[{"type": kind, "name": "x"}]).startswith("tools[0].type: this server has no tools")
