"""Where a request comes from, so that one address can be refused and no other."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Addresses:
    """Tells the client's address: the peer's, or, behind a trusted proxy, the last one that the proxy has told.

    Entries before the last are what the proxy was told itself, so anybody may have written them.
    """

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusted: list[Network] = [ipaddress.ip_network(each) for each in trusted]
        self._is_trusted = lru_cache(maxsize=256)(self._look_up)

    def client(self, peer: str, forwarded_for: str) -> str:
        """Return the client's address; one of IPv6 as its network of 64 bits, which is one customer's."""
        if forwarded_for and self._is_trusted(peer):
            last = forwarded_for.rpartition(",")[2].strip()
            told = _parsed(last)
            if told is not None:
                return _grouped(told)
        own = _parsed(peer)
        return peer if own is None else _grouped(own)

    def _look_up(self, peer: str) -> bool:
        """A peer without an address came through a Unix socket, which only a proxy on this machine can."""
        if not peer:
            return True
        address = _parsed(peer)
        return address is not None and any(address in network for network in self._trusted)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _grouped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
