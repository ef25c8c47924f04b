"""Packing and products of the compiled kernels, against numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.engine.native.products import ADD, GATE, PROCESSORS, Products, kernels
from tests.workers.engine.native.rig import rounded_to_4_bits
from workers.engine.gguf_codes import rounded
from workers.engine.native import library
from workers.engine.native.weights import GROUP, Codes, interleaved, joined

# Every remainder of blocks of 6 rows (AVX-512) and of 2.
ROW_COUNTS = range(1, 14)
# (outputs, inputs): whole pairs of tiles, less than a tile, a tile and a bit, an odd number of tiles.
SHAPES = [(64, 64), (5, 32), (17, 96), (48, 64), (131, 160)]


@pytest.fixture(params=sorted(PROCESSORS))
def products(request: pytest.FixtureRequest) -> Products:
    """The products of the kernels for this and for other processors."""
    return Products(kernels(request.param))


def randoms(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def random_codes(bits: int, outputs: int, inputs: int, seed: int = 0) -> Codes:
    generator = np.random.default_rng(seed)
    shape = (outputs, inputs // GROUP)
    return Codes(
        bits,
        generator.integers(0, 1 << bits, (outputs, inputs), dtype=np.uint8),
        generator.normal(size=shape).astype(np.float16),
        generator.normal(size=shape).astype(np.float16),
    )


def close(got: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, relative: float) -> bool:
    """Whether each sum is exact but for ``relative`` of the sum of its terms' absolute values."""
    return bool((np.abs(got - expected) <= relative * magnitude + 1e-30).all())


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (16, 16), (33, 50), (40, 7), (131, 64)])
def test_packed_floats_are_read_back_row_by_row(products: Products, shape: tuple[int, int]) -> None:
    weights = randoms(*shape)
    assert np.array_equal(products.unpacked(products.packed(weights)), weights)


@pytest.mark.parametrize("shape", [(1, 2), (16, 16), (33, 50), (131, 64)])
def test_packed_bfloat16_is_read_back_rounded_to_the_nearest(products: Products, shape: tuple[int, int]) -> None:
    weights = randoms(*shape)
    weights.flat[:2] = (1 + 2**-8, 1 + 3 * 2**-8)  # ties
    assert np.array_equal(products.unpacked(products.packed(weights, library.BF16)), as_bfloat16(weights))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_codes_are_read_back(products: Products, bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, *shape)
    # The last bit may differ: C rounds code * scale + minimum once.
    np.testing.assert_allclose(products.unpacked(products.packed(codes)), codes.floats(), rtol=1e-6, atol=1e-6)


def test_values_that_are_no_numbers_survive_packing(products: Products) -> None:
    weights = np.array([[np.nan, np.inf], [-np.inf, -np.nan]], dtype=np.float32)
    for form in (library.F32, library.BF16):
        got = products.unpacked(products.packed(weights, form))
        assert np.array_equal(np.isnan(got), np.isnan(weights))
        assert got[0, 1] == np.inf
        assert got[1, 0] == -np.inf


def test_joined_matrices_stay_codes_only_if_all_are() -> None:
    first, second = random_codes(4, 5, 32), random_codes(4, 3, 32, seed=1)
    both = joined([first, second])
    assert isinstance(both, Codes)
    assert np.array_equal(both.floats(), np.concatenate([first.floats(), second.floats()]))
    mixed = joined([first, second.floats()])
    assert isinstance(mixed, np.ndarray)
    assert np.array_equal(mixed, both.floats())


def test_joined_matrices_of_4_and_8_bits_keep_their_weights(products: Products) -> None:
    first, second = random_codes(4, 5, 32), random_codes(8, 3, 32, seed=1)
    both = joined([first, second])
    assert isinstance(both, Codes)
    np.testing.assert_allclose(
        products.unpacked(products.packed(both)),
        np.concatenate([first.floats(), second.floats()]),
        rtol=1e-6,
        atol=1e-6,
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_rounded_to_the_nearest_of_255_steps_of_their_group(products: Products) -> None:
    rows = randoms(7, 96) * np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None]
    inputs = products.rounded(rows)
    largest = np.abs(rows.reshape(7, 3, GROUP)).max(axis=-1)
    np.testing.assert_allclose(inputs.scales, largest / 127, rtol=1e-6)
    steps = np.repeat(inputs.scales, GROUP, axis=1)
    assert (np.abs(inputs.values - rows) <= steps * 0.5001).all()
    assert (np.abs(inputs.codes).reshape(7, 3, GROUP).max(axis=-1) == 127).all()
    np.testing.assert_allclose(inputs.sums, inputs.values.reshape(7, 3, GROUP).sum(axis=-1), rtol=1e-5, atol=1e-30)


