"""POST /v1/completions"""

from typing import Annotated, Literal

from pydantic import Field

from app.api.schemas.generation import INT64, MAX_SEQUENCES, GenerationRequest
from app.api.values import Prompt, prompts
from app.errors import invalid


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[list[Prompt], prompts("prompt", MAX_SEQUENCES)] = Field(
        description="a string, token ids, or a list of either; up to 128"
    )
    # None at all, when only the prompt is of interest.
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = Field(
        None, description="as for chat; 0 is allowed with `echo` or `prompt_logprobs`"
    )
    template: Literal["auto", "raw", "chat"] | None = Field(
        None,
        description='"raw": the prompt as it is; "chat": in the chat template; "auto": in the template if there is '
        "one. Token ids, `echo` and `suffix` are always raw",
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="tell each token's log-probability, and so many of the most likely ones, 0 to 5; see below"
    )
    echo: bool | None = Field(
        None,
        description="put the prompt before the answer; with `logprobs`, the prompt's come first. With `max_tokens: 0` "
        "the answer is the prompt alone",
    )
    suffix: str | None = Field(
        None,
        description="write what stands between `prompt` and `suffix`; a 400 where the tokenizer has no "
        "fill-in-the-middle tokens, and not together with `echo`",
    )

    @property
    def top_alternatives(self) -> int | None:
        return self.logprobs

    @property
    def drawn(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    def check(self) -> None:
        super().check()
        if self.picks_best and self.stream:
            raise invalid("best_of greater than n cannot be streamed.", "best_of")
        if self.picks_best and (self.num_beams or 1) > 1:
            raise invalid(
                "best_of greater than n is not combined with beam search, which finds the n best itself.", "best_of"
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("max_tokens: 0 is only allowed with echo or prompt_logprobs.", "max_tokens")
        if self.echo and self.suffix:
            raise invalid("echo and suffix cannot be combined.", "suffix")
        if self.template == "chat" and (self.echo or self.suffix):
            raise invalid('echo and suffix are for raw prompts, not for template: "chat".', "template")
