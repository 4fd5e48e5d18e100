"""GGUF files written from the specification (gguf.md), and slow decoders of its block types."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
# name -> (GGML's number, values of a block, bytes of a block)
DISTINCT = 37  # rows of a random matrix of blocks; no head has a multiple of it
KINDS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip
# byte offsets of the f16 fields of a block
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
Raw = tuple[str, tuple[int, ...], bytes]  # type, shape outermost first, data


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A metadata value with its type: bool, int (u32), float (f32), text or a list of one of them."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    inner = [value(i) for i in item]
    return struct.pack("<IIQ", 9, struct.unpack("<I", inner[0][:4])[0], len(inner)) + b"".join(
        i[4:] for i in inner
    )


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Raw], alignment: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", KINDS[kind][0], len(data))
        data += raw
    return head + bytes(-len(head) % alignment) + data


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator) -> bytes:
    """Any codes, with f16 fields of about the size that a trained matrix has."""
    _, size, nbytes = KINDS[kind]
    raw = rng.integers(0, 256, (rows * cols // size, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.normal(0, 0.01 if kind[-1] != "K" else 0.0005, len(raw)).astype("<f2")
        raw[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw.tobytes()


def nbytes_of(kind: str, shape: tuple[int, ...]) -> int:
    _, size, nbytes = KINDS[kind]
    return int(np.prod(shape)) // size * nbytes


def decode(kind: str, data: bytes, shape: tuple[int, ...]) -> Array:
    """f32 values, each computed on its own as ggml-quants.c does."""
    if kind in ("F32", "F16"):
        return np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float32).reshape(shape)
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    _, size, nbytes = KINDS[kind]
    blocks = [data[i : i + nbytes] for i in range(0, len(data), nbytes)]
    out = [SLOW[kind](block, i) for block in blocks for i in range(size)]
    return np.array(out, np.float32).reshape(shape)


def _f16(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block, "<f2", 1, at)[0])


def _nibble(block: bytes, at: int, i: int, half: int) -> int:
    """Code i of a run of 2 * half, low halves first."""
    return (block[at + i % half] >> (4 * (i // half))) & 15


def _fifth(block: bytes, at: int, i: int) -> int:
    return ((struct.unpack_from("<I", block, at)[0] >> i) & 1) << 4


def _q8_0(block: bytes, i: int) -> np.float32:
    return _f16(block, 0) * np.float32(struct.unpack_from("<b", block, 2 + i)[0])


def _k4(block: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4: scale and minimum j of the 12 bytes at 4."""
    q = block[4:16]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


