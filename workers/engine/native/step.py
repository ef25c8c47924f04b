"""A Llama-like model's forward pass through the C library."""

import ctypes
import threading
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.engine.attention import Scoring
from workers.engine.errors import NoNativeStep
from workers.engine.flat_batch import Computed, FlatBatch
from workers.engine.kv_cache import KVCache, LayerShape
from workers.engine.lora import SharedLora
from workers.engine.native import library
from workers.engine.native.loras import PackedLoras, plain
from workers.engine.native.weights import Codes, Packed, Weights, interleaved, joined, padded
from workers.engine.noise import draw_key
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob

# Tokens in a block of the cache: the lanes of a vector.
BLOCK_SIZE = 16
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MOST_HEAD_DIM = 512
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FORMATS = {torch.float32: library.F32, torch.bfloat16: library.BF16}

# Rows of logits whose memory is kept from pass to pass.
MOST_KEPT_ROWS = 64
# As `enum Phase` in step.c.
PHASES = ("layout", "operands", "qkv", "rotary", "attention", "output", "gate_up", "down", "head")

_DRAW = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("typical_p", "<f4"),
        ("unused", "<i4"),
        ("key", "<i8"),
    ]
)
_SPAN = np.dtype([("start", "<i4"), ("count", "<i4"), ("context", "<i4"), ("pad", "<i4"), ("blocks", "<u8")])


Layers = list[tuple[LayerShape, Scoring]]


