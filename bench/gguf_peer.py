"""A Llama checkpoint quantized by llama.cpp itself: the file's bytes and the values that it computes with.

Needs llama-cpp-python (built from source, minutes) and gguf: `make bench` installs both.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders.sources import open_source
from builders.weights import CheckpointWeights
from edge_runtime.engine.program import Program

Array = np.ndarray[Any, Any]
# Program tensor of a layer -> GGUF's name; the others are named below
_LAYER = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def gguf_name(tensor: str) -> str:
    """GGUF's name of a tensor of a Llama Program."""
    if tensor.startswith("layers."):
        _, layer, rest = tensor.split(".", 2)
        return f"blk.{layer}.{_LAYER[rest]}.weight"
    return {"embed": "token_embd", "norm": "output_norm", "head": "output"}[tensor] + ".weight"


def write_f32(folder: Path, path: Path) -> Path:
    """A Llama folder as a GGUF of f32 tensors, q and k rows in GGUF's (interleaved) rotary order."""
    import gguf

    from builders.archs import read_program

    with open_source(folder) as source:
        config = source.config
        weights = CheckpointWeights(read_program(config), source)
        writer = gguf.GGUFWriter(str(path), "llama")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_dimension_count(config["hidden_size"] // heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"<t{i}>".encode() for i in range(config["vocab_size"])])
        writer.add_token_scores([0.0] * config["vocab_size"])
        writer.add_token_types([1] * config["vocab_size"])
        for name, spec in weights.program.tensors.items():
            if name.startswith("rope"):
                continue
            values = weights(name)
            if name.endswith((".q", ".k")):
                values = _turn(values, heads if name.endswith(".q") else kv_heads, back=False)
            writer.add_tensor(gguf_name(name), values[0] if spec.role == "vector" else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _turn(values: Array, heads: int, *, back: bool) -> Array:
    """Rows of each head from half-split to interleaved rotary order, or back."""
    rows, cols = values.shape
    shape = (heads, rows // heads // 2, 2, cols) if back else (heads, 2, rows // heads // 2, cols)
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(rows, cols))


def quantize(source: Path, target: Path, kind: str) -> Path:
    """llama.cpp's own quantization; `kind` is its name, such as Q4_K_M. No importance matrix."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise SystemExit(f"llama.cpp could not make {kind}: status {status}")
    return target


@dataclass(frozen=True)
class GgufWeights:
    """A quantized file's values in a Program's names: a provider as `builders.weights.Weights`.

    nbytes: of all its tensors. kinds: GGUF type -> how many matrices have it.
    """

    program: Program
    values: dict[str, Array]
    nbytes: int
    kinds: dict[str, int]

    def __call__(self, name: str) -> Array:
        return self.values[name]

    def block(self, name: str, start: int, stop: int) -> Array:
        return self.values[name][start:stop]

    def rows(self, name: str, ids: Array) -> Array:
        return self.values[name][ids]


def read_quantized(path: Path, exact: CheckpointWeights, heads: int, kv_heads: int) -> GgufWeights:
    """Dequantize every tensor by the gguf package; `exact` gives the Program and what no file has."""
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    values: dict[str, Array] = {}
    kinds: dict[str, int] = {}
    for name, spec in exact.program.tensors.items():
        if name.startswith("rope"):
            values[name] = exact(name)
            continue
        stored = tensors[gguf_name(name)]
        made = gguf.dequantize(stored.data, stored.tensor_type).reshape(spec.rows, spec.cols)
        if name.endswith((".q", ".k")):
            made = _turn(made, heads if name.endswith(".q") else kv_heads, back=True)
        values[name] = made.astype(np.float32)
        if spec.role != "vector":
            kind = stored.tensor_type.name
            kinds[kind] = kinds.get(kind, 0) + 1
    return GgufWeights(exact.program, values, sum(int(t.n_bytes) for t in tensors.values()), kinds)
