"""The requests, checked: ranges, and types as JSON has them (true and "0.5" are no numbers, 1.0 is no integer)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from app.api.errors import ApiError, invalid
from app.api.fields import check_extra_fields
from app.api.guided import Guided
from app.api.values import (
    ApiRequest,
    Prompt,
    content_text,
    message_list,
    prompts,
    stop_strings,
    token_biases,
    token_ids,
)
from app.text.sampling import Wishes

MAX_MESSAGES = 4096
MAX_SEQUENCES = 128
MAX_STOP_TOKENS = 128
MAX_EMBEDDING_INPUTS = 2048
MAX_TOP_LOGPROBS = 20
_INT64 = 2**63


class Message(ApiRequest):
    """One turn of a conversation; ``content`` is its text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(content_text)]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees; templates know the system role, not its newer name."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class StreamOptions(ApiRequest):
    """``include_obfuscation`` is accepted and means nothing here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Guided):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(token_biases)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    stop: Annotated[list[str], BeforeValidator(stop_strings)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    do_sample: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_max_tokens(self) -> int | None:
        """The length that the client asked for."""
        return self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        """How many alternatives to show with each token; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def drawn(self) -> int:
        """How many choices are generated, of which the best ``n`` are the answer."""
        return self.n or 1

    @property
    def picks_best(self) -> bool:
        """Whether not all that is generated is the answer."""
        return self.drawn > (self.n or 1)

    def wishes(self) -> Wishes:
        """The sampling fields for `app.text.sampling.plan`."""
        return Wishes(
            max_tokens=self.asked_max_tokens,
            min_tokens=self.min_tokens,
            n=self.drawn,
            temperature=self.temperature,
            top_p=self.top_p,
            # Some servers say "no limit" with -1.
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            do_sample=self.do_sample,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], BeforeValidator(message_list), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    transcript_choices: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """``max_completion_tokens`` is the newer name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[list[Prompt], prompts("prompt", MAX_SEQUENCES)]
    # None at all, when only the prompt is of interest.
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    template: Literal["auto", "raw", "chat"] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def top_alternatives(self) -> int | None:
        return self.logprobs

    @property
    def drawn(self) -> int:
        return max(self.n or 1, self.best_of or 1)


class EmbeddingRequest(ApiRequest):
    """POST /v1/embeddings"""

    model: Annotated[str, Field(max_length=1024)] | None = None
    input: Annotated[list[Prompt], prompts("input", MAX_EMBEDDING_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None


class TokenizeRequest(ApiRequest):
    """POST /tokenize: a text, or a conversation in the chat template."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], BeforeValidator(message_list), Field(min_length=1, max_length=MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(ApiRequest):
    """POST /detokenize"""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Annotated[Any, AfterValidator(token_ids)]


R = TypeVar("R", bound=ApiRequest)


def validate(schema: type[R], fields: Mapping[str, Any], strict: bool) -> tuple[R, list[str]]:
    """Return the request and the names of its unknown fields.

    Raises `ApiError` 400 that names the first bad field; with ``strict`` an unknown field is one.
    """
    try:
        request = schema.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from None
    unknown = check_extra_fields(request.model_extra or {})
    if isinstance(request, ChatRequest | TokenizeRequest):
        for place, message in enumerate(request.messages or ()):
            unknown += check_message_fields(message, f"messages[{place}].")
    if isinstance(request, GenerationRequest):
        _check_combinations(request)
        if request.stream_options is not None:
            unknown += check_extra_fields(request.stream_options.model_extra or {}, "stream_options.")
        if request.response_format is not None:
            unknown += request.response_format.unknown_fields()
    if unknown and strict:
        raise invalid(f"Unknown field: {unknown[0]}.", unknown[0])
    return request, unknown


def check_message_fields(message: Message, prefix: str) -> list[str]:
    """Return the unknown fields of a message. Raises `ApiError` 400 for calls of tools: they are not supported."""
    unknown = []
    for name, value in (message.model_extra or {}).items():
        if name in ("tool_calls", "function_call", "tool_call_id", "audio") and value not in (None, []):
            raise invalid(f"This server does not support {prefix}{name}.", prefix + name)
        if name not in ("tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations"):
            unknown.append(prefix + name)
    return unknown


def _check_combinations(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed with stream: true.", "stream_options")
    request.grammar()
    n = request.n or 1
    if request.best_of is not None and request.best_of < n:
        raise invalid("best_of must not be less than n.", "best_of")
    if isinstance(request, ChatRequest):
        if request.best_of is not None and request.best_of > n:
            raise invalid("best_of greater than n is only for /v1/completions.", "best_of")
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs is only allowed with logprobs: true.", "top_logprobs")
    if isinstance(request, CompletionRequest):
        _check_completion(request)


def _check_completion(request: CompletionRequest) -> None:
    if request.picks_best and request.stream:
        raise invalid("best_of greater than n cannot be streamed.", "best_of")
    if request.picks_best and (request.num_beams or 1) > 1:
        raise invalid(
            "best_of greater than n is not combined with beam search, which finds the n best itself.", "best_of"
        )
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise invalid("max_tokens: 0 is only allowed with echo or prompt_logprobs.", "max_tokens")
    if request.echo and request.suffix:
        raise invalid("echo and suffix cannot be combined.", "suffix")
    if request.template == "chat" and (request.echo or request.suffix):
        raise invalid('echo and suffix are for raw prompts, not for template: "chat".', "template")


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and not part.startswith(("constrained", "function")) and part not in _UNION_TAGS:
            param += f".{part}" if param else part
    message = "is required" if first["type"] == "missing" else _lower_first(first["msg"].removeprefix("Value error, "))
    return invalid(f"{param}: {message}.", param or None)


# Names of the members of a union, which pydantic puts into the location of an error.
_UNION_TAGS = frozenset({"bool", "int", "str", "float", "literal"})


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
