"""Fields of Anthropic's requests that are not simply done: refused by name, harmless, or unknown."""

from collections.abc import Mapping
from typing import Any

from app.api.fields import asks_for_nothing
from app.api.values import ApiRequest
from app.errors import invalid

# Field -> values that ask for nothing; null always is one.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "compaction": (),
    "container": (),
    "context_management": ({}, {"edits": []}),
    "diagnostics": (),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "thread": (),
}

# About the client, its bill or its cache, not about the answer; prompts are cached without being asked.
HARMLESS = frozenset({"billing_policy", "cache_control", "metadata", "service_tier", "user_profile_id", "workspace_id"})

TOOL_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
}
TOOL_HARMLESS = frozenset({"cache_control", "eager_input_streaming"})

BLOCK_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "caller": ({"type": "direct"},),
    "citations": ([],),
    "toolset_name": (),
}
BLOCK_HARMLESS = frozenset({"cache_control", "signature"})


class AnthropicRequest(ApiRequest):
    """Base of the requests' parts: knows Anthropic's field names instead of OpenAI's."""

    def refused(self) -> Mapping[str, tuple[Any, ...]]:
        """Return the fields that are not supported, with the values that ask for nothing."""
        return {}

    def harmless(self) -> frozenset[str]:
        """Return the fields that have no influence on the answer."""
        return frozenset()

    def unknown_fields(self, prefix: str = "") -> list[str]:
        refused, harmless = self.refused(), self.harmless()
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in refused:
                if not asks_for_nothing(value, refused[name]):
                    raise invalid(f"This server does not support {prefix}{name}.", prefix + name)
            elif name not in harmless:
                unknown.append(prefix + name)
        return unknown
