"""Fuzzes with atheris: ``python -m tests.fuzz.run [--minutes N] [HARNESS...]``, one process for each harness in turn.

A finding is kept as a file crash-... in the directory that is named at the end; give the file to --replay HARNESS FILE,
and make a unit test of it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import seeds

NAMES = ("gate", "schemas", "replies", "sse", "wire", "stops", "detokenizer")


def fuzz(name: str, options: list[str]) -> None:
    """Run atheris in this process; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["app", "workers", "config", "tests.fuzz"]):
        from tests.fuzz.harnesses import HARNESSES

    atheris.Setup([sys.argv[0], *options], HARNESSES[name])
    atheris.Fuzz()


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--minutes", type=float, default=5.0, help="for each harness")
    reader.add_argument("--replay", nargs=2, metavar=("HARNESS", "FILE"))
    reader.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    reader.add_argument("names", nargs="*", metavar="HARNESS", help=", ".join(NAMES))
    asked = reader.parse_args()
    if asked.inside:
        fuzz(asked.inside[0], asked.inside[1:])
    if asked.replay:
        from tests.fuzz.harnesses import HARNESSES

        HARNESSES[asked.replay[0]](Path(asked.replay[1]).read_bytes())
        return 0
    unknown = set(asked.names) - set(NAMES)
    if unknown:
        reader.error(f"no such harness: {', '.join(sorted(unknown))}")
    failed = []
    found = Path(tempfile.mkdtemp(prefix="tailrace-fuzz-"))
    for name in asked.names or NAMES:
        corpus = found / f"corpus-{name}"
        corpus.mkdir()
        for number, data in enumerate(seeds(name)):
            (corpus / f"seed-{number}").write_bytes(data)
        options = [f"-max_total_time={asked.minutes * 60:.0f}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=4096"]
        options += [f"-artifact_prefix={found}/{name}-", "-print_final_stats=1", str(corpus)]
        print(f"--- {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.fuzz.run", "--inside", name, *options]).returncode:
            failed.append(name)
    print(f"findings: {', '.join(failed) or 'none'}; {found}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
