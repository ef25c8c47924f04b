"""Programs out of Debian's packages, unpacked into the virtual environment: no root needed, nothing installed.

apt is given lists and a cache of its own. ``python -m tests.debian`` fetches all of them (make test does); what cannot
be had is told on a line, and the tests that want it are skipped, or fail where CI=true and there is an apt-get.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(sys.prefix)
_DEADLINE_S = 300


@dataclass(frozen=True, slots=True)
class Program:
    """A program by its names, the first that is found counts, and where its package has it, below the root.

    With ``libraries`` the packages that it needs and this machine has not are fetched too, less those whose names match
    ``needless``.
    """

    package: str
    names: tuple[str, ...]
    place: str
    libraries: bool = False
    needless: re.Pattern[str] = field(default_factory=lambda: re.compile("(?!)"))

    @property
    def root(self) -> Path:
        """The folder that its packages are unpacked into."""
        return FOLDER / self.package

    def path(self) -> str | None:
        """Return the path of one that can be run: the machine's own, or the unpacked one."""
        paths = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"
        found = (shutil.which(name, path=paths) for name in self.names)
        return next(filter(None, found), None) or shutil.which(str(self.root / self.place))

    @property
    def may_be_missing(self) -> bool:
        """Whether its tests may be skipped: not in CI, where they have to show something, if apt-get could fetch it."""
        return os.environ.get("CI", "").lower() not in ("1", "true") or shutil.which("apt-get") is None

    def environ(self) -> dict[str, str]:
        """Return what the unpacked one must be told of its libraries and fonts; nothing for the machine's own."""
        if self.path() != str(self.root / self.place):
            return {}
        places = {found.parent for found in self.root.glob("**/*-linux-gnu*/**/*.so*")}
        libraries = [str(each) for each in sorted(places)]
        given = {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}
        if (self.root / "etc" / "fonts").is_dir():
            given["FONTCONFIG_SYSROOT"] = str(self.root)
        return given


NGINX = Program("nginx", ("nginx",), "usr/sbin/nginx")
PROMTOOL = Program("prometheus", ("promtool",), "usr/bin/promtool")
# What draws on a screen, and the tools of a desktop, are of no use to a browser without either.
BROWSER = Program(
    "chromium-headless-shell",
    ("chromium-headless-shell", "chromium"),
    "usr/lib/chromium/chromium-headless-shell",
    libraries=True,
    needless=re.compile(r"x11-utils|xdg-utils|libllvm\d+|libz3-4|libgl1|libgl1-mesa-dri|libglx.*|libdrm-\w+\d"),
)
PROGRAMS = (NGINX, PROMTOOL, BROWSER)


class CannotFetch(Exception):
    """apt or dpkg could not do it; the text says why, on one line."""


def fetch(programs: Sequence[Program]) -> dict[Program, str]:
    """Unpack the packages of ``programs``; return which could not be had, and why, on a line."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return dict.fromkeys(programs, "there is no apt-get here")
    problems = {}
    with tempfile.TemporaryDirectory() as folder:
        for each in ("lists/partial", "cache/archives/partial"):
            (Path(folder) / each).mkdir(parents=True)
        try:
            _apt(folder, "update")
        except CannotFetch as problem:
            return dict.fromkeys(programs, str(problem))
        for program in programs:
            try:
                _unpack(folder, program)
            except (CannotFetch, OSError) as problem:
                problems[program] = str(problem)
    return problems


def _unpack(folder: str, program: Program) -> None:
    into = Path(folder) / f"{program.package}.root"
    _apt(folder, "download", program.package, *(_missing(folder, program) if program.libraries else []))
    for archive in sorted(Path(folder).glob("*.deb")):
        _run(folder, "dpkg", "-x", str(archive), str(into))
        archive.unlink()
    if not program.libraries:
        # Configuration and documentation are not wanted.
        _keep_only(into, program.place)
    # All of it or nothing: who was interrupted begins anew.
    shutil.rmtree(program.root, ignore_errors=True)
    shutil.move(into, program.root)


def _keep_only(root: Path, place: str) -> None:
    aside = root.with_suffix(".kept")
    (aside / place).parent.mkdir(parents=True)
    shutil.move(root / place, aside / place)
    shutil.rmtree(root)
    aside.rename(root)


def _missing(folder: str, program: Program) -> list[str]:
    """Return the packages that ``program`` needs and this machine has not."""
    words = ("install", "--yes", "--no-install-recommends", "--print-uris", program.package)
    named = re.findall(r"^'[^']*' ([^_\s]+)_", _apt(folder, *words), re.MULTILINE)
    return [name for name in named if name != program.package and not program.needless.fullmatch(name)]


def _apt(folder: str, *words: str) -> str:
    command = ["apt-get", "-qq", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    command += ["-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=3"]
    command += ["-o", f"APT::Sandbox::User={'root' if os.getuid() == 0 else ''}"]
    return _run(folder, *command, *words)


def _run(folder: str, *command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        raise CannotFetch(f"{command[0]} took longer than {_DEADLINE_S} s") from None
    if done.returncode:
        raise CannotFetch(f"{command[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


if __name__ == "__main__":
    for missing, reason in fetch([program for program in PROGRAMS if program.path() is None]).items():
        print(f"tailrace: no {missing.package} for the tests that use it: {reason}", file=sys.stderr)