def unsupported(model: Any, layers: Layers) -> str | None:
    """Return what of a transformers model the C step does not compute, or None."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if name not in FAMILIES:
        return f"{name} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if getattr(model, "hf_quantizer", None) is not None:
        return "weights quantised by a library"
    shape, scoring = layers[0]
    if shape.key_dim % BLOCK_SIZE or shape.key_dim > MOST_HEAD_DIM or shape.value_dim != shape.key_dim:
        return f"heads of {shape.key_dim} numbers"
    if any(s != shape or how.softcap is not None or how.scaling != scoring.scaling for s, how in layers):
        return "layers that score differently"
    if config.intermediate_size % BLOCK_SIZE or config.hidden_size % 2:
        return f"a hidden size of {config.hidden_size} with {config.intermediate_size} intermediate"
    rotary = model.model.rotary_emb
    rope = getattr(rotary, "rope_type", "default")
    if "dynamic" in rope or rope == "longrope" or 2 * len(rotary.inv_freq) != shape.key_dim:
        return f"rotary embeddings of type {rope}"
    decoder = model.model.layers
    attention = [getattr(layer.self_attn, name) for layer in decoder for name in ATTENTION_PROJECTIONS]
    others = [
        module
        for layer in decoder
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    ]
    if any(type(plain(module)) is not torch.nn.Linear for module in (*attention, *others, model.lm_head)):
        return "projections that are more than a matrix"
    if any(plain(module).bias is not None for module in (*others, model.lm_head)):
        return "biases of other projections than query, key and value"
    if type(model.get_input_embeddings()) is not torch.nn.Embedding or isinstance(model.lm_head, SharedLora):
        return "adapters of the embeddings"
    if model.lm_head.weight.shape != model.get_input_embeddings().weight.shape:
        return "an output head of another size than the embedding"
    return None


class NativeStep:
    """Computes forward passes; implements `workers.engine.flat_batch.Step`.

    ``model``: a transformers causal LM on the CPU that `unsupported` says nothing of. ``codes``: the quantised form of
    some of its matrices by parameter name; the others are multiplied in ``dtype`` (float32 or bfloat16), which is the
    cache's, too. ``adapters``: names of the LoRA adapters that `workers.engine.lora.install` put into the model. The
    model's own weights are not needed any more afterwards.
    """

    def __init__(
        self,
        model: Any,
        layers: Layers,
        codes: dict[str, Codes],
        dtype: torch.dtype,
        blocks: int,
        threads: int,
        cache_dir: Path,
        adapters: list[str] | None = None,
    ) -> None:
        """Raises `NoNativeStep` when the library cannot be had."""
        self._library = library.load(cache_dir)
        self._codes = codes
        self._format = FORMATS[dtype]
        shapes = [shape for shape, _ in layers]
        self.cache = KVCache(shapes, blocks, BLOCK_SIZE, dtype, torch.device("cpu"), by_head=True)
        self._adapters = adapters or []
        self._widest_rank = 0
        # Whatever C points into lives here.
        self._kept: list[Any] = []
        self.weight_bytes = 0
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._logits = torch.empty(0, padded(self._vocabulary))
        self._hidden_size = model.config.get_text_config().hidden_size
        self._model = self._describe(model, layers)
        del self._codes
        self._threads = self._library.tr_threads_start(threads)
        self._stack = self._library.tr_stack_new(ctypes.byref(self._model), self._threads)
        if not self._threads or not self._stack:
            raise NoNativeStep("no threads or memory are left")

    def fetch_memory(self) -> None:
        """Have the system provide all of the cache's memory, in the background and at low priority.

        A page that is touched for the first time costs a step some milliseconds where the system itself has to find
        the memory, as on many virtual machines.
        """
        first = self.cache.keys[0]
        whole = len(first) * first.stride(0) * first.element_size()
        threading.Thread(target=self._library.tr_touch, args=(first.data_ptr(), whole), daemon=True).start()

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds spent so far on each part of the steps."""
        seconds = np.zeros(len(PHASES))
        self._library.tr_phases(self._stack, seconds.ctypes.data)
        return dict(zip(PHASES, seconds.tolist(), strict=True))

    def close(self) -> None:
        """End the threads. The step cannot be used any more."""
        self._library.tr_stack_free(self._stack)
        self._library.tr_threads_stop(self._threads)

    # --- weights ------------------------------------------------------------------------------------------------------

    def _describe(self, model: Any, layers: Layers) -> library.Model:
        config = model.config.get_text_config()
        shape, scoring = layers[0]
        described = (library.Layer * len(layers))()
        for index, layer in enumerate(model.model.layers):
            described[index] = self._layer(layer, index, layers[index][1].window)
        self._kept.append(described)
        embedding = self._single("model.embed_tokens.weight", model.get_input_embeddings())
        head = embedding
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            head = self._single("lm_head.weight", model.lm_head)
        rotary = model.model.rotary_emb
        return library.Model(
            layer_count=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.key_dim,
            cache_format=self._format,
            widest_rank=self._widest_rank,
            block_stride=self.cache.keys[0].stride(0),
            norm_epsilon=config.rms_norm_eps,
            attention_scale=scoring.scaling,
            rope_scale=float(rotary.attention_scaling),
            inverse_frequencies=self._vector(rotary.inv_freq),
            layers=described,
            final_norm=self._vector(model.model.norm.weight),
            embedding=embedding,
            head=head,
        )

    def _layer(self, layer: Any, index: int, window: int | None) -> library.Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = layer.self_attn, layer.mlp
        biases = [plain(getattr(attention, name)).bias for name in ATTENTION_PROJECTIONS]
        gated = [mlp.gate_proj, mlp.up_proj]
        gate = self._weights(f"{prefix}mlp.gate_proj.weight", mlp.gate_proj)
        up = self._weights(f"{prefix}mlp.up_proj.weight", mlp.up_proj)
        heads = [getattr(attention, name) for name in ATTENTION_PROJECTIONS]
        names = [f"{prefix}self_attn.{name}.weight" for name in ATTENTION_PROJECTIONS]
        qkv = joined([self._weights(name, module) for name, module in zip(names, heads, strict=True)])
        return library.Layer(
            qkv=self._packed(qkv, None if biases[0] is None else torch.cat(biases), self._loras(heads)),
            output=self._single(f"{prefix}self_attn.o_proj.weight", attention.o_proj),
            gate_up=self._packed(interleaved(gate, up), None, self._loras(gated, interleaved=True)),
            down=self._single(f"{prefix}mlp.down_proj.weight", mlp.down_proj),
            attention_norm=self._vector(layer.input_layernorm.weight),
            mlp_norm=self._vector(layer.post_attention_layernorm.weight),
            query_norm=self._vector(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
            key_norm=self._vector(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
            keys=self.cache.keys[index].data_ptr(),
            values=self.cache.values[index].data_ptr(),
            window=window or 0,
        )

    def _weights(self, name: str, module: Any) -> Weights:
        parameter = plain(module).weight
        quantised = self._codes.get(name)
        # An embedding that was made longer for more tokens is no longer the file's.
        if quantised is None or quantised.codes.shape != tuple(parameter.shape):
            return parameter.detach().float().numpy()
        return quantised

    def _single(self, name: str, module: Any) -> library.Matrix:
        return self._packed(self._weights(name, module), None, self._loras([module]))

    def _packed(self, weights: Weights, bias: torch.Tensor | None = None, loras: int | None = None) -> library.Matrix:
        packed = Packed(self._library, weights, self._format, bias, loras)
        self._kept.append(packed)
        self.weight_bytes += packed.nbytes
        return packed.matrix

    def _loras(self, modules: list[Any], *, interleaved: bool = False) -> int | None:
        packed = PackedLoras(self._adapters, modules, interleaved=interleaved)
        self._kept.append(packed)
        self._widest_rank = max(self._widest_rank, packed.widest_rank)
        return packed.address

    def _vector(self, values: torch.Tensor) -> int:
        vector = np.array(values.detach().float().numpy())
        self._kept.append(vector)
        return vector.ctypes.data

    # --- a pass -------------------------------------------------------------------------------------------------------

    def compute(self, batch: FlatBatch) -> Computed:
        """Compute the tokens of ``batch``; their keys and values are in the cache afterwards.

        The logits are good until the next pass.
        """
        if batch.copies:
            self.cache.copy_blocks(batch.copies)
        ids = batch.ids.astype(np.int32)
        wanted = np.array(batch.wanted, dtype=np.int32)
        tables = [np.array(item.sequence.blocks, dtype=np.int32) for item in batch.items]
        spans = np.zeros(len(tables), dtype=_SPAN)
        for n, (item, (start, _), table) in enumerate(zip(batch.items, batch.spans, tables, strict=True)):
            spans[n] = (start, item.tokens, item.sequence.computed, 0, table.ctypes.data)
        adapters = self._adapter_rows(batch)
        logits = self._room_for_logits(len(wanted))
        best = np.empty(len(wanted), dtype=np.int32)
        hidden = torch.empty(batch.tokens, self._hidden_size) if batch.wants_hidden else None
        request = library.Batch(
            tokens=batch.tokens,
            span_count=len(spans),
            wanted_count=len(wanted),
            ids=ids.ctypes.data,
            adapters=None if adapters is None else adapters.ctypes.data,
            spans=spans.ctypes.data,
            wanted=wanted.ctypes.data,
            logits=logits.data_ptr(),
            best=best.ctypes.data,
            hidden=None if hidden is None else hidden.data_ptr(),
        )
        if self._library.tr_step(self._stack, ctypes.byref(request)):
            raise MemoryError("no memory for a batch of this size")
        return Computed(logits[:, : self._vocabulary], torch.from_numpy(best).long(), hidden)

    def _room_for_logits(self, rows: int) -> torch.Tensor:
        """Return float32 ``[rows, padded vocab]``: the same memory for each pass, unless it wants unusually many."""
        columns = self._logits.shape[1]
        if rows > MOST_KEPT_ROWS:
            return torch.empty(rows, columns)
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, columns)
        return self._logits[:rows]

    def sample(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Return the next token of each row, int64 ``[rows]``; as `workers.engine.sampler.sample`."""
        draws = np.zeros(len(sequences), dtype=_DRAW)
        for n, sequence in enumerate(sequences):
            assert isinstance(sequence.job, GenerateJob)
            p = sequence.job.sampling
            key = draw_key(p.seed, sequence.choice, sequence.output_length)
            draws[n] = (p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p, 0, key)
        tokens = np.empty(len(sequences), dtype=np.int32)
        self._library.tr_sample(
            self._threads,
            scores.data_ptr(),
            scores.stride(0),
            len(sequences),
            scores.shape[1],
            draws.ctypes.data,
            tokens.ctypes.data,
        )
        if (tokens < 0).any():
            raise MemoryError("no memory for a draw")
        return torch.from_numpy(tokens).long()

    def _adapter_rows(self, batch: FlatBatch) -> np.ndarray | None:
        """Return the place of each row's adapter, int32 ``[tokens]``, -1 for none; None when no row has one."""
        places = None
        for item, (start, end) in zip(batch.items, batch.spans, strict=True):
            job = item.sequence.job
            if self._adapters and isinstance(job, GenerateJob) and job.adapter:
                if places is None:
                    places = np.full(batch.tokens, -1, dtype=np.int32)
                places[start:end] = self._adapters.index(job.adapter)
        return places
