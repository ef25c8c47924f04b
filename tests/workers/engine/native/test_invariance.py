"""A token's logits are the same to the last bit alone, in any company, however its prompt was sliced, and with any
number of threads.
"""

import random
from typing import Any

import pytest
import torch

from tests.workers.engine.native.products import PROCESSORS, processor_of_steps
from tests.workers.engine.native.rig import (
    FORMATS,
    NAMES,
    Driver,
    codes_of,
    native_step,
    odd_model,
    random_ids,
    shared_model,
)

# Longer than one stretch of 128 tokens, into which attention's sums are cut.
TOKENS = 200
SLICINGS = (
    [TOKENS],
    [1] * TOKENS,
    [16, 16, 16, 80, 72],
    [127, 2, 71],
    [5, 7, 11, 13, 17, 19, 23, 29, 26, 50],
    [128, 1, 1, 1, 69],
)


@pytest.fixture(params=[(name, form) for name in NAMES for form in FORMATS], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Any, str]:
    name, form = request.param
    return shared_model(name), form


def in_company(driver: Driver, ids: list[int], seed: int) -> torch.Tensor:
    """Return the logits of ``ids``, computed beside others of all kinds that come, go and are sliced at random."""
    dice = random.Random(seed)
    driver.add("it", ids)
    others = 0
    live: list[str] = []
    while driver.sequences["it"].pending:
        while len(live) < 7:
            others += 1
            other = [dice.choice(ids) for _ in range(dice.randint(1, 70))]
            driver.add(f"{seed}-{others}", other, embedding=not others % 3, all_rows=bool(others % 2))
            live.append(f"{seed}-{others}")
        chosen = [*dice.sample(live, dice.randint(0, len(live))), "it"]
        dice.shuffle(chosen)
        pending = {name: driver.sequences[name].pending for name in chosen}
        driver.compute(*((name, 1 if dice.random() < 0.4 else dice.randint(1, left)) for name, left in pending.items()))
        for name in [n for n in live if not driver.sequences[n].pending]:
            driver.release(name)
            live.remove(name)
    for name in [*live, "it"]:
        driver.release(name)
    return driver.logits("it")


def test_slices_and_threads_and_company_change_no_bit(case: tuple[Any, str]) -> None:
    model, form = case
    ids, codes = random_ids(model, TOKENS), codes_of(model, form)
    with native_step(model, form, 1, codes) as step:
        driver = Driver(step)
        expected = driver.alone(ids)
        assert torch.isfinite(expected).all()
        for cuts in SLICINGS:
            assert torch.equal(driver.alone(ids, cuts), expected)
    for threads in (1, 2, 3):
        with native_step(model, form, threads, codes) as step:
            assert torch.equal(Driver(step, seed=threads).alone(ids, [100, 100]), expected)
            assert torch.equal(in_company(Driver(step, seed=threads), ids, seed=threads), expected)


@pytest.mark.parametrize("processor", sorted(set(PROCESSORS) - {"this"}))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["mistral-wide-window", "llama-3-to-1"])
def test_the_same_holds_on_other_processors(processor: str, form: str, name: str) -> None:
    model = shared_model(name)
    ids = random_ids(model, TOKENS)
    with processor_of_steps(processor), native_step(model, form, 3) as step:
        driver = Driver(step)
        expected = driver.alone(ids)
        for cuts in SLICINGS[1:]:
            assert torch.equal(driver.alone(ids, cuts), expected)
        assert torch.equal(in_company(driver, ids, seed=1), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_hidden_states_are_the_same_in_company(form: str) -> None:
    model = shared_model("qwen2")
    texts = [random_ids(model, n, seed=n) for n in (3, 40, 17, 64, 1)]
    with native_step(model, form, 2) as step:
        alone, together = Driver(step), Driver(step, seed=1)
        for n, ids in enumerate(texts):
            alone.add(str(n), ids, embedding=True)
            together.add(str(n), ids, embedding=True)
            alone.compute((str(n), len(ids)))
        together.compute(*((str(n), len(ids)) for n, ids in enumerate(texts)))
        for n in range(len(texts)):
            assert torch.equal(alone.hidden[str(n)][0], together.hidden[str(n)][0])


def test_a_token_with_many_query_heads_for_each_key_head_does_not_depend_on_its_slice() -> None:
    """More heads than attention takes at once."""
    model = odd_model("qwen3", num_attention_heads=100, num_key_value_heads=2, head_dim=16)
    ids = random_ids(model, 40)
    with native_step(model, threads=2) as step:
        driver = Driver(step)
        expected = driver.alone(ids)
        assert torch.equal(driver.alone(ids, [1] * 40), expected)
        assert torch.equal(driver.alone(ids, [13, 27]), expected)


def test_wide_batches_do_not_change_a_row() -> None:
    """More rows than buffers are made for at first, and fewer again."""
    model = shared_model("llama-3-to-1")
    with native_step(model, "q8", 2) as step:
        driver = Driver(step)
        ids = random_ids(model, 5)
        expected = driver.alone(ids)
        for count in (80, 3):
            names = [f"{count}-{n}" for n in range(count)]
            for name in names:
                driver.add(name, ids)
            driver.compute(*((name, 5) for name in names))
            for name in names:
                assert torch.equal(driver.logits(name), expected)
                driver.release(name)
        assert torch.equal(driver.alone(ids, [1, 4]), expected)
