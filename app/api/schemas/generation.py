"""What chat and plain completions have in common."""

from typing import Annotated, Literal

from pydantic import Field

from app.api.guided import Guided
from app.api.values import STOP_STRINGS, TOKEN_BIASES, ApiRequest, ModelName, TokenId
from app.errors import invalid
from app.text.sampling import Wishes

MAX_SEQUENCES = 128
MAX_STOP_TOKENS = 128
MAX_TOP_LOGPROBS = 20
INT64 = 2**63


class StreamOptions(ApiRequest):
    """``include_obfuscation`` is accepted and means nothing here."""

    include_usage: bool | None = Field(None, description="end the stream with a chunk that tells the usage")
    include_obfuscation: bool | None = Field(None, description="has no influence")


class GenerationRequest(Guided):
    """What chat and plain completions have in common."""

    model: ModelName | None = Field(None, description="one of the names in `/v1/models`; an adapter's name selects it")
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = Field(
        None, description="the most tokens that a choice may have, 1 or more"
    )
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = Field(
        None, description="the answer does not end with fewer tokens, neither by a stop token nor by a string of `stop`"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 to 2; 0 is greedy decoding")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="the most likely tokens that together have this probability, 0 to 1"
    )
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="the k most likely tokens; 0 and -1: no limit"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="tokens at least so likely as this part of the most likely one, 0 to 1"
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="locally typical sampling, above 0 to 1"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="divides the scores of tokens of the prompt and the answer, above 0 to 100; 1 is none"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="taken from the score of each token that the answer has, -2 to 2"
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="the same, times how often it has it, -2 to 2"
    )
    logit_bias: Annotated[dict[int, float], TOKEN_BIASES] = Field(
        default_factory=dict, description="token id to -100..100, added to its score; up to 1024"
    )
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None, description="int64; the same seed and request give the same answer, whatever runs beside it"
    )
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = Field(
        None,
        description="choices for each prompt; of beam search the n best, n <= `num_beams`; prompts times "
        "choices up to 128",
    )
    best_of: Annotated[int, Field(ge=1, le=20)] | None = Field(
        None,
        description="completions: generate so many (up to 20) and answer with the `n` of the highest mean "
        "log-probability of a token, the best first. Above `n` not with `stream` or beam search, and not for chat. "
        "`usage` counts all",
    )
    stop: Annotated[list[str], STOP_STRINGS] = Field(
        default_factory=list,
        description="up to 4 strings that end the answer and are no part of it, 1 to 1024 characters each",
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="up to 128 token ids that end the answer and are no part of it"
    )
    ignore_eos: bool | None = Field(None, description="go on behind the model's own end of text")
    do_sample: bool | None = Field(None, description="false: greedy decoding")
    num_beams: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = Field(
        None, description="above 1: beam search, not with `do_sample: true`; 1 to 128"
    )
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None, description="of beam search: above 0 prefers longer answers"
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None, description='of beam search: true, false or "never", as in transformers'
    )
    stream: bool | None = Field(None, description="answer as server-sent events")
    stream_options: StreamOptions | None = Field(
        None,
        description="`include_usage`: end with a chunk that tells the usage; `include_obfuscation` has no influence",
    )
    resumable: bool | None = Field(
        None, description="go on when the client leaves, so that the answer can be read again: see Streams"
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds that the request may take, at most the server's"
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None,
        description="tell the log-probability of the prompt's tokens, and so many of the most likely ones, "
        "0 to 20; see below",
    )

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def asked_max_tokens(self) -> int | None:
        """The length that the client asked for."""
        return self.max_tokens

    @property
    def max_tokens_field(self) -> str:
        """The field in which it asked for that."""
        return "max_tokens"

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
            max_tokens_field=self.max_tokens_field,
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

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        if self.stream_options is not None:
            unknown += self.stream_options.unknown_fields("stream_options.")
        if self.response_format is not None:
            unknown += self.response_format.unknown_fields("response_format.")
        return unknown

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed with stream: true.", "stream_options")
        self.grammar()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise invalid("best_of must not be less than n.", "best_of")
