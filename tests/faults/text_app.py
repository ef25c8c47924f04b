"""The real application, with one URL more: GET /spin never comes back, and lets nothing else of its process run.

It cannot be loaded while the file ``broken`` is in the cache directory.
"""

from collections.abc import Iterable
from typing import Any

from app import Application, create_app
from config.settings import load


class Spinning(Application):
    """See the module's text."""

    def wsgi_app(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        while environ["PATH_INFO"] == "/spin":
            pass
        return super().wsgi_app(environ, start_response)  # type: ignore[no-any-return]


def application() -> Application:
    """As ``app:create_app()``."""
    if (load().cache_dir / "broken").exists():
        raise RuntimeError("broken as told")
    made = create_app()
    made.__class__ = Spinning
    return made
