"""How many processors this process may keep busy."""

import math
import os
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Return how many processors are worth a thread: those of the affinity mask, as far as no quota forbids their use.

    A quota (systemd's ``CPUQuota=``, Docker's ``--cpus``) stops all threads of a process together once it is used up;
    more threads than it allows for wait for each other then. Read from cgroup v2 (kernel manual, "cpu.max").
    """
    return max(1, min(len(os.sched_getaffinity(0)), *map(_quota, _files(cgroups, own))))


def _files(cgroups: Path, own: Path) -> list[Path]:
    """Return the quota files of this process's group and of all groups around it, the outermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    inner = PurePosixPath(path.lstrip("/"))
    return [cgroups / group / "cpu.max" for group in (*reversed(inner.parents), inner)]


def _quota(file: Path) -> int:
    """Return the processors that ``file`` allows, rounded up; many where it sets no limit or is not there."""
    try:
        quota, period = file.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        # "max" is no number, either.
        return 1 << 16
