"""POST /tokenize and POST /detokenize"""

from typing import Annotated, Any

from pydantic import Field

from app.api.schemas.messages import Messages, check_messages, unknown_in_messages
from app.api.schemas.tools import ToolList, ToolsAsked
from app.api.values import TOKEN_IDS, ApiRequest, ModelName


class TokenizeRequest(ToolsAsked):
    """POST /tokenize: a text, or a conversation in the chat template."""

    model: ModelName | None = Field(None, description="one of the names in `/v1/models`")
    prompt: str | None = Field(None, description="the text; either this or `messages`")
    messages: Messages | None = Field(None, description="a conversation, as for chat completions")
    tools: ToolList = Field(None, description="the tools of the conversation, as for chat completions")
    add_special_tokens: bool = Field(True, description="put the token of the beginning before a text, if there is one")
    add_generation_prompt: bool = Field(True, description="let the chat template begin the assistant's turn")
    continue_final_message: bool = Field(False, description="leave the last message open")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the chat template")
    return_token_strs: bool | None = Field(None, description="tell each token as the vocabulary writes it, too")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        return super().unknown_fields(prefix) + unknown_in_messages(self.messages or ())

    def check(self) -> None:
        super().check()
        check_messages(self.messages or ())


class DetokenizeRequest(ApiRequest):
    """POST /detokenize"""

    model: ModelName | None = Field(None, description="one of the names in `/v1/models`")
    tokens: Annotated[list[int], TOKEN_IDS] = Field(description="a list of token ids")
