"""The names by which clients may call this server.

A web page can make the name of its own site resolve to this machine (DNS rebinding) and then read our answers as its
own. It cannot change the name that the browser sends, so a name that is not ours is refused.
"""

import ipaddress
import re
from collections.abc import Sequence

from app.errors import ApiError

_WELL_FORMED = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%25[\w.~-]+)?\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?")


class Hosts:
    """``allowed``: names, ".name" for all below it, "*" for any. Local names and addresses are always fine."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._any = "*" in allowed
        self._names = frozenset(name for name in allowed if not name.startswith("."))
        self._below = tuple(name for name in allowed if name.startswith("."))

    def check(self, host: str) -> None:
        """Raise `ApiError` 400 for what is no Host header, 403 for a name that is not ours; "" is none at all."""
        if not host:
            return
        match = _WELL_FORMED.fullmatch(host)
        if match is None:
            raise ApiError(400, "The Host header is not valid.")
        if self._any:
            return
        name = match[1].lower().rstrip(".")
        if name in self._names or name.endswith(self._below) or _is_local(name):
            return
        raise ApiError(
            403,
            "This server does not answer to the name in the Host header; its operator can allow it: --allowed_hosts.",
            code="host_not_allowed",
        )


def _is_local(name: str) -> bool:
    """Whether nobody on the internet can have this name: localhost, an address, or a name without a dot."""
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
