"""The private directory in which the processes of one instance meet."""

import os
import stat
from pathlib import Path

from config.settings import ConfigError

# sockaddr_un holds 108 bytes with the final NUL on Linux, 104 elsewhere.
_LONGEST_SOCKET_PATH = 100


def make_private(path: Path) -> None:
    """Create ``path`` with mode 0700, or make sure that an existing one is ours alone. Raises `ConfigError`.

    Whoever can write there could pose as the pool, and a predictable name under /tmp may be taken by somebody else.
    """
    if len(os.fsencode(path / "pool.sock")) > _LONGEST_SOCKET_PATH:
        raise ConfigError(f"--runtime_dir: {path}: too long for a Unix socket's path")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"--runtime_dir: {path}: is not a directory")
        if found.st_uid != os.getuid():
            raise ConfigError(f"--runtime_dir: {path}: belongs to another user")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    except FileExistsError as error:
        raise ConfigError(f"--runtime_dir: {path}: is not a directory") from error
    except OSError as error:
        raise ConfigError(f"--runtime_dir: {path}: {error.strerror}") from error