def _k45(block: bytes, i: int, code: int) -> np.float32:
    scale, least = _k4(block, i // 32)
    return _f16(block, 0) * np.float32(scale) * np.float32(code) - _f16(block, 2) * np.float32(least)


def _q4_k(block: bytes, i: int) -> np.float32:
    return _k45(block, i, _nibble(block, 16 + i // 64 * 32, i % 64, 32))


def _q5_k(block: bytes, i: int) -> np.float32:
    code = _nibble(block, 48 + i // 64 * 32, i % 64, 32) | ((block[16 + i % 32] >> (i // 32)) & 1) << 4
    return _k45(block, i, code)


def _q2_k(block: bytes, i: int) -> np.float32:
    half, rest = divmod(i, 128)
    code = (block[16 + half * 32 + rest % 32] >> (2 * (rest // 32))) & 3
    both = block[i // 16]
    scale = _f16(block, 80) * np.float32(both & 15)
    return scale * np.float32(code) - _f16(block, 82) * np.float32(both >> 4)


def _q3_k(block: bytes, i: int) -> np.float32:
    half, rest = divmod(i, 128)
    low = (block[32 + half * 32 + rest % 32] >> (2 * (rest // 32))) & 3
    high = (block[i % 32] >> (i // 32)) & 1
    j = i // 16
    scales = block[96:108]
    scale = ((scales[j % 8] >> (4 * (j // 8))) & 15) | ((scales[8 + j % 4] >> (2 * (j // 4))) & 3) << 4
    return _f16(block, 108) * np.float32(scale - 32) * np.float32(low - (0 if high else 4))


def _q6_k(block: bytes, i: int) -> np.float32:
    half, rest = divmod(i, 128)
    low = _nibble(block, half * 64, rest, 64)
    high = (block[128 + half * 32 + rest % 32] >> (2 * (rest // 32))) & 3
    scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
    return _f16(block, 208) * np.float32(scale) * np.float32((low | high << 4) - 32)


SLOW: dict[str, Callable[[bytes, int], np.float32]] = {
    "Q4_0": lambda b, i: _f16(b, 0) * np.float32(_nibble(b, 2, i, 16) - 8),
    "Q4_1": lambda b, i: _f16(b, 0) * np.float32(_nibble(b, 4, i, 16)) + _f16(b, 2),
    "Q5_0": lambda b, i: _f16(b, 0) * np.float32((_nibble(b, 6, i, 16) | _fifth(b, 2, i)) - 16),
    "Q5_1": lambda b, i: _f16(b, 0) * np.float32(_nibble(b, 8, i, 16) | _fifth(b, 4, i)) + _f16(b, 2),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def spm_metadata(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """GGUF's vocabulary of a tokenizer.json that was a SentencePiece BPE: scores fall with the merges."""
    vocab = tokenizer["model"]["vocab"]
    ranks = {"".join(pair): -float(r) for r, pair in reversed(list(enumerate(tokenizer["model"]["merges"])))}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {"<unk>": 2, "<s>": 3, "</s>": 3}
    kinds = [special.get(t, 6 if t.startswith("<0x") else 1) for t in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [ranks.get(t, -1e6) for t in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def llama_metadata(config: dict[str, Any], architecture: str = "llama") -> dict[str, Any]:
    """GGUF's keys of a Hugging Face Llama config."""
    a = architecture
    return {
        "general.architecture": a,
        f"{a}.block_count": config["num_hidden_layers"],
        f"{a}.context_length": config["max_position_embeddings"],
        f"{a}.embedding_length": config["hidden_size"],
        f"{a}.feed_forward_length": config["intermediate_size"],
        f"{a}.attention.head_count": config["num_attention_heads"],
        f"{a}.attention.head_count_kv": config["num_key_value_heads"],
        f"{a}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{a}.rope.freq_base": float(config["rope_theta"]),
    }


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(key: str) -> str:
    """GGUF's name of a Llama tensor of Hugging Face's."""
    module, leaf = key.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def paired_rows(weight: Array, heads: int) -> Array:
    """What llama.cpp's conversion does to q and k: halves of a head become pairs."""
    out = np.empty_like(weight)
    width = weight.shape[0] // heads
    for h in range(heads):
        for i in range(width // 2):
            out[h * width + 2 * i] = weight[h * width + i]
            out[h * width + 2 * i + 1] = weight[h * width + width // 2 + i]
    return out


def unpaired_rows(weight: Array, heads: int) -> Array:
    """The inverse."""
    order = paired_rows(np.arange(weight.shape[0])[:, None], heads)[:, 0]
    out = np.empty_like(weight)
    out[order] = weight
    return out


def write_gguf_llama(
    path: Path,
    kind: str,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    vocabulary: dict[str, Any],
) -> dict[str, Array]:
    """A random Llama, matrices in blocks of one type, the embedding F16; gives the values by HF's names."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Raw] = {}
    values: dict[str, Array] = {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            found = ("F32", shape, np.ones(shape, "<f4").tobytes())
        elif "embed" in key or kind in ("F16", "F32", "BF16"):
            normal = rng.normal(0, shape[1] ** -0.5, shape).astype("<f4")
            name = "F16" if "embed" in key else kind
            data = normal.view("<u4") >> 16 if name == "BF16" else normal
            found = (name, shape, data.astype({"F16": "<f2", "F32": "<f4", "BF16": "<u2"}[name]).tobytes())
        else:
            found = (kind, shape, random_blocks(kind, min(DISTINCT, shape[0]), shape[1], rng))
        if len(found[2]) < nbytes_of(*found[:2]):  # the same rows again: the slow decoders need not see them
            again = np.arange(shape[0]) % DISTINCT
            values[key] = decode(found[0], found[2], (DISTINCT, shape[1]))[again]
            lines = np.frombuffer(found[2], np.uint8).reshape(DISTINCT, -1)
            found = (found[0], shape, lines[again].tobytes())
        else:
            values[key] = decode(found[0], found[2], shape)
        tensors[gguf_name(key)] = found
        for side, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".{side}_proj." in key:
                values[key] = unpaired_rows(values[key], config[heads])
    path.write_bytes(gguf_bytes(llama_metadata(config) | vocabulary, tensors))
    return values
