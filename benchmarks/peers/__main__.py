"""Installs the peers that are missing: `make peers`, or ``python -m benchmarks.peers [NAME...] [--again]``."""

import argparse
import os
import sys

from benchmarks.peers import LLAMA, TRANSFORMERS, VLLM, WEIGHTS, folder, install

INSTALLERS = {
    "weights": (WEIGHTS, install.weights),
    "llama-server": (LLAMA, install.llama_server),
    "transformers": (TRANSFORMERS, install.transformers),
    "vllm": (VLLM, install.vllm),
}


def main() -> int:
    """Install one peer after the other; one that fails keeps no other from being tried. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which ones (default: all of {', '.join(INSTALLERS)})"
    )
    parser.add_argument("--again", action="store_true", help="also what is installed already")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(INSTALLERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    # Compilers on all cores, but behind whatever else the machine has to do.
    os.nice(10)
    failed = []
    for name in arguments.names or INSTALLERS:
        place, install_it = INSTALLERS[name]
        if place.version and not arguments.again:
            print(f"{name}: {place.version} is in {place.path}", flush=True)
            continue
        print(f"{name}: installing into {place.path}", flush=True)
        try:
            install_it()
        except Exception as error:
            failed.append(name)
            print(f"{name}: not installed: {error or type(error).__name__}", file=sys.stderr, flush=True)
    print(f"peers in {folder()}; not installed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
