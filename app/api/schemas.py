"""The requests, checked: ranges, and types as JSON has them (true and "0.5" are no numbers, 1.0 is no integer)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.api.errors import ApiError, invalid
from app.api.fields import check_extra_fields
from app.text.sampling import Wishes

MAX_MESSAGES = 4096
MAX_SEQUENCES = 128
MAX_STOPS = 4
MAX_STOP_BYTES = 1024
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_EMBEDDING_INPUTS = 2048
_INT64 = 2**63

Prompt = str | list[int]


def _stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise invalid("stop must be a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop can have at most {MAX_STOPS} strings.", "stop")
    if any(not 1 <= len(each.encode()) <= MAX_STOP_BYTES for each in stops):
        raise invalid(f"A stop string must have 1 to {MAX_STOP_BYTES} bytes.", "stop")
    return stops


def _logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("logit_bias must be an object of token ids and numbers.", "logit_bias")
    if len(value) > MAX_BIASES:
        raise invalid(f"logit_bias can have at most {MAX_BIASES} entries.", "logit_bias")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid("A key of logit_bias must be a token id.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise invalid("A value of logit_bias must be a number from -100 to 100.", "logit_bias")
        biases[int(key)] = float(bias)
    return biases


def _prompts(param: str, most: int) -> BeforeValidator:
    """Normalise the four shapes (text, texts, token ids, lists of token ids) to a list of texts or token-id lists."""

    def normalise(value: Any) -> list[Prompt]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise invalid(f"{param} must be a string, a list of strings, token ids, or lists of token ids.", param)
        if not value:
            raise invalid(f"{param} must not be empty.", param)
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {list}:
            for place, ids in enumerate(value):
                if not ids or set(map(type, ids)) != {int}:
                    raise invalid(f"{param}[{place}] must be a list of token ids.", f"{param}[{place}]")
        elif kinds != {str}:
            raise invalid(f"{param} must hold only strings, only token ids, or only lists of token ids.", param)
        if len(value) > most:
            raise invalid(f"{param} can have at most {most} items.", param)
        return value

    return BeforeValidator(normalise)


def _content(value: Any) -> Any:
    """Text as it is, null as "", text parts joined by line breaks."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string, null or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"part {place} is not of type text, and this server reads only text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {place} has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _messages(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return value


class ApiRequest(BaseModel):
    """Base of all: JSON's types, unknown fields kept for `check_extra_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Message(ApiRequest):
    """One turn of a conversation; ``content`` is its text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees; templates know the system role, not its newer name."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class StreamOptions(ApiRequest):
    """``include_obfuscation`` is accepted and means nothing here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(ApiRequest):
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
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = {}
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stop)] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    do_sample: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_max_tokens(self) -> int | None:
        """The length that the client asked for."""
        return self.max_tokens

    def wishes(self) -> Wishes:
        """The sampling fields for `app.text.sampling.plan`."""
        return Wishes(
            max_tokens=self.asked_max_tokens,
            min_tokens=self.min_tokens,
            n=self.n,
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

    messages: Annotated[list[Message], BeforeValidator(_messages), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    transcript_choices: bool | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """``max_completion_tokens`` is the newer name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[list[Prompt], _prompts("prompt", MAX_SEQUENCES)]
    template: Literal["auto", "raw", "chat"] | None = None


class EmbeddingRequest(ApiRequest):
    """POST /v1/embeddings"""

    model: Annotated[str, Field(max_length=1024)] | None = None
    input: Annotated[list[Prompt], _prompts("input", MAX_EMBEDDING_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None


class TokenizeRequest(ApiRequest):
    """POST /tokenize: a text, or a conversation in the chat template."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], BeforeValidator(_messages), Field(min_length=1, max_length=MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


def _token_ids(value: Any) -> Any:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise invalid("tokens must be a list of token ids.", "tokens")
    return value


class DetokenizeRequest(ApiRequest):
    """POST /detokenize"""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Annotated[Any, AfterValidator(_token_ids)]


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
    if request.best_of is not None:
        n = request.n or 1
        if request.best_of < n:
            raise invalid("best_of must not be less than n.", "best_of")
        if request.best_of > n:
            raise invalid("This server does not support best_of greater than n.", "best_of")


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
