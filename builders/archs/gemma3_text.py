"""Gemma 3, text (Kamath et al. 2025): q/k norm; five windowed layers for each full one.

Each kind of layer has its own rotary base; a scaling holds for the full layers only.
"""

import math
from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import (
    Layer,
    build,
    layer_count,
    layer_types,
    read_decoder,
    read_window,
    window_of,
)
from builders.model_config import ModelConfig
from builders.rotary import Rotary, rotary_from


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(
        config, head_dim=256, activation_key="hidden_activation", activation="gelu_pytorch_tanh", tied=True
    )
    config.ignore("hidden_act")  # the model reads hidden_activation only
    config.only("use_bidirectional_attention", None, False, why="only causal models are supported")
    config.only(
        "attn_logit_softcapping", None, why="Gemma 3's own code ignores it, so its meaning is unclear"
    )
    window = read_window(config, 4096)
    pattern = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", 6))
    count = layer_count(config)
    types = layer_types(
        config, ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    )
    tables = _tables(config, decoder.head_dim, decoder.max_context, context)
    bias = config.read(bool, "attention_bias", False)
    return build(
        replace(
            decoder,
            layers=tuple(Layer(tables[kind], window_of(config, kind, window)) for kind in types),
            norm_offset=1.0,
            qk_norm=True,
            post_norms=True,
            qkv_bias=bias,
            o_bias=bias,
            embed_scale=math.sqrt(decoder.hidden),
            attention_scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
            logits_softcap=config.positive_or_null("final_logit_softcapping"),
        )
    )


def _tables(config: ModelConfig, head_dim: int, max_positions: int, context: int) -> dict[str, Rotary]:
    """Old configs: rope_theta and rope_scaling for full layers, rope_local_base_freq for windowed ones."""
    thetas = {
        "full_attention": config.positive("rope_theta", 1_000_000.0),
        "sliding_attention": config.positive("rope_local_base_freq", 10_000.0),
    }
    scaling = config.section("rope_scaling")
    nested = config.section("rope_parameters")
    tables: dict[str, Rotary] = {}
    for kind, theta in thetas.items():
        section = nested.section(kind) if nested is not None else None
        if kind == "full_attention" and scaling is not None:
            section = scaling
        if section is None:
            section = ModelConfig({}, f"{config.path}: rope_parameters: {kind}")
        tables[kind] = rotary_from(section, head_dim, max_positions, context, theta=theta)
    if nested is not None:
        nested.finish()
    return tables
