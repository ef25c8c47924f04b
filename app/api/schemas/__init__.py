"""The requests, checked: ranges, and types as JSON has them (true and "0.5" are no numbers, 1.0 is no integer)."""

from app.api.schemas.chat import ChatRequest
from app.api.schemas.completion import CompletionRequest
from app.api.schemas.embedding import EmbeddingRequest
from app.api.schemas.generation import (
    MAX_SEQUENCES,
    MAX_STOP_TOKENS,
    MAX_TOP_LOGPROBS,
    GenerationRequest,
    StreamOptions,
)
from app.api.schemas.messages import MAX_MESSAGES, Message
from app.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from app.api.schemas.tools import ToolDefinition
from app.api.schemas.validation import validate
from app.api.values import ApiRequest

__all__ = [
    "MAX_MESSAGES",
    "MAX_SEQUENCES",
    "MAX_STOP_TOKENS",
    "MAX_TOP_LOGPROBS",
    "ApiRequest",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "Message",
    "StreamOptions",
    "TokenizeRequest",
    "ToolDefinition",
    "validate",
]
