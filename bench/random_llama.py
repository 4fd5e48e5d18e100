"""A random-weight Llama of a named shape as a Hugging Face folder, and the same weights as a GGUF Q4_0 file.

Speed does not depend on the values; both files hold the same matrices, so both programs read like for like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """The usual names of a Llama config."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


LLAMA_1B = Shape("llama-1.1b", 2048, 22, 32, 4, 5632, 32000)
TINY = Shape("llama-tiny", 256, 2, 8, 2, 512, 512)
SHAPES = {s.name: s for s in (LLAMA_1B, TINY)}

# (Hugging Face name, GGUF name, rows, cols) of a layer's matrices come from the shape
LAYER = (
    ("self_attn.q_proj", "attn_q", "q", "hidden"),
    ("self_attn.k_proj", "attn_k", "kv", "hidden"),
    ("self_attn.v_proj", "attn_v", "kv", "hidden"),
    ("self_attn.o_proj", "attn_output", "hidden", "q"),
    ("mlp.gate_proj", "ffn_gate", "ffn", "hidden"),
    ("mlp.up_proj", "ffn_up", "ffn", "hidden"),
    ("mlp.down_proj", "ffn_down", "hidden", "ffn"),
)


def tensors(shape: Shape, layer: int | None) -> Iterator[tuple[str, str, Array]]:
    """(Hugging Face name, GGUF name, f16 values) of one layer, or of the tensors outside layers for None."""
    rng = np.random.default_rng(1000 + (layer if layer is not None else -1))
    size = {
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "q": shape.heads * shape.head_dim,
        "kv": shape.kv_heads * shape.head_dim,
    }

    def matrix(rows: int, cols: int) -> Array:
        return (rng.standard_normal((rows, cols), dtype=np.float32) * 0.02).astype(np.float16)

    if layer is None:
        yield "model.embed_tokens.weight", "token_embd.weight", matrix(shape.vocab, shape.hidden)
        yield "lm_head.weight", "output.weight", matrix(shape.vocab, shape.hidden)
        yield "model.norm.weight", "output_norm.weight", np.ones(shape.hidden, np.float16)
        return
    for hf, gguf, rows, cols in LAYER:
        yield (
            f"model.layers.{layer}.{hf}.weight",
            f"blk.{layer}.{gguf}.weight",
            matrix(size[rows], size[cols]),
        )
    for hf, gguf in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
        ones = np.ones(shape.hidden, np.float16)
        yield f"model.layers.{layer}.{hf}.weight", f"blk.{layer}.{gguf}.weight", ones


def write_folder(shape: Shape, folder: Path) -> Path:
    """Standard sharded Hugging Face folder, one shard a layer. Returns the folder; kept when it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for layer in (None, *range(shape.layers)):
        shard = "outside.safetensors" if layer is None else f"layer-{layer:02d}.safetensors"
        arrays = {hf: values for hf, _, values in tensors(shape, layer)}
        save_file(arrays, folder / shard)
        weight_map.update(dict.fromkeys(arrays, shard))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    vocabulary = {f"t{i}": i for i in range(shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # last: marks the folder whole
    return folder


def write_gguf(shape: Shape, path: Path, quantization: str = "Q4_0") -> Path:
    """The same weights for llama.cpp: matrices in `quantization`, the head in Q8_0 (ours is int8_row)."""
    if path.is_file():
        return path
    import gguf

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{i}>".encode() for i in range(shape.vocab)])
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types([1] * shape.vocab)
    kind = gguf.GGMLQuantizationType[quantization]
    head = gguf.GGMLQuantizationType.Q8_0
    for layer in (None, *range(shape.layers)):
        for _, name, values in tensors(shape, layer):
            exact = values.astype(np.float32)
            if exact.ndim == 1:
                writer.add_tensor(name, exact)
                continue
            to = head if layer is None else kind
            writer.add_tensor(name, gguf.quantize(exact, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()
    partial.rename(path)
    return path
