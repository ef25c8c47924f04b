"""LoRA adapters in the compiled step: each row has its own, in any company."""

from typing import Any

import pytest
import torch

from tests.workers.engine.native.rig import FORMATS, Driver, codes_of, native_step, odd_model, random_ids, reference
from workers.engine.lora import ActiveAdapters, SharedLora

# Ranks that fill no vector; layers that share a packed matrix with others, all of one and none of it.
ADAPTERS = {
    "narrow": (3, ("q_proj", "v_proj", "down_proj")),
    "wide": (17, ("k_proj", "up_proj", "o_proj", "gate_proj")),
    "only-v": (1, ("v_proj",)),
}
FAMILIES = ("llama-3-to-1", "qwen2", "llama-gqa-tied")
Updates = dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


def updates_of(model: Any) -> Updates:
    """Return random low-rank updates by the name of the layer and of the adapter."""
    generator = torch.Generator().manual_seed(3)
    updates: Updates = {}
    for path, module in model.named_modules():
        for name, (rank, layers) in ADAPTERS.items():
            if path.rpartition(".")[2] in layers:
                outputs, inputs = module.weight.shape
                down, up = (
                    torch.randn(rank, inputs, generator=generator),
                    torch.randn(outputs, rank, generator=generator),
                )
                updates.setdefault(path, {})[name] = (0.2 * down, 0.2 * up)
    return updates


def adapted(family: str) -> Any:
    """Return a model that has all adapters, as `workers.engine.lora.install` would leave it."""
    model = odd_model(family)
    for path, updates in updates_of(model).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, SharedLora(model.get_submodule(path), updates, ActiveAdapters()))
    return model


def merged(family: str, adapter: str) -> Any:
    """Return the model with one adapter in its weights."""
    model = odd_model(family)
    for path, updates in updates_of(model).items():
        if adapter in updates:
            down, up = updates[adapter]
            model.get_submodule(path).weight += up @ down
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_all_adapters_share_a_pass_and_each_is_exact(family: str) -> None:
    model = adapted(family)
    names = ["", *ADAPTERS]
    prompts = {name: random_ids(model, 50 + n, seed=n) for n, name in enumerate(names)}
    with native_step(model, threads=2, adapters=list(ADAPTERS)) as step:
        driver = Driver(step)
        for name, ids in prompts.items():
            driver.add(name, ids, adapter=name)
        driver.compute(*((name, 30) for name in names))
        driver.compute(*((name, 1) for name in names))
        driver.compute(*((name, len(prompts[name]) - 31) for name in reversed(names)))
        for name, ids in prompts.items():
            expected, _ = reference(merged(family, name), ids)
            difference = (driver.logits(name) - expected).abs().max() / (expected.max() - expected.min())
            assert difference < 2e-5, name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_company_of_other_adapters_changes_no_bit(family: str, form: str) -> None:
    model = adapted(family)
    ids = random_ids(model, 60)
    # The names of the codes are those of the bare model.
    with native_step(odd_model(family), form) as step:
        bare = Driver(step).alone(ids)
    codes = codes_of(odd_model(family), form)
    with native_step(model, form, 3, codes, adapters=list(ADAPTERS)) as step:
        driver = Driver(step)
        assert torch.equal(driver.alone(ids), bare)
        alone = {name: driver.alone(ids, adapter=name) for name in ADAPTERS}
        assert all(not torch.equal(logits, bare) for logits in alone.values())
        for name in ADAPTERS:
            assert torch.equal(driver.alone(ids, [1] * 60, adapter=name), alone[name])
        for name in ("bare", *ADAPTERS):
            driver.add(name, ids, adapter=name if name in ADAPTERS else "")
        driver.compute(("narrow", 7), ("bare", 60), ("wide", 1), ("only-v", 59))
        driver.compute(("wide", 59), ("only-v", 1), ("narrow", 53))
        assert torch.equal(driver.logits("bare"), bare)
        for name in ADAPTERS:
            assert torch.equal(driver.logits(name), alone[name])
