"""Write the tables of fields in docs/api.md and README.md anew: ``python -m app.api.reference [--check] [FILE...]``."""

import sys
from pathlib import Path

from app.api.reference.tables import filled

FILES = ("docs/api.md", "README.md")


def main(arguments: list[str]) -> int:
    """Return 0, or 1 with ``--check`` if a file is not up to date."""
    check = "--check" in arguments
    stale = 0
    for name in [each for each in arguments if not each.startswith("--")] or FILES:
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if not check:
            path.write_text(after, encoding="utf-8")
        elif after != before:
            print(f"{path} is not up to date: make api-docs", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
