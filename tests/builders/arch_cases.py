"""Small configs that cover every trait of the supported architectures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

VOCAB, CONTEXT = 97, 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1000.0}
YARN_ALL = YARN | {
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "truncate": False,
}


def longrope(pairs: int, original: int = 24) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.7 * i for i in range(pairs)],
        "original_max_position_embeddings": original,
        "rope_theta": 10000.0,
    }


@dataclass(frozen=True)
class Case:
    model_type: str
    name: str
    config: dict[str, Any]
    context: int | None = None

    def __str__(self) -> str:
        return f"{self.model_type}-{self.name}"


def case(model_type: str, name: str, context: int | None = None, **config: Any) -> Case:
    return Case(model_type, name, config, context)


MIX = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
PHI3 = {"num_attention_heads": 4, "hidden_size": 64}  # head_dim 16
CASES = [
    case("llama", "untied-gqa"),
    case("llama", "tied-bias", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12),
    case("llama", "mha", num_key_value_heads=6),
    case("llama", "gelu", hidden_act="gelu"),
    case("llama", "gelu_new", hidden_act="gelu_new"),
    case("llama", "relu", hidden_act="relu"),
    case("llama", "linear", rope_parameters=LINEAR),
    case("llama", "llama3", rope_parameters=LLAMA3),
    case("llama", "yarn", rope_parameters=YARN),
    case("llama", "yarn-all", rope_parameters=YARN_ALL, head_dim=16),
    case("llama", "yarn-attention-factor", rope_parameters=YARN | {"attention_factor": 1.3}),
    case("llama", "longrope-long", rope_parameters=longrope(4)),
    case("llama", "longrope-short", rope_parameters=longrope(4, 64), context=64),
    case("mistral", "window", sliding_window=7),
    case("mistral", "no-window", sliding_window=None, head_dim=12, tie_word_embeddings=True),
    case("mistral", "yarn", sliding_window=None, rope_parameters=YARN),
    case("qwen2", "tied", tie_word_embeddings=True),
    case("qwen2", "window", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    case("qwen2", "layer-types", use_sliding_window=True, sliding_window=5, layer_types=MIX),
    case("qwen2", "yarn", rope_parameters=YARN),
    case("qwen3", "untied", head_dim=16),
    case("qwen3", "tied-bias", head_dim=8, tie_word_embeddings=True, attention_bias=True),
    case("qwen3", "window", head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    case("qwen3", "yarn", head_dim=16, rope_parameters=YARN),
    case("gemma2", "tied", **GEMMA),
    case("gemma2", "untied-bias", **GEMMA, tie_word_embeddings=False, attention_bias=True),
    case("gemma2", "no-caps", **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    case("gemma2", "tight-caps", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    case("gemma2", "linear", **GEMMA, rope_parameters=LINEAR),
    case("gemma3_text", "tied", **GEMMA, layer_types=MIX),
    case("gemma3_text", "untied", **GEMMA, layer_types=MIX, tie_word_embeddings=False, attention_bias=True),
    case("gemma3_text", "pattern-cap", **GEMMA, sliding_window_pattern=2, final_logit_softcapping=3.0),
    case(
        "gemma3_text",
        "linear",
        **GEMMA,
        layer_types=MIX,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    case("phi3", "fused", **PHI3),
    case("phi3", "tied-window", **PHI3, tie_word_embeddings=True, sliding_window=6),
    case("phi3", "partial", **PHI3, partial_rotary_factor=0.5),
    case(
        "phi3",
        "longrope-long",
        **PHI3,
        rope_parameters=longrope(8),
        original_max_position_embeddings=24,
    ),
    case(
        "phi3",
        "longrope-short-partial",
        **PHI3,
        rope_parameters=longrope(6, 64) | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=64,
        partial_rotary_factor=0.75,
        context=64,
    ),
    case("smollm3", "no-rope", no_rope_layer_interval=2),
    case("smollm3", "untied-bias", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    case("smollm3", "window", use_sliding_window=True, sliding_window=5, no_rope_layers=[1, 0, 0]),
    case("smollm3", "yarn", rope_parameters=YARN, no_rope_layer_interval=3),
    case("granite", "multipliers", **GRANITE),
    case("granite", "tied-bias", **GRANITE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    case("granite", "linear", **GRANITE, rope_parameters=LINEAR),
]


def config_of(c: Case) -> Any:
    # Copies, because transformers completes rope_parameters in place
    return transformers.AutoConfig.for_model(c.model_type, **json.loads(json.dumps(SMALL | c.config)))


def json_of(c: Case, **changes: Any) -> dict[str, Any]:
    """What transformers writes to config.json, with changes."""
    config: dict[str, Any] = json.loads(config_of(c).to_json_string())
    return config | changes


def find(name: str) -> Case:
    return next(c for c in CASES if str(c) == name)