def test_groups_of_zeros_are_zeros(products: Products) -> None:
    inputs = products.rounded(np.zeros((1, 64), dtype=np.float32))
    assert not inputs.codes.any()
    assert not inputs.scales.any()
    assert not inputs.sums.any()


@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-38, 1e-40, 1e-45])
def test_groups_of_tiny_numbers_stay_numbers(products: Products, size: float) -> None:
    rows = np.zeros((1, 64), dtype=np.float32)
    rows[0, :20] = size * randoms(20)
    rows[0, 40] = 1
    got = products.multiply(products.packed(random_codes(8, 16, 64)), rows)
    expected = rows @ random_codes(8, 16, 64).floats().T
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_no_number_makes_every_product_of_its_row_none(products: Products, value: float) -> None:
    rows = randoms(8, 64)
    rows[3, 41] = value
    clean = np.delete(rows, 3, axis=0)
    for weights, form in (
        (randoms(40, 64), library.F32),
        (randoms(40, 64), library.BF16),
        (random_codes(4, 40, 64), 0),
    ):
        matrix = products.packed(weights, form)
        got = products.multiply(matrix, rows)
        assert not np.isfinite(got[3]).any()
        assert np.array_equal(np.delete(got, 3, axis=0), products.multiply(matrix, clean))


# --- products ---------------------------------------------------------------------------------------------------------


def test_float32_products(products: Products) -> None:
    for outputs, inputs in (*SHAPES, (10, 7), (33, 50)):
        weights, rows = randoms(outputs, inputs), randoms(13, inputs, seed=1)
        expected, magnitude = rows.astype(np.float64) @ weights.T, np.abs(rows) @ np.abs(weights.T)
        matrix = products.packed(weights)
        for count in ROW_COUNTS:
            assert close(products.multiply(matrix, rows[:count]), expected[:count], magnitude[:count], 1e-5)


def test_bfloat16_products_are_those_of_the_rounded_numbers(products: Products) -> None:
    for outputs, inputs in (*SHAPES, (33, 50)):
        weights, rows = randoms(outputs, inputs), randoms(13, inputs, seed=1)
        # Where the processor's own bfloat16 products are slow, only the weights are rounded.
        low_weights, low_rows = as_bfloat16(weights), as_bfloat16(rows) if products.rounds_to_bf16 else rows
        expected, magnitude = low_rows.astype(np.float64) @ low_weights.T, np.abs(low_rows) @ np.abs(low_weights.T)
        matrix = products.packed(weights, library.BF16)
        for count in ROW_COUNTS:
            assert close(products.multiply(matrix, rows[:count]), expected[:count], magnitude[:count], 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_products_are_those_of_the_rounded_inputs(products: Products, bits: int) -> None:
    for outputs, inputs in SHAPES:
        codes, rows = random_codes(bits, outputs, inputs), randoms(13, inputs, seed=1)
        values = products.rounded(rows).values
        expected = values @ codes.floats().astype(np.float64).T
        # The terms that are added up are code * scale and minimum, which may cancel each other.
        scales, minima = (np.abs(a).astype(np.float64).repeat(GROUP, axis=1) for a in (codes.scales, codes.minima))
        magnitude = np.abs(values) @ (scales * codes.codes + minima).T
        matrix = products.packed(codes)
        for count in ROW_COUNTS:
            assert close(products.multiply(matrix, rows[:count]), expected[:count], magnitude[:count], 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_products_of_whole_numbers_are_exact(products: Products, bits: int) -> None:
    """All sums fit into float32's 24 bits here, so that nothing may be lost or counted twice."""
    generator = np.random.default_rng(0)
    for outputs, inputs in SHAPES:
        codes = random_codes(bits, outputs, inputs)
        shape = codes.scales.shape
        scales, minima = generator.choice([0.5, 1, 2], shape), generator.integers(-20, 20, shape)
        codes = Codes(bits, codes.codes, scales.astype(np.float16), minima.astype(np.float16))
        rows = generator.integers(-127, 128, (13, inputs)).astype(np.float32)
        # With 127 in each group its inputs are their own codes.
        rows[:, ::GROUP] = 127
        doubled = rows.astype(np.int64) @ (2 * codes.floats()).astype(np.int64).T
        matrix = products.packed(codes)
        for count in ROW_COUNTS:
            assert np.array_equal(2 * products.multiply(matrix, rows[:count]), doubled[:count])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "q4", "q8"])
