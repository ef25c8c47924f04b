"""Anthropic's Messages API, translated to the road of chat completions and back."""
