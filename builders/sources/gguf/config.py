"""A GGUF file's metadata as the config.json that its model had, by `general.architecture`.

Keys: gguf.md of ggml. What llama.cpp fixes in its own code and no key says (the pattern of Gemma's windows,
SmolLM3's layers without positions, the attention scale of the largest Gemmas) is said here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from builders.sources.gguf.header import Header
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, Unsupported, nearest

# general.architecture -> model_type
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",  # conversions say llama; its window is in no key
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "granite": "granite",
    "smollm3": "smollm3",
}
# Layers of the models whose attention is scaled by hidden_size / heads and not by the width of a head
_LARGEST = {"gemma2": 46, "gemma3": 62}


class Metadata:
    """Typed reading of one architecture's keys, `<architecture>.<key>`."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.values = header.metadata
        name = self.values.get("general.architecture")
        if name not in ARCHITECTURES:
            raise Unsupported(
                f"general.architecture is {name!r}; {nearest(str(name), ARCHITECTURES)} "
                f"(known: {', '.join(sorted(ARCHITECTURES))})"
            )
        self.architecture = str(name)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number, or the default where it is absent. Raises BadCheckpoint on anything else."""
        value = self.values.get(f"{self.architecture}.{key}")
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise BadCheckpoint(f"metadata {self.architecture}.{key} is {str(value)[:60]}, expected a number")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on that must be there, or the same for every layer. Raises BadCheckpoint."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or value < 1:
            found = "is absent" if value is None else f"is {str(value)[:60]}"
            raise BadCheckpoint(
                f"metadata {self.architecture}.{key} {found}, expected a whole number above 0"
            )
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, str) else None


def read_model_config(meta: Metadata, vectors: dict[str, Array]) -> dict[str, Any]:
    """config.json of the model. vectors: rope_freqs.weight, rope_factors_*.weight, where the file has them.

    Raises BadCheckpoint on a wrong or missing key.
    """
    tensors = meta.header.tensors
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise BadCheckpoint("the file has no token_embd.weight with two dimensions; is it a language model?")
    hidden, heads = meta.whole("embedding_length"), meta.whole("attention.head_count")
    head_dim = meta.whole("attention.key_length", max(hidden // heads, 1))
    if meta.whole("attention.value_length", head_dim) != head_dim:
        raise Unsupported(
            "attention.value_length differs from attention.key_length; such heads are not supported"
        )
    if meta.number("expert_count"):
        raise Unsupported("the file has experts (expert_count); mixtures of experts are not supported")
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[meta.architecture],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.whole("feed_forward_length"),
        "num_hidden_layers": meta.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.whole("attention.head_count_kv", heads),
        "max_position_embeddings": meta.whole("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if meta.architecture != "phi3":
        config["head_dim"] = head_dim
    theta = meta.number("rope.freq_base")
    if theta is not None:
        config["rope_theta"] = float(theta)
    scaling = _rope_scaling(meta, config["max_position_embeddings"], head_dim, vectors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | _TRAITS.get(meta.architecture, _llama)(meta, config, head_dim)


def _rope_scaling(
    meta: Metadata, longest: int, head_dim: int, vectors: dict[str, Array]
) -> dict[str, Any] | None:
    original = meta.whole("rope.scaling.original_context_length", longest)
    factor = meta.number("rope.scaling.factor")
    short, long = vectors.get("rope_factors_short.weight"), vectors.get("rope_factors_long.weight")
    if short is not None and long is not None:
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": original,
        }
        attention = meta.number("rope.scaling.attn_factor")
        return scaling if attention is None else scaling | {"attention_factor": float(attention)}
    freqs = vectors.get("rope_freqs.weight")
    if (
        freqs is not None
    ):  # Llama 3.1's scaling, worked out for every pair; longrope with one table says the same
        return {
            "rope_type": "longrope",
            "short_factor": freqs.tolist(),
            "long_factor": freqs.tolist(),
            "original_max_position_embeddings": longest,
            "attention_factor": 1.0,
        }
    kind = meta.text("rope.scaling.type") or ("linear" if factor is not None else None)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn") or factor is None:
        raise Unsupported(
            f"rope.scaling.type {kind!r} with factor {factor} is not supported; linear and yarn are"
        )
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling | {"original_max_position_embeddings": original} if kind == "yarn" else scaling


def _llama(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in meta.header.tensors}


def _qwen2(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    return {}


def _gemma(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    scalar = head_dim
    if config["num_hidden_layers"] == _LARGEST[meta.architecture]:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    traits: dict[str, Any] = {
        "query_pre_attn_scalar": float(scalar),
        "sliding_window": meta.whole("attention.sliding_window", 4096),
        "final_logit_softcapping": meta.number("final_logit_softcapping"),
    }
    if meta.architecture == "gemma2":
        return traits | {"attn_logit_softcapping": meta.number("attn_logit_softcapping")}
    local = meta.number("rope.freq_base_swa", 10000.0)
    return traits | {"rope_local_base_freq": local, "sliding_window_pattern": 6}


def _phi3(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    rotated = meta.whole("rope.dimension_count", head_dim)
    if rotated != head_dim:
        traits["partial_rotary_factor"] = rotated / head_dim
    if "rope_scaling" in config:  # beside the table too, where Phi-3's own code looks first
        original = config["rope_scaling"].get("original_max_position_embeddings")
        traits |= {"original_max_position_embeddings": original} if original else {}
    window = meta.number("attention.sliding_window")
    return traits | {"sliding_window": int(window)} if window else traits


def _granite(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    multipliers = {
        "attention_multiplier": meta.number("attention.scale", head_dim**-0.5),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
    }
    return multipliers | _llama(meta, config, head_dim)


def _smollm3(meta: Metadata, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4} | _llama(meta, config, head_dim)


_TRAITS = {
    "qwen2": _qwen2,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "granite": _granite,
    "smollm3": _smollm3,
}