def test_a_row_is_the_same_to_the_last_bit_in_any_company(products: Products, form: str) -> None:
    weights, rows = randoms(131, 160), randoms(13, 160, seed=1)
    codes = {"q4": rounded_to_4_bits, "q8": rounded}.get(form)
    matrix = products.packed(codes(weights) if codes else weights, library.BF16 if form == "bfloat16" else library.F32)
    alone = np.concatenate([products.multiply(matrix, rows[n : n + 1]) for n in range(13)])
    for count in ROW_COUNTS:
        assert np.array_equal(products.multiply(matrix, rows[:count]), alone[:count])
        assert np.array_equal(products.multiply(matrix, rows[-count:]), alone[-count:])


@pytest.mark.parametrize("make", [rounded_to_4_bits, rounded])
def test_quantised_products_are_close_to_the_float_product(products: Products, make: Any) -> None:
    codes, x = make(randoms(131, 160)), randoms(13, 160, seed=1)
    expected = x @ codes.floats().T
    # Half a step of 1/127 of the group's largest input, in 160 terms of random sign.
    assert np.abs(products.multiply(products.packed(codes), x) - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_inputs_do_not_overflow(products: Products, bits: int) -> None:
    codes = Codes(
        bits,
        np.full((32, 64), (1 << bits) - 1, dtype=np.uint8),
        np.ones((32, 2), dtype=np.float16),
        np.zeros((32, 2), dtype=np.float16),
    )
    for sign in (1, -1):
        got = products.multiply(products.packed(codes), np.full((3, 64), sign * 127, dtype=np.float32))
        assert (got == sign * 127 * 64 * ((1 << bits) - 1)).all()


# --- what happens to the sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [64, 33, 5])
def test_a_bias_is_added_once(products: Products, outputs: int) -> None:
    weights, x, bias = randoms(outputs, 48), randoms(7, 48, seed=1), randoms(outputs, seed=2)
    plain = products.multiply(products.packed(weights), x)
    biased = products.packed(weights, bias=torch.from_numpy(bias))
    assert np.array_equal(products.multiply(biased, x), plain + bias)


def test_products_are_added_to_what_is_there(products: Products) -> None:
    weights, x, before = randoms(50, 48), randoms(7, 48, seed=1), randoms(7, 50, seed=2)
    matrix = products.packed(weights)
    assert np.array_equal(products.multiply(matrix, x, ADD, before), before + products.multiply(matrix, x))


@pytest.mark.parametrize("size", [16, 48, 80])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_gated_product_is_silu_of_the_gate_times_the_other(products: Products, size: int, quantised: bool) -> None:
    gate, up, x = randoms(size, 64), randoms(size, 64, seed=1), 3 * randoms(8, 64, seed=2)
    parts = [rounded(gate), rounded(up)] if quantised else [gate, up]
    got = products.multiply(products.packed(interleaved(*parts)), x, GATE)
    a, b = (torch.from_numpy(products.multiply(products.packed(part), x)) for part in parts)
    expected = (torch.nn.functional.silu(a) * b).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_gates_of_any_size_give_numbers(products: Products) -> None:
    rows = np.array([[-1e30], [-200], [-88], [-87], [-1], [0], [1], [88], [200], [1e30]], dtype=np.float32)
    matrix = products.packed(interleaved(np.ones((16, 1), dtype=np.float32), np.zeros((16, 1), dtype=np.float32)))
    ones = np.ones((16, 1), dtype=np.float32)
    assert np.array_equal(np.abs(products.multiply(matrix, rows, GATE)), np.zeros((10, 16)))
    got = products.multiply(products.packed(interleaved(ones, ones)), np.clip(rows, -1e15, 1e15), GATE)
    expected = torch.nn.functional.silu(torch.from_numpy(np.clip(rows, -1e15, 1e15)).double()).numpy() * np.clip(
        rows, -1e15, 1e15
    )
    # Below -88 the gate is as good as shut, but not to the last digit.
    np.testing.assert_allclose(got, np.repeat(expected, 16, axis=1), rtol=1e-5, atol=1e-6)
