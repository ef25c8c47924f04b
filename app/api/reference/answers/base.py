"""What answers of all kinds have in common, and errors."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Base: an answer has exactly the fields that are described."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class WithWarnings(Answer):
    """An answer to a request that may have had unknown fields."""

    warnings: list[str] = Field(
        default_factory=list, description="unknown fields that were ignored; left out if there are none"
    )


class Error(Answer):
    """What went wrong."""

    message: str = Field(description="for people")
    type: Literal[
        "invalid_request_error", "rate_limit_error", "service_unavailable_error", "server_error", "timeout_error"
    ] = Field(description="whose fault it is")
    param: str | None = Field(description="the field that is to blame, as messages[2].content")
    code: str | None = Field(description="model_not_found, context_length_exceeded, invalid_api_key, timeout, ...")


class ErrorResponse(Answer):
    """Every error of every route but those below /v1/messages."""

    error: Error


class AnthropicError(Answer):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "conflict_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "api_error",
    ] = Field(description="whose fault it is")
    message: str = Field(description="for people; begins with the field that is to blame")


class AnthropicErrorResponse(Answer):
    """Every error at and below /v1/messages."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str = Field(description="the request's id, as in the header")


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(ge=0, description="tokens of the prompt that were not computed again")


class Usage(Answer):
    """The tokens of a request."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0, description="all that were generated, those that ended choices included")
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails


class PromptScore(Answer):
    """The score of one token at one place of the prompt."""

    logprob: float = Field(ge=-9999)
    rank: int | None = Field(ge=1, description="1 is the most likely; null for one that is not among the most likely")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptScore] | None]
