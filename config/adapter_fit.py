"""Whether a LoRA adapter fits a base model, told from the shapes in their files' headers."""

import re

from config.base_model import BaseModel
from config.weight_files import WeightFileError

Shape = tuple[int, ...]

# Names in adapter_model.safetensors: base_model.model.<module>.lora_A.weight, ....lora_embedding_B, or a whole tensor.
_LORA_TENSOR = re.compile(
    r"^base_model\.model\.(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?$"
)
_WHOLE_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+?)(\.modules_to_save)?\.weight$")


def misfit_of_adapter(adapter: dict[str, Shape], base: BaseModel) -> str | None:
    """Return the first reason why an adapter (shapes by tensor name) cannot sit on the base model, or None.

    lora_A is [rank, in] and lora_B [out, rank] where the module's weight is [out, in] (or [in, out] in a few old
    models); for an embedding they are [rank, vocabulary] and [hidden, rank]. A vocabulary may differ from the base's:
    it is resized to the tokenizer's. Fused experts have other names in the file than in the model and are left to
    the model worker.
    """
    lora: dict[str, dict[str, Shape]] = {}
    whole: dict[str, Shape] = {}
    for name, shape in adapter.items():
        if "experts" in name:
            continue
        if match := _LORA_TENSOR.match(name):
            lora.setdefault(match["module"], {})[match["part"]] = shape
        elif match := _WHOLE_TENSOR.match(name):
            whole[match["module"]] = shape
    shapes = _module_shapes(base, set(lora) | set(whole))
    for module in lora:
        if module not in shapes:
            return f"it has no module {module}"
    if base.quantized:
        return None
    for module, parts in lora.items():
        wanted, given = shapes[module], _adapted_shape(parts)
        if given and len(wanted) == 2 and not _same(given, wanted, module):
            return f"{module} is {_by(wanted)} in the base model and {_by(given)} in the adapter"
    for module, given in whole.items():
        wanted = shapes.get(module, ())
        if len(given) == len(wanted) == 2 and not _same(given, wanted, module):
            return f"{module} is {_by(wanted)} in the base model and {_by(given)} in the adapter"
    return None


def _adapted_shape(parts: dict[str, Shape]) -> Shape:
    """The shape of the weight that the pair of matrices was made for; () if they are no such pair."""
    embedding = "embedding_A" in parts
    a, b = (parts.get("embedding_A"), parts.get("embedding_B")) if embedding else (parts.get("A"), parts.get("B"))
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return ()
    return (a[1], b[0]) if embedding else (b[0], a[1])


def _same(given: Shape, wanted: Shape, module: str) -> bool:
    if module.endswith(("lm_head", "embed_tokens", "embed_in", "embed_out", "wte")):
        return given[1] == wanted[1]
    return given in (wanted, wanted[::-1])


def _module_shapes(base: BaseModel, modules: set[str]) -> dict[str, Shape]:
    """The shapes of the base model's weights by the module names that the adapter uses."""
    if base.gguf:
        return _gguf_module_shapes(base, modules)
    weights = {
        name.removesuffix(".weight"): shape for name, shape in base.header.shapes.items() if name.endswith("weight")
    }
    # A quantised file holds other tensors beside or instead of ".weight" (qweight, scales); its modules count too.
    if base.quantized:
        weights.update({name.rpartition(".")[0]: shape for name, shape in base.header.shapes.items()})
    if any(module in weights for module in modules):
        # Tied to the input embedding and so not in the file.
        weights.setdefault("lm_head", weights.get("model.embed_tokens", ()))
        return weights
    # The file may leave out the leading part of the names ("model."), or have one more: compare from the layers on.
    tails = {_tail(name): shape for name, shape in weights.items()}
    return {module: tails[_tail(module)] for module in modules if _tail(module) in tails}


def _tail(module: str) -> str:
    """The name from the last list of layers on: "layers.3.self_attn.q_proj"."""
    match = re.search(r"\w+\.\d+\..*$", module)
    return match[0] if match else module.rpartition(".")[2]


def _gguf_module_shapes(base: BaseModel, modules: set[str]) -> dict[str, Shape]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    metadata = base.header.metadata
    architecture = metadata.get("general.architecture")
    known = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not known:
        raise WeightFileError(f"cannot be compared with a base model of the unknown GGUF architecture {architecture!r}")
    names = get_tensor_name_map(known[0], int(metadata.get(f"{architecture}.block_count", 0)))
    shapes = {}
    for module in modules:
        name = names.get_name(module)
        if name == "output" and "output.weight" not in base.header.shapes:
            name = "token_embd"
        if name and name + ".weight" in base.header.shapes:
            shapes[module] = base.header.shapes[name + ".weight"]
    return shapes


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))
