"""systemd's notification protocol: datagrams of ``NAME=value`` lines to the socket that ``NOTIFY_SOCKET`` names.

See sd_notify(3). Only the service's main process sends, so whoever is that takes the variables out of its environment:
children that find them there, libraries among them, would say things that are not theirs to say.
"""

import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Notifier:
    """Where to send: ``address`` is a path, "@" and a name in the abstract namespace, or "" for nobody.

    ``watchdog_s``: systemd ends the service if it hears no WATCHDOG=1 for so many seconds; 0: it does not.
    """

    address: str = ""
    watchdog_s: float = 0.0

    def send(self, *lines: str) -> bool:
        """Send ``lines``; never waits, never raises. False if the manager has no room for them now: try again."""
        if not self.address:
            return True
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        message = "\n".join(map(_one_line, lines)).encode("utf-8", "replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                return sender.sendto(message, socket.MSG_DONTWAIT, address) == len(message)
        except (OSError, ValueError):
            return False

    def hand_over(self, environ: MutableMapping[str, str], pid: int) -> None:
        """Put the variables into the environment of the process ``pid``, which is going to be the main one."""
        if self.address:
            environ["NOTIFY_SOCKET"] = self.address
        if self.address and self.watchdog_s:
            environ.update(WATCHDOG_USEC=microseconds(self.watchdog_s), WATCHDOG_PID=str(pid))


def take(environ: MutableMapping[str, str], pid: int) -> Notifier:
    """Return whom the process ``pid`` shall notify, and take the variables out of ``environ``."""
    notifier = _read(environ, pid)
    forget(environ)
    return notifier


def forget(environ: MutableMapping[str, str]) -> None:
    """For a process that has nothing to say to systemd: take the variables out of ``environ``."""
    for name in _VARIABLES:
        environ.pop(name, None)


def microseconds(seconds: float) -> str:
    """Return a time as the protocol writes it."""
    return str(round(seconds * _MICROSECONDS))


def _read(environ: Mapping[str, str], pid: int) -> Notifier:
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return Notifier()
    ours = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
    interval = environ.get("WATCHDOG_USEC", "")
    return Notifier(address, int(interval) / _MICROSECONDS if ours and interval.isdecimal() else 0.0)


def _one_line(line: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in line)
