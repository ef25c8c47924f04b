"""nginx with the shipped config/nginx.conf, in front of a service under test.

Debian's own package is used: what is installed, or else the package unpacked into the virtual environment
(`tests.debian`).
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from config.sources import ROOT
from tests.debian import NGINX
from tests.lifeline import tied

# The sample's limits for each client; one client of ours is a hundred.
_LIMITS = (
    (r"rate=\d+r/[sm]", "rate=100000r/s"),
    (r"burst=\d+", "burst=10000"),
    (r"(limit_conn\s+\w+)\s+\d+", r"\1 10000"),
)
_MAIN = """
daemon off;
{user}
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log notice;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def program() -> str | None:
    """Return the path of an nginx that can be run, or None."""
    return NGINX.path()


class Nginx:
    """A running nginx on ``port`` that passes everything on to ``upstream_port``.

    ``limited`` leaves the sample's limits for each client as they are; ``changes`` are made to the sample's text, each
    from a regular expression that it must have.
    """

    def __init__(
        self,
        binary: str,
        port: int,
        upstream_port: int,
        *,
        limited: bool = False,
        changes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.port = port
        self._folder = Path(tempfile.mkdtemp(prefix="tailrace-nginx-"))
        site = (ROOT / "config" / "nginx.conf").read_text()
        site, upstreams = re.subn(r"(\bserver\s+127\.0\.0\.1:)\d+;", rf"\g<1>{upstream_port};", site)
        site, listens = re.subn(r"\blisten 80;", f"listen 127.0.0.1:{port};", site)
        assert (upstreams, listens) == (1, 1)
        for pattern, wanted in () if limited else _LIMITS:
            site = re.sub(pattern, wanted, site)
        for pattern, wanted in changes.items():
            site, found = re.subn(pattern, wanted, site)
            assert found, pattern
        (self._folder / "site.conf").write_text(site)
        user = "user root;" if os.getuid() == 0 else ""
        (self._folder / "nginx.conf").write_text(_MAIN.format(folder=self._folder, user=user))
        self.process = subprocess.Popen(
            tied([binary, "-p", str(self._folder), "-e", str(self._folder / "error.log"), "-c", "nginx.conf"]),
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "stderr").open("wb"),
            start_new_session=True,
        )
        deadline = time.monotonic() + 20
        while not (self._folder / "pid").exists() or not (self._folder / "pid").read_text().strip():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    @property
    def log(self) -> str:
        """What nginx has said."""
        names = ("stderr", "error.log")
        return "".join((self._folder / name).read_text() for name in names if (self._folder / name).exists())

    def reload(self) -> None:
        """What ``nginx -s reload`` does."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Leave nothing behind."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
