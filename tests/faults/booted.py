"""A systemd of its own, booted for a test: root's, in namespaces, on a throw-away copy of this machine's files.

``python -m tests.faults.booted ROOT FOLDER`` is what runs first inside the namespaces: it lays an overlay over the
machine's root in FOLDER, installs the project (ROOT) to /opt/tailrace there, and becomes systemd.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.lifeline import tied

_SYSTEMD = Path("/lib/systemd/systemd")
# What would change the kernel, the machine's devices or its clock, which the namespaces do not keep apart.
_MASKED = [
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-binfmt.service",
    "systemd-remount-fs.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-update-utmp.service",
    "systemd-random-seed.service",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-timesyncd.service",
    "systemd-hwdb-update.service",
    "systemd-journald-audit.socket",
    "systemd-tmpfiles-setup.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-boot-system-token.service",
    "proc-sys-fs-binfmt_misc.automount",
    "proc-sys-fs-binfmt_misc.mount",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "tmp.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "network-online.target",
]
_UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"]


def why_not() -> str | None:
    """Return why no systemd can be booted here, or None."""
    if not _SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return "only root can boot a systemd"
    script = "mount --make-rprivate / && mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/o && "
    script += "mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w o /mnt/o && mount -t cgroup2 c /mnt/o/mnt"
    done = subprocess.run([*_UNSHARE, "sh", "-c", script], capture_output=True, text=True)
    return f"no overlay or no cgroup2 in a namespace: {done.stderr.strip()}" if done.returncode else None


class Machine:
    """A running systemd with the project's units in place."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tailrace-booted-"))
        (self.folder / "default").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._log = (self.folder / "log").open("wb")
        command = [*_UNSHARE, sys.executable, "-m", "tests.faults.booted", str(root), str(self.folder)]
        self._process = subprocess.Popen(
            tied(command),
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while self.run("systemctl", "is-active", "basic.target")[1].strip() != "active":
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def run(self, *command: str, seconds: float = 120) -> tuple[int, str]:
        """Run a command in there; return its exit code and all it said."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return 1, ""
        enter = ["nsenter", "-t", children[0], "-m", "-p", "-u", "-i", "-C", "-r", "-w"]
        environ = {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "LANG": "C.UTF-8"}
        done = subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=seconds, env=environ, stdin=subprocess.DEVNULL
        )
        return done.returncode, done.stdout + done.stderr

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit)[1].strip()

    def kill(self) -> None:
        """Leave nothing behind: with the first process of the namespace all others go."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def main(project: Path, folder: Path) -> None:
    """Lay out the root and become systemd."""
    root = folder / "root"

    def mount(*words: str | Path) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)

    def overlay(lower: Path, place: Path, layer: Path) -> None:
        for each in (place, layer / "upper", layer / "work"):
            each.mkdir(parents=True, exist_ok=True)
        mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={layer}/upper,workdir={layer}/work", "overlay", place)

    mount("--make-rprivate", "/")
    layers = folder / "layers"
    layers.mkdir()
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", layers)
    overlay(Path("/"), root, layers / "root")
    mount("-t", "proc", "proc", root / "proc")
    mount("-o", "bind,ro", "/proc/sys", root / "proc/sys")
    mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "run")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")
    mount("--rbind", "/dev", root / "dev")
    mount("-t", "cgroup2", "cgroup2", root / "sys/fs/cgroup")
    # /opt/tailrace with a .venv whose interpreter every user may read, wherever the real one is.
    overlay(project, root / "opt/tailrace", layers / "project")
    (root / "opt/python").mkdir(parents=True)
    mount("--bind", sys.base_prefix, root / "opt/python")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = root / "opt/tailrace/.venv"
    for each in ("python", "python3", name):
        (environment / "bin" / each).unlink(missing_ok=True)
        (environment / "bin" / each).symlink_to(f"/opt/python/bin/{name}")
    (environment / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
    # The units, as the operator installs them.
    units = root / "etc/systemd/system"
    for unit in (project / "systemd").glob("*.service"):
        shutil.copy(unit, units)
    for masked in _MASKED:
        (units / masked).unlink(missing_ok=True)
        (units / masked).symlink_to("/dev/null")
    (root / "etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy(project / "systemd/tailrace.sysusers", root / "etc/sysusers.d/tailrace.conf")
    shutil.copy(folder / "default", root / "etc/default/tailrace")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    # Not chroot: in one no user namespace may be made, which PrivateUsers= asks for.
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "."], check=True)
    mount("--make-rprivate", ".")
    subprocess.run(["umount", "-l", "."], check=True)
    os.chdir("/")
    # systemd hands credentials over by a mount that a child makes; it relies on seeing it.
    mount("--make-rshared", "/")
    arguments = [str(_SYSTEMD), "--system", "--unit=basic.target", "--log-target=journal-or-kmsg"]
    os.execve(_SYSTEMD, arguments, {"container": "tailrace-test", "PATH": "/usr/bin:/usr/sbin:/bin:/sbin"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
