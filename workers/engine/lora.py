"""LoRA adapters that are chosen per request: rows of different adapters, and of the bare base, share one batch.

peft loads the adapters into the model. Its own layers apply one adapter to a whole batch, so each of them is replaced
by a `SharedLora`, which adds to each row the product of that row's adapter (Hu et al. 2021, section 4.1).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers.engine.errors import LoadError


@dataclass
class ActiveAdapters:
    """Which rows of the flat batch belong to which adapter: name -> int64 ``[rows]``. The others are the base's."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)


class SharedLora(nn.Module):
    """A linear layer and the low-rank updates that adapters add to it.

    ``updates[name]`` is (A ``[rank, in]``, B ``[out, rank]`` times the scaling).
    """

    def __init__(
        self, base: nn.Module, updates: dict[str, tuple[torch.Tensor, torch.Tensor]], active: ActiveAdapters
    ) -> None:
        super().__init__()
        self.base = base
        self.updates = updates
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, in]`` -> ``[1, tokens, out]``."""
        out: torch.Tensor = self.base(x)
        for name, rows in self.active.rows.items():
            update = self.updates.get(name)
            if update is not None:
                down, up = update
                delta = (x[0, rows].to(down.dtype) @ down.T) @ up.T
                out[0, rows] += delta.to(out.dtype)
        return out


def install(model: Any, adapters: dict[str, str], dtype: torch.dtype) -> tuple[Any, ActiveAdapters]:
    """Load ``adapters`` (name -> directory or hub id) beside the weights of ``model``.

    Returns the model and the handle that `EagerStep` sets before each pass. Raises `LoadError` for an adapter that is
    more than low-rank updates of linear layers: it could not be switched per row.
    """
    # Costs 140 MB and seconds of start: for those who have adapters.
    from peft import PeftModel
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraLayer

    wrapped: Any = None
    for name, source in adapters.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, source, adapter_name=_key(name), torch_dtype=dtype)
        else:
            wrapped.load_adapter(source, adapter_name=_key(name))
        problem = unsupported(wrapped.peft_config[_key(name)])
        if problem:
            raise LoadError(f"--lora_model {name}={Path(source)}: {problem} cannot be chosen per request")
    base = wrapped.get_base_model()
    active = ActiveAdapters()
    names = {_key(name): name for name in adapters}
    for path, module in list(base.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, PeftLinear) and "bnb" not in type(module).__module__:
            raise LoadError(f"--lora_model: an adapter of {type(module).__name__} cannot be chosen per request")
        updates = {
            names[key]: (
                _weight(module.lora_A, key),
                _weight(module.lora_B, key) * module.scaling[key],
            )
            for key in module.lora_A
        }
        parent, _, child = path.rpartition(".")
        setattr(base.get_submodule(parent), child, SharedLora(module.get_base_layer(), updates, active))
    return base, active


def _weight(parts: Any, key: str) -> torch.Tensor:
    weight: torch.Tensor = parts[key].weight.detach()
    return weight


def unsupported(config: Any) -> str | None:
    """Return what of a peft configuration goes beyond plain LoRA, or None."""
    if getattr(config, "use_dora", False):
        return "DoRA"
    if getattr(config, "modules_to_save", None):
        return "an adapter with modules_to_save"
    if getattr(config, "bias", "none") != "none":
        return "an adapter with biases"
    if getattr(config, "peft_type", None) is None or config.peft_type.value != "LORA":
        return f"an adapter of type {getattr(config, 'peft_type', '?')}"
    return None


def _key(name: str) -> str:
    """peft uses the name as a module name, which cannot hold a dot."""
    return "adapter_" + name.replace(".", "_dot_")
