"""Runs the compiled step under sanitizers, for the test that starts this as a process with their libraries loaded.

Prints "done" when nothing was found; a finding ends the process with an error.
"""

import os
from unittest import mock

import torch

from tests.workers.engine.native.products import kernels_with
from tests.workers.engine.native.rig import FORMATS, NAMES, Driver, native_step, odd_model, random_ids
from tests.workers.engine.native.test_adapters import ADAPTERS, adapted
from workers.engine.native import library

FLAGS = (
    *(flag for flag in library.FLAGS if not flag.startswith("-O")),
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)


def main() -> None:
    # The compiler is not to run under them.
    os.environ.pop("LD_PRELOAD", None)
    lib = kernels_with(FLAGS)
    with mock.patch.object(library, "load", return_value=lib):
        for name in NAMES:
            model = odd_model(name)
            for form in FORMATS:
                with native_step(model, form, 2) as step:
                    run(Driver(step), model)
        model = adapted("llama-3-to-1")
        for form in ("float32", "bfloat16"):
            with native_step(model, form, 2, adapters=list(ADAPTERS)) as step:
                run(Driver(step), model, *ADAPTERS)
    print("done")


def run(driver: Driver, model: object, *adapters: str) -> None:
    """Prompts in slices beside decoding rows and embeddings, over more than one stretch of attention."""
    for n, length in enumerate((140, 70, 1, 33)):
        adapter = adapters[n] if n < len(adapters) else ""
        driver.add(str(n), random_ids(model, length, seed=n), embedding=n == 3, adapter=adapter)
    driver.compute(("0", 120), ("2", 1), ("3", 13))
    driver.compute(("0", 7), ("1", 69), ("3", 20))
    driver.compute(("1", 1), ("0", 13))
    assert torch.isfinite(driver.logits("0")).all()


if __name__ == "__main__":
    main()
