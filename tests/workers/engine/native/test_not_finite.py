"""What is no number stays where it belongs."""

from typing import Any

import pytest
import torch

from tests.workers.engine.native.rig import FORMATS, Driver, codes_of, native_step, odd_model, random_ids
from workers.engine.native.weights import Codes

POISONED = 11
VALUES = [float("nan"), float("inf"), float("-inf")]


def poisoned(form: str, value: float) -> tuple[Any, dict[str, Codes]]:
    """Return a model, with codes, whose token `POISONED` has an embedding that is no number."""
    model = odd_model("qwen3")
    codes = codes_of(model, form)
    model.model.embed_tokens.weight[POISONED, 5] = value
    for name in set(codes) & {"model.embed_tokens.weight"}:
        codes[name].minima[POISONED, 0] = value
    return model, codes


def ids_without(model: Any, count: int, seed: int = 0) -> list[int]:
    return [i if i != POISONED else 12 for i in random_ids(model, count, seed)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", VALUES)
def test_a_row_that_is_no_number_has_no_likeliest_token_and_its_batch_mates_do_not_notice(
    form: str, value: float
) -> None:
    model, codes = poisoned(form, value)
    first, second = ids_without(model, 40), ids_without(model, 37, seed=1)
    bad = [*ids_without(model, 20, seed=2), POISONED, *ids_without(model, 14, seed=3)]
    with native_step(model, form, 2, codes) as step:
        driver = Driver(step)
        alone = driver.alone(first), driver.alone(second)
        for name, ids in (("first", first), ("bad", bad), ("second", second)):
            driver.add(name, ids)
        driver.compute(("first", 30), ("bad", 25), ("second", 36))
        driver.compute(("first", 10), ("bad", 10), ("second", 1))
        assert torch.equal(driver.logits("first"), alone[0])
        assert torch.equal(driver.logits("second"), alone[1])
        assert torch.equal(driver.best("first"), alone[0].argmax(dim=-1))
        assert (driver.best("bad")[20:] == -1).all()
        assert not torch.isfinite(driver.logits("bad")[20:]).all(dim=-1).any()


@pytest.mark.parametrize("place", [0, 17, 130, 198])
@pytest.mark.parametrize("value", VALUES)
def test_one_logit_that_is_no_number_is_enough(place: int, value: float) -> None:
    """Also in the last tile, which is not full, and in the smallest logits."""
    model = odd_model("llama")
    ids = random_ids(model, 9)
    with native_step(model) as step:
        assert (Driver(step).likeliest(ids) >= 0).all()
    model.lm_head.weight[place] = value
    with native_step(model, threads=2) as step:
        assert (Driver(step).likeliest(ids) == -1).all()


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    model = odd_model("llama")
    model.lm_head.weight[torch.tensor([40, 41, 150, 198])] = 10 * model.lm_head.weight[170]
    model.lm_head.weight[3] = -10 * model.lm_head.weight[170]
    ids = random_ids(model, 60)
    with native_step(model, threads=3) as step:
        best = Driver(step).likeliest(ids)
    assert set(best.tolist()) >= {40, 3}
    assert not set(best.tolist()) & {41, 150, 198}


def test_padding_of_the_vocabulary_is_never_the_likeliest_token() -> None:
    model = odd_model("llama-3-to-1")
    ids = random_ids(model, 30)
    # Every logit of some row is below 0, which the columns behind the last token are.
    model.lm_head.weight[:] = model.lm_head.weight[:1] + 1e-3 * torch.rand(model.lm_head.weight.shape)
    with native_step(model) as step:
        driver = Driver(step)
        logits = driver.alone(ids)
        assert (logits.max(dim=-1).values < 0).any()
        assert torch.equal(driver.likeliest(ids), logits.argmax(dim=-1))


@pytest.mark.parametrize("form", FORMATS)
def test_what_freed_blocks_hold_does_not_reach_their_next_owner(form: str) -> None:
    model = odd_model("mistral-window")
    ids = random_ids(model, 150)
    with native_step(model, form, 2) as step:
        expected = Driver(step).alone(ids)
        for storage in (*step.cache.keys, *step.cache.values):
            storage.fill_(float("nan"))
        for cuts in ([150], [1] * 150, [100, 50]):
            assert torch.equal(Driver(step, seed=1).alone(ids, cuts), expected)


def test_a_sequence_of_poison_leaves_nothing_behind() -> None:
    """Neither in the cache nor in the buffers of the step."""
    model, codes = poisoned("q8", float("nan"))
    ids = ids_without(model, 60)
    with native_step(model, "q8", 2, codes) as step:
        expected = Driver(step).alone(ids)
        Driver(step).alone([POISONED] * 70)
        assert torch.equal(Driver(step).alone(ids, [3, 57]), expected)


def test_numbers_too_large_for_float32_do_not_pass_for_numbers() -> None:
    model = odd_model("llama")
    model.model.norm.weight[:] = 3e38
    with native_step(model) as step:
        assert (Driver(step).likeliest(random_ids(model, 5)) == -1).all()
