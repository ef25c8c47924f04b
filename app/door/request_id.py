"""The name of a request, for its client and our log; what the engine knows it by is another one, always ours."""

import re

from app.ids import new_id

_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{1,128}")


def request_id(asked: str) -> str:
    """Return what the client calls its request, if that is harmless, or else a new name."""
    return asked if _WELL_FORMED.fullmatch(asked) else new_id("req_")
