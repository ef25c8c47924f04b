"""What a key's owner may take, as its clients are told: 429, and the headers that say what is left."""

import math

from werkzeug.datastructures import Headers

from app.door.ledger import Account
from app.errors import RATE_LIMIT, ApiError


def refusal(account: Account) -> ApiError:
    """A 429 for the limit that ``account`` has reached."""
    limits = account.limits
    limit = {
        "concurrent requests": limits.concurrent,
        "requests per minute": limits.requests_per_minute,
        "tokens per minute": limits.tokens_per_minute,
    }[account.refusal or ""]
    return ApiError(
        429,
        f"Rate limit reached for this API key: {limit} {account.refusal}.",
        kind=RATE_LIMIT,
        code="rate_limit_exceeded",
        retry_after=account.retry_after,
    )


def never_fits(tokens: int, per_minute: int) -> ApiError:
    """A 429 for a request that alone is more than a minute's worth: trying again does not help."""
    return ApiError(
        429,
        f"The request has {tokens} prompt tokens, more than this API key may use in a minute ({per_minute}).",
        kind=RATE_LIMIT,
        code="rate_limit_exceeded",
        retry_after=60,
        should_retry=False,
    )


def too_many_wrong_keys(seconds: float) -> ApiError:
    """A 429 for an address that tries keys."""
    return ApiError(
        429,
        "Too many wrong API keys came from your address.",
        kind=RATE_LIMIT,
        code="too_many_invalid_keys",
        retry_after=seconds,
    )


def dress(headers: Headers, account: Account) -> None:
    """Add what is left, in OpenAI's words."""
    for name, limit, left in (
        ("requests", account.limits.requests_per_minute, account.requests_left),
        ("tokens", account.limits.tokens_per_minute, account.tokens_left),
    ):
        if limit and left is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
            headers[f"x-ratelimit-reset-{name}"] = duration((limit - left) * 60 / limit)


def duration(seconds: float) -> str:
    """Return the time as OpenAI writes it: "120ms", "7s", "6m0s", "1h0m0s"."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    whole = math.ceil(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h{minutes % 60}m{whole % 60}s"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"
