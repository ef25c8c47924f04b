"""POST /v1/embeddings"""

from typing import Annotated, Literal

from pydantic import Field

from app.api.values import ApiRequest, ModelName, Prompt, prompts

MAX_EMBEDDING_INPUTS = 2048


class EmbeddingRequest(ApiRequest):
    """POST /v1/embeddings"""

    input: Annotated[list[Prompt], prompts("input", MAX_EMBEDDING_INPUTS)] = Field(
        description="a string, token ids, or a list of either; up to 2048"
    )
    model: ModelName | None = Field(
        None, description="a name of the base model; an adapter's name is a 400", examples=["llama-3-chinese"]
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float or base64 (little-endian float32)"
    )
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="the first so many numbers, normalised again"
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds that the request may take, at most the server's"
    )
