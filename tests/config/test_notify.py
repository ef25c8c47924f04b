"""The notification protocol: whom to tell, and that telling never waits and never raises."""

import socket

import pytest

from config import notify
from config.notify import Notifier


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(10)
        yield made


def test_lines_go_to_a_path_as_one_datagram_and_cannot_be_forged(listener):
    assert Notifier(listener.getsockname()).send("STATUS=a\nREADY=1", "WATCHDOG=1")
    assert listener.recv(1000) == b"STATUS=a READY=1\nWATCHDOG=1"


def test_names_of_the_abstract_namespace_are_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel chooses a name there
        listener.settimeout(10)
        assert Notifier("@" + listener.getsockname()[1:].decode()).send("READY=1")
        assert listener.recv(1000) == b"READY=1"


def test_a_full_socket_is_told_and_nobody_waits(listener):
    notifier = Notifier(listener.getsockname())
    sent = 0
    while notifier.send("READY=1"):
        sent += 1
        assert sent < 100_000
    listener.recv(1000)
    assert notifier.send("READY=1")


def test_nobody_there_is_no_error(tmp_path):
    assert not Notifier(str(tmp_path / "none")).send("READY=1")
    assert not Notifier("/" + "x" * 300).send("READY=1")
    assert Notifier().send("READY=1")


def test_taking_leaves_nothing_for_children_and_handing_over_gives_it_back():
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "7", "HOME": "/"}
    notifier = notify.take(environ, 7)
    assert (notifier, environ) == (Notifier("/run/n", 60.0), {"HOME": "/"})
    notifier.hand_over(environ, 8)
    assert notify.take(environ, 8) == notifier


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Notifier()),
        ({"NOTIFY_SOCKET": "vsock:2:3"}, Notifier()),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "6", "WATCHDOG_PID": "99"}, Notifier("/n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"}, Notifier("/n")),
    ],
)
def test_what_is_meant_for_others_or_is_no_number_is_not_ours(variables, wanted):
    assert notify.take(dict(variables), 7) == wanted
