"""Each architecture through GGUF: a random transformers model, converted as llama.cpp converts it, must give
the same logits as transformers gives. What the conversion does is written here once more.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import GEMMA, GRANITE, LINEAR, LLAMA3, PHI3, VOCAB, YARN, Case, case, longrope
from gguf_files import NAMES, Raw, gguf_bytes, paired_rows, spm_metadata
from test_archs import BOUND, PROMPT, Ours, random_model, relative, theirs, tokens_of

from builders.archs import read_program
from builders.sources import open_source
from builders.weights import CheckpointWeights
from edge_runtime.errors import Unsupported

GEMMA_HEADS = GEMMA | {"query_pre_attn_scalar": 8}  # llama.cpp scales by the width of a head
CASES = [
    case("llama", "gguf"),
    case("llama", "gguf-tied-wide", tie_word_embeddings=True, head_dim=12),
    case("llama", "gguf-linear", rope_parameters=LINEAR),
    case("llama", "gguf-llama3", rope_parameters=LLAMA3),
    case("qwen2", "gguf", tie_word_embeddings=True),
    case("qwen2", "gguf-yarn", rope_parameters=YARN),
    case("qwen3", "gguf", head_dim=16),
    case("gemma2", "gguf", **GEMMA_HEADS),
    case("gemma3_text", "gguf", **GEMMA_HEADS, num_hidden_layers=7, sliding_window_pattern=6),
    case("phi3", "gguf", **PHI3),
    case("phi3", "gguf-window-partial", **PHI3, sliding_window=6, partial_rotary_factor=0.5),
    case("phi3", "gguf-longrope", **PHI3, rope_parameters=longrope(8), original_max_position_embeddings=24),
    case("granite", "gguf", **GRANITE),
    case("smollm3", "gguf", num_hidden_layers=4),
]
EXTRA_NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"gemma3_text": "gemma3"}


def llama3_factors(config: Any, rope: dict[str, Any]) -> np.ndarray:
    """What each pair's frequency is divided by."""
    width = config.hidden_size // config.num_attention_heads
    original, low, high = (
        rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def metadata_of(c: Case, config: Any) -> tuple[dict[str, Any], dict[str, Raw]]:
    """GGUF's keys of a transformers config, and the tables that go in as tensors."""
    a = ARCHITECTURES.get(c.model_type, c.model_type)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": width,
        "attention.value_length": width,
    }
    rope = dict(config.rope_parameters)
    tables: dict[str, Raw] = {}
    if c.model_type == "gemma3_text":
        keys["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = dict(rope["full_attention"])
    keys["rope.freq_base"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "llama3":
        found = llama3_factors(config, rope)
        tables["rope_freqs.weight"] = ("F32", found.shape, found.tobytes())
    if kind == "longrope":
        for side in ("short", "long"):
            found = np.array(rope[f"{side}_factor"], np.float32)
            tables[f"rope_factors_{side}.weight"] = ("F32", found.shape, found.tobytes())
    if c.model_type == "phi3":
        keys["rope.dimension_count"] = int(width * c.config.get("partial_rotary_factor", 1.0))
    if c.model_type == "granite":
        keys |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if "gemma" in c.model_type or (c.model_type == "phi3" and config.sliding_window):
        keys["attention.sliding_window"] = config.sliding_window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.to_dict().get(key) is not None:
            keys[key] = float(config.to_dict()[key])
    return {"general.architecture": a} | {f"{a}.{k}": v for k, v in keys.items()}, tables


def tensors_of(c: Case, model: Any) -> dict[str, Raw]:
    config, found = model.config, {}
    names = NAMES | EXTRA_NAMES | (GEMMA_NAMES if "gemma" in c.model_type else {})
    for key, tensor in model.state_dict().items():
        values = tensor.numpy()
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, leaf = key.rsplit(".", 1)
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            name = f"blk.{layer}.{names[rest]}.{leaf}"
        else:
            name = f"{names[module]}.{leaf}"
        if c.model_type in ("llama", "granite", "smollm3"):
            for side, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                if f".{side}_proj." in key:
                    values = paired_rows(values, heads)
        if "gemma" in c.model_type and key.endswith("norm.weight"):
            values = values + np.float32(1)
        found[name] = ("F32", values.shape, values.astype("<f4").tobytes())
    return found


@pytest.mark.parametrize("c", CASES, ids=str)
def test_logits_equal_transformers(c: Case, tmp_path: Path) -> None:
    model = random_model(c)
    metadata, tables = metadata_of(c, model.config)
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 3))]
    vocabulary = spm_metadata({"model": {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}})
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata | vocabulary, tensors_of(c, model) | tables))
    with open_source(path) as source:
        architecture = read_program(source.config)
        ours = Ours(architecture, CheckpointWeights(architecture, source))
        ids = tokens_of(c)
        want, _ = theirs(model, ids)
        assert relative(ours.step(ids[:PROMPT]), want) <= BOUND


def test_other_architectures_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "qwen33"}, {}))
    with pytest.raises(Unsupported, match=r"did you mean 'qwen3'.*granite"):
        open_source(path)
