"""A bell wakes whoever waits, once, in time, and only them."""

import time
from collections.abc import Callable, Iterator

import gevent
import pytest

from app.bell import Bell
from tests.app.scripted_pool import eventually


@pytest.fixture
def bell() -> Iterator[Bell]:
    made = Bell()
    yield made
    made.close()


def timed(wait: Callable[[], None]) -> float:
    """Seconds that ``wait`` took."""
    begun = time.monotonic()
    wait()
    return time.monotonic() - begun


def test_ringing_wakes_who_waits_and_never_switches(bell: Bell) -> None:
    waiting = gevent.spawn(bell.wait)
    gevent.sleep(0)
    bell.ring()
    bell.ring()
    assert not waiting.dead
    waiting.join(60)
    assert waiting.dead


def test_ringing_for_nobody_is_not_kept(bell: Bell) -> None:
    bell.ring()
    assert timed(lambda: bell.wait(0.05)) >= 0.05


@pytest.mark.parametrize("timeouts", [[0.05, 0.05], [5.0, 0.05], [0.02, 0.08], [0.0, 0.05], [None, 0.05]])
def test_each_wait_has_its_own_timeout_whatever_the_timer_was_set_for(bell: Bell, timeouts: list[float | None]) -> None:
    first, second = timeouts
    if first is None or first > 1:
        gevent.spawn_later(0.01, bell.ring)
        assert timed(lambda: bell.wait(first)) < 4
    else:
        assert first <= timed(lambda: bell.wait(first)) < 4
    assert second is not None
    assert second <= timed(lambda: bell.wait(second)) < 4


def test_a_timer_that_is_left_over_wakes_nobody(bell: Bell) -> None:
    gevent.spawn_later(0.01, bell.ring)
    bell.wait(0.05)
    gevent.spawn_later(0.2, bell.ring)
    assert timed(bell.wait) >= 0.15


def test_a_greenlet_can_be_killed_while_it_waits(bell: Bell) -> None:
    killed = gevent.spawn(bell.wait, 5.0)
    gevent.sleep(0)
    bell.ring()
    killed.kill()
    assert killed.dead
    waiting = gevent.spawn(bell.wait)
    gevent.sleep(0)
    bell.ring()
    eventually(lambda: waiting.dead)
