"""The answers of /v1/score and /v1/rerank."""

from typing import Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, WithWarnings


class ScoringUsage(Answer):
    """The tokens that were read."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: Literal[0]
    total_tokens: int = Field(ge=0)


class Score(Answer):
    """The score of one pair."""

    index: int = Field(ge=0)
    object: Literal["score"]
    score: float


class Scores(WithWarnings):
    """The scores of all pairs, in their order."""

    id: str = Field(pattern="^score-")
    object: Literal["list"]
    created: int = Field(description="seconds since 1970")
    model: str
    data: list[Score]
    usage: ScoringUsage


class RankedText(Answer):
    """A document."""

    text: str


class Ranked(Answer):
    """A document's place."""

    index: int = Field(ge=0, description="its place in the request")
    relevance_score: float
    document: RankedText | None = Field(default=None, description="left out with return_documents: false")


class Ranking(WithWarnings):
    """The documents, the best first."""

    id: str = Field(pattern="^rerank-")
    model: str
    results: list[Ranked]
    usage: ScoringUsage
