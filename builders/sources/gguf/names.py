"""GGUF's tensor names as Hugging Face's, and what llama.cpp's conversion changed in them.

Of Llama and its kin the rows of q and k are stored in pairs that rotate together (2i, 2i+1); ours, as Hugging
Face's, lie half a head apart (i, i + width/2). Gemma's norms are stored plus one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.engine.formats import Array

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {"ffn_up": "mlp.gate_up_proj"}
PERMUTED = ("llama", "mistral", "granite", "smollm3")
# Tables that went into the config
CONSUMED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of Hugging Face's is: GGUF's name, the rows of a head that rotate in pairs (0: none),
    and what is added to every value."""

    tensor: str
    paired: int = 0
    offset: float = 0.0


def places(architecture: str, config: dict[str, Any], tensors: list[str]) -> dict[str, Place]:
    """Hugging Face's name -> Place of every tensor that has one; others keep their own name."""
    block = dict(_BLOCK)
    if architecture.startswith("gemma"):
        block |= _GEMMA
    if architecture == "phi3":
        block |= _PHI3
    head_dim = config.get("head_dim", 0)
    found: dict[str, Place] = {}
    for tensor in tensors:
        if tensor in CONSUMED:
            continue
        parts = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)", tensor)
        key = _TOP.get(tensor, tensor)
        kind = ""
        if parts is not None and parts[2] in block:
            kind = parts[2]
            key = f"model.layers.{int(parts[1])}.{block[kind]}.{parts[3]}"
        paired = head_dim if architecture in PERMUTED and kind in ("attn_q", "attn_k") else 0
        norm = architecture.startswith("gemma") and key.endswith("norm.weight")
        found[key] = Place(tensor, paired, -1.0 if norm else 0.0)
    return found


def pair_order(head_dim: int) -> Array:
    """GGUF's row of every row of a head: (head_dim,)."""
    half = head_dim // 2
    return np.arange(head_dim).reshape(half, 2).T.reshape(-1)
