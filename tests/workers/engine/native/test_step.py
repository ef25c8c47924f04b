"""Whole passes of the compiled step, against transformers' own forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.engine.native.rig import (
    FORMATS,
    NAMES,
    Driver,
    codes_of,
    dequantised,
    layers_of,
    native_step,
    odd_model,
    random_ids,
    reference,
)
from workers.engine.native.step import unsupported
from workers.engine.native.weights import GROUP

# Of the spread of a row's logits.
EXACT = 2e-5
# A number that lies on the border between two steps of its rounding may fall on either side; tokens that see it differ
# so much, the others not.
OTHER_STEP = 0.03


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the spread of what is expected."""
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return odd_model(request.param)


def test_the_models_of_these_tests_are_supported(model: Any) -> None:
    assert unsupported(model, layers_of(model)) is None


def test_logits_are_those_of_transformers_however_a_prompt_is_sliced(model: Any) -> None:
    ids = random_ids(model, 230)
    expected, _ = reference(model, ids)
    with native_step(model, threads=2) as step:
        driver = Driver(step)
        for cuts in ([230], [1] * 40 + [190], [7, 9, 100, 1, 1, 112], [16, 128, 64, 22], [129, 101]):
            assert difference(driver.alone(ids, cuts), expected) < EXACT


def test_a_mixed_pass_serves_everybody(model: Any) -> None:
    """Decoding rows, slices of prompts, embeddings and scores of prompts side by side."""
    prompts = {name: random_ids(model, 40 + 11 * n, seed=n) for n, name in enumerate("abcdef")}
    with native_step(model, threads=2) as step:
        driver = Driver(step)
        for name, ids in prompts.items():
            driver.add(name, ids, embedding=name in "cf", all_rows=name in "ad")
        driver.compute(("a", 39), ("c", 60), ("b", 50))
        driver.compute(("d", 17), ("a", 1), ("c", 2), ("b", 1), ("e", 83), ("f", 3))
        driver.compute(("f", 92), ("e", 1), ("d", 56))
        for name, ids in prompts.items():
            logits, hidden = reference(model, ids)
            if name in "cf":
                assert difference(torch.cat(driver.hidden[name]), hidden) < EXACT
                continue
            wanted = logits if name in "ad" else logits[-1:]
            assert difference(driver.logits(name), wanted) < EXACT
            assert torch.equal(driver.best(name), driver.logits(name).argmax(dim=-1))


def test_a_pass_without_wanted_rows_leaves_its_keys_and_values(model: Any) -> None:
    ids = random_ids(model, 30)
    with native_step(model) as step:
        driver = Driver(step)
        driver.add("x", ids, all_rows=False)
        assert driver.compute(("x", 29)).logits.shape == (0, model.config.vocab_size)
        driver.compute(("x", 1))
        assert difference(driver.logits("x"), reference(model, ids)[0][-1:]) < EXACT


def test_copied_blocks_are_written_apart() -> None:
    model = odd_model("llama-gqa-tied")
    shared, first, second = random_ids(model, 21), random_ids(model, 9, seed=1), random_ids(model, 9, seed=2)
    with native_step(model) as step:
        driver = Driver(step)
        driver.add("first", shared + first)
        driver.compute(("first", 21))
        driver.sequences["second"] = twin = driver.sequences["first"].fork(1, driver.pool)
        twin.ids[21:] = second
        driver.compute(("first", 4), ("second", 9))
        driver.compute(("first", 5))
        assert difference(driver.logits("first"), reference(model, shared + first)[0]) < EXACT
        assert difference(driver.logits("second"), reference(model, shared + second)[0][21:]) < EXACT


def test_the_longest_sequence_of_the_cache_is_served(model: Any) -> None:
    ids = random_ids(model, 512)
    with native_step(model, threads=2) as step:
        assert difference(Driver(step).alone(ids, [500, 1, 11]), reference(model, ids)[0]) < EXACT


@contextmanager
def rounded_inputs(model: Any, rounds: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let every matrix of ``model`` multiply with inputs that ``rounds(parameter name, input)`` returns."""
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: (rounds(f"{name}.weight", args[0]),))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def to_8_bits(values: torch.Tensor) -> torch.Tensor:
    """Round each group of 32 to 255 steps between plus and minus its largest value."""
    groups = values.reshape(*values.shape[:-1], -1, GROUP)
    steps = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / steps).round() * steps).reshape(values.shape)


@pytest.mark.parametrize("form", ["q4", "q8"])
def test_quantised_logits_are_those_of_inputs_rounded_to_8_bits(model: Any, form: str) -> None:
    """Transformers computes with the same weights and the same rounding of what they are multiplied with."""
    codes = codes_of(model, form)
    if not codes:
        pytest.skip("no row of this model is made of groups of 32")
    ids = random_ids(model, 60)
    with native_step(model, codes=codes, dtype=torch.float32) as step:
        got = Driver(step).alone(ids, [40, 1, 19])
    if model.config.tie_word_embeddings:
        codes["lm_head.weight"] = codes["model.embed_tokens.weight"]
    exact = dequantised(model, codes)
    with rounded_inputs(exact, lambda name, x: to_8_bits(x) if name in codes else x):
        expected, _ = reference(exact, ids)
    each = torch.tensor([difference(a, b) for a, b in zip(got, expected, strict=True)])
    assert each.quantile(0.25) < EXACT
    assert each.max() < OTHER_STEP


@pytest.mark.parametrize("form", FORMATS)
def test_rounding_costs_little(form: str) -> None:
    """On a model whose layers do not magnify differences, unlike those of random wide weights."""
    model = odd_model("llama-3-to-1", initializer_range=0.05)
    codes = codes_of(model, form)
    ids = random_ids(model, 150)
    with native_step(model, form, codes=codes) as step:
        got = Driver(step).alone(ids)
    expected, _ = reference(dequantised(model, codes), ids)
    spread = float(np.std(expected.numpy()))
    assert float((got - expected).square().mean().sqrt()) < {"float32": 1e-5}.get(form, 0.02) * spread


def test_an_embedding_made_longer_for_more_tokens_is_the_models_not_the_files() -> None:
    model = odd_model("llama")
    codes = codes_of(model, "q8")
    model = dequantised(model, codes)
    vocabulary = model.config.vocab_size
    model.resize_token_embeddings(vocabulary + 5, mean_resizing=False)
    model.get_input_embeddings().weight.data[vocabulary:] = model.get_input_embeddings().weight.data[:5] * 0.5
    ids = [vocabulary + 4, *random_ids(model, 40), vocabulary + 1]
    expected, _ = reference(model, ids)
    with native_step(model, "float32", codes=codes) as step:
        # The other matrices read inputs rounded to 8 bits.
        assert difference(Driver(step).alone(ids), expected) < 0.1
