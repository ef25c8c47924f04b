"""The same sources compiled for other processors, and with the compiler's own checks of memory and arithmetic."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.engine.native.products import PROCESSORS, kernels, processor_of_steps
from tests.workers.engine.native.rig import FORMATS, NAMES, Driver, native_step, odd_model, random_ids, shared_model

ROOT = Path(__file__).parents[4]
OTHERS = sorted(set(PROCESSORS) - {"this"})


@pytest.mark.parametrize("processor", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_differ_by_rounding_only(processor: str, name: str) -> None:
    """Sums of some hundred products in another order: some units of 2^-24 each, magnified by two layers."""
    model = shared_model(name)
    ids = random_ids(model, 150)
    with native_step(model) as step:
        expected = Driver(step).alone(ids)
    with processor_of_steps(processor), native_step(model, threads=2) as step:
        got = Driver(step).alone(ids, [90, 1, 59])
    assert (got - expected).abs().max() < 2e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("processor", OTHERS)
@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"float32"}))
def test_rounded_logits_are_close(processor: str, form: str) -> None:
    """The last bit of a sum decides now and then between two steps of the rounding that follows: 1/127 of a group's
    largest input for codes, 1/256 of a number for bfloat16, averaged over the 96 inputs of each product. On a model
    whose layers do not magnify that.
    """
    model = odd_model("llama-3-to-1", initializer_range=0.05)
    ids = random_ids(model, 100)
    with native_step(model, form) as step:
        expected = Driver(step).alone(ids)
    with processor_of_steps(processor), native_step(model, form, 2) as step:
        got = Driver(step).alone(ids, [60, 1, 39])
    error = (got - expected).square().mean(dim=-1).sqrt() / expected.std()
    assert error.max() < 0.02
    alike = kernels().test_rounds_to_bf16() == kernels(processor).test_rounds_to_bf16()
    if form != "bfloat16" and alike:
        # Whole numbers are added up between the roundings: before the first that falls on the other side all is equal.
        # But for the matrix whose rows are no groups: bfloat16 here, which some processors round their inputs for.
        assert error[0] < 1e-4


def test_nothing_reads_or_writes_beyond_its_memory() -> None:
    """Under the address and undefined behaviour sanitizers, in a process of its own."""
    libraries = [_library_of_compiler(name) for name in ("libasan.so", "libubsan.so")]
    if not all(libraries):
        pytest.skip("the compiler has no sanitizers")
    # The interpreter does not free everything at its end.
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.workers.engine.native.sanitized"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "runtime error" not in result.stderr
    assert result.stdout.split()[-1] == "done"


def _library_of_compiler(name: str) -> str:
    if platform.system() != "Linux":
        return ""
    try:
        found = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    path = found.strip()
    return path if Path(path).is_absolute() else ""
