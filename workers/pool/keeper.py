"""The arbiter's side of the pool: start it, notice its death, bring it back, stop it.

Runs inside gunicorn's arbiter, which forks HTTP workers: so nothing but the standard library, no thread, nothing that
waits. Liveness is a socket's end, never a pid: the arbiter collects every child's exit status by itself.
"""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from config import keys
from workers.pool.bulletin import Bulletin

if TYPE_CHECKING:
    from config import logs

ROOT = Path(__file__).resolve().parent.parent.parent

# What starts a pool; "--lifeline FD" is added. Safe path (-P): a folder named "workers" where the operator happens to
# stand is not ours.
POOL_COMMAND = [sys.executable, "-P", "-m", "workers"]

# How a re-executed arbiter (USR2) gets to know the pool of its predecessor: "descriptor,pid".
HANDOVER_VARIABLE = "_TAILRACE_LIFELINE"

# A pool that gives up says with which exit code, and why.
_LAST_WORDS = re.compile(r"FATAL (\d) (.*)")

_HELD_SIGNALS = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}


class PoolGaveUp(Exception):
    """The pool has ended, and another one would do no better now; the text says why. ``code`` is its exit code."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Process(Protocol):
    """What the keeper needs of a started pool."""

    @property
    def pid(self) -> int: ...


def start_process(command: Sequence[str], lifeline: int) -> Process:
    """Start ``command`` with the descriptor ``lifeline`` and no other: above all without the listening socket.

    Signals to the group are held back until the pool has said what it thinks of them.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        return subprocess.Popen(
            [*command, "--lifeline", str(lifeline)],
            pass_fds=[lifeline],
            stdin=subprocess.DEVNULL,
            env=_without_keys()
            | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _without_keys() -> dict[str, str]:
    environ = dict(os.environ)
    keys.forget(environ)
    return environ


class PoolKeeper:
    """Makes sure that a pool listens at ``socket_path``.

    A pool that it did not start (a unit of its own) is left alone and only watched. With ``launch`` False it never
    starts one.
    """

    backoff_first_s = 1.0
    backoff_longest_s = 60.0
    steady_s = 60.0
    # The pool says how it is about each second. After so long it counts as stuck, and after so long it is killed.
    stale_s = 10.0
    silent_s = 30.0
    # Its first word comes when its settings are checked and its socket is there; one that says none is killed as well.
    first_word_s = 120.0
    # If the arbiter itself was not run for so long (all was stopped and goes on), silence proves nothing.
    pause_s = 5.0

    def __init__(
        self,
        socket_path: Path,
        log: "logs.Logger",
        *,
        launch: bool = True,
        command: Sequence[str] | None = None,
        start: Callable[[Sequence[str], int], Process] = start_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket_path = socket_path
        self._log = log
        self._launch = launch
        self._command = list(POOL_COMMAND if command is None else command)
        self._start = start
        self._clock = clock
        # While the arbiter that handed the pool over (USR2) still lives, what the pool says is for that one.
        self.listens = True
        self._lifeline: socket.socket | None = None
        self._process: Process | None = None
        self._pid: int | None = None
        self._foreign: socket.socket | None = None
        self._heard = b""
        self._gave_up: PoolGaveUp | None = None
        self._bulletin: Bulletin | None = None
        self._heard_at = 0.0
        self._tended_at = clock()
        self._started_at = 0.0
        self._deaths = 0
        self._next_start = 0.0
        self._adopt()

    @property
    def pid(self) -> int | None:
        """The pid of our own pool while it lives."""
        return self._pid

    def tend(self) -> None:
        """Look after the pool; returns at once. Raises `PoolGaveUp` if it has ended for good."""
        now = self._clock()
        if now - self._tended_at > self.pause_s:
            self._heard_at = now
        self._tended_at = now
        if self._lifeline is not None:
            self._listen()
            if self._lifeline is not None:
                self._end_if_silent()
                return
        if self._foreign_listens() or not self._launch or self._clock() < self._next_start:
            return
        self._start_pool()

    def bulletin(self) -> Bulletin:
        """Return what there is to say of the pool."""
        now = self._clock()
        if self._lifeline is None:
            if self._foreign is not None:
                return Bulletin(f"ready: a pool of its own listens at {self._socket_path}", ready=True)
            if not self._launch:
                return Bulletin(f"no pool listens at {self._socket_path}: requests are answered 503")
            return Bulletin(f"the pool died; next start in {max(0.0, self._next_start - now):.0f} s")
        if self._bulletin is None:
            again = " again after its death" if self._deaths else ""
            return Bulletin(f"starting the pool{again}", moving=now - self._started_at < self.first_word_s)
        if now - self._heard_at > self.stale_s:
            return Bulletin(f"the pool has said nothing for {now - self._heard_at:.0f} s", moving=False)
        if self._deaths:
            return replace(self._bulletin, text=f"{self._bulletin.text}; the pool died and was started again")
        return self._bulletin

    def stop(self, seconds: float) -> None:
        """Let go of our own pool and wait for its end; kill it after ``seconds``."""
        self._close_foreign()
        if self._lifeline is None or self._pid is None:
            return
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            self._wait_for_word(left)
            if self._ended():
                break
        else:
            # Its end of the socket is still open, so the pid is still its own.
            self._log.error("the pool does not stop: killing it", pool_pid=self._pid, seconds=seconds)
            os.kill(self._pid, signal.SIGKILL)
            self._wait_for_word(1.0)
        self._lifeline.close()
        self._collect(self._pid, deadline + 1.0)
        self._lifeline, self._process, self._pid = None, None, None

    def _wait_for_word(self, seconds: float) -> None:
        assert self._lifeline is not None
        # Not select(), which knows no descriptor beyond 1,023.
        word = select.poll()
        word.register(self._lifeline, select.POLLIN)
        word.poll(seconds * 1000)

    def abandon(self) -> None:
        """Forget the pool; for a forked HTTP worker, whose copy of the lifeline would keep the pool from its end."""
        if self._lifeline is not None:
            self._lifeline.close()
        self._close_foreign()
        self._lifeline, self._process, self._pid, self._launch = None, None, None, False

    def reload(self) -> None:
        """Let our own pool read again how to log; nothing else of it can change while it lives."""
        if self._lifeline is not None and self._pid is not None and not self._ended():
            # Its end of the socket is still open, so the pid is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGHUP)

    def hand_over(self, environ: dict[str, str]) -> None:
        """Prepare the arbiter's successor (it is about to be executed in this very process) to take over the pool."""
        if self._lifeline is not None:
            self._lifeline.set_inheritable(True)
            environ[HANDOVER_VARIABLE] = f"{self._lifeline.fileno()},{self._pid}"

    # --- our own pool -------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the pool that a predecessor has handed over, if any."""
        descriptor, _, pid = os.environ.pop(HANDOVER_VARIABLE, "").partition(",")
        if descriptor and pid:
            self._lifeline = socket.socket(fileno=int(descriptor))
            self._lifeline.set_inheritable(False)
            self._lifeline.setblocking(False)
            self._pid = int(pid)
            self._started_at = self._clock()
            self._log.info("took over the pool", pool_pid=self._pid)

    def _start_pool(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = self._start(self._command, theirs.fileno())
        except OSError as error:
            ours.close()
            self._log.error("cannot start the pool", reason=str(error))
            self._back_off()
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._lifeline, self._pid = ours, self._process.pid
        self._heard, self._gave_up, self._bulletin = b"", None, None
        self._started_at = self._clock()
        self._log.info("started the pool", pool_pid=self._pid)

    def _listen(self) -> None:
        """Read what the pool says: how it is, its last line, its end."""
        if not self._ended():
            return
        assert self._lifeline is not None
        self._lifeline.close()
        self._lifeline, self._process, self._pid = None, None, None
        if self._gave_up is not None:
            raise self._gave_up
        if self._clock() - self._started_at >= self.steady_s:
            self._deaths = 0
        self._back_off()

    @staticmethod
    def _collect(pid: int, deadline: float) -> None:
        """Wait until the process is really gone; the arbiter, or nobody, may have collected it before us."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.01)

    def _ended(self) -> bool:
        """Whether the pool's end of the lifeline is closed; takes in what came before."""
        assert self._lifeline is not None
        if not self.listens:
            poll = select.poll()
            poll.register(self._lifeline, select.POLLRDHUP)
            return bool(poll.poll(0))
        try:
            while data := self._lifeline.recv(4096):
                self._take_in(data)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def _take_in(self, data: bytes) -> None:
        *lines, self._heard = (self._heard + data)[-65536:].split(b"\n")
        for line in (each.decode(errors="replace") for each in lines):
            if found := _LAST_WORDS.fullmatch(line):
                self._gave_up = PoolGaveUp(found[2], int(found[1]))
            elif bulletin := Bulletin.parse(line):
                self._bulletin, self._heard_at = bulletin, self._clock()
                if self._deaths and bulletin.ready and self._clock() - self._started_at >= self.steady_s:
                    self._deaths = 0

    def _end_if_silent(self) -> None:
        """Kill a pool that hangs: it would have said something."""
        now = self._clock()
        if not self.listens:
            self._heard_at = now  # what it said was for another one
        silence = now - max(self._heard_at, self._started_at)
        if silence <= (self.first_word_s if self._bulletin is None else self.silent_s):
            return
        assert self._pid is not None
        self._log.error("the pool says nothing: killing it", pool_pid=self._pid, seconds=silence)
        self._heard_at = self._clock()
        # Its end of the socket is still open, so the pid is still its own.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def _back_off(self) -> None:
        """The first death after a steady time is followed by a start at once, further ones by growing pauses."""
        pause = 0.0
        if self._deaths:
            pause = min(self.backoff_longest_s, self.backoff_first_s * 2 ** min(self._deaths - 1, 30))
        self._deaths += 1
        self._next_start = self._clock() + pause
        self._log.error("the pool is dead", next_start_s=pause)

    # --- somebody else's ----------------------------------------------------------------------------------------------

    def _foreign_listens(self) -> bool:
        """Whether a pool that we did not start listens: then there is a connection to it, held to see its end."""
        if self._foreign is None:
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            probe.setblocking(False)
            try:
                probe.connect(str(self._socket_path))
            except BlockingIOError:
                probe.close()
                return True  # its backlog is full, so it exists
            except OSError:
                probe.close()
                return False
            self._foreign = probe
            self._log.info("a pool of its own listens", path=str(self._socket_path))
        try:
            while self._foreign.recv(65536):
                pass
        except BlockingIOError:
            return True
        except OSError:
            pass
        self._log.error("the pool is gone", path=str(self._socket_path))
        self._close_foreign()
        return False

    def _close_foreign(self) -> None:
        if self._foreign is not None:
            self._foreign.close()
            self._foreign = None
