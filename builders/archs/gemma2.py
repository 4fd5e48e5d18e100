"""Gemma 2 (Riviere et al. 2024): four norms a layer, soft caps, every other layer with a window."""

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
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(
        config, head_dim=256, activation_key="hidden_activation", activation="gelu_pytorch_tanh", tied=True
    )
    config.ignore("hidden_act")  # the model reads hidden_activation only
    config.only("use_bidirectional_attention", None, False, why="only causal models are supported")
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context)
    window = read_window(config, 4096)
    config.only("sliding_window_size", window, why="it contradicts sliding_window")
    alternate = [("full_attention" if i % 2 else "sliding_attention") for i in range(layer_count(config))]
    bias = config.read(bool, "attention_bias", False)
    return build(
        replace(
            decoder,
            layers=tuple(Layer(rotary, window_of(config, t, window)) for t in layer_types(config, alternate)),
            norm_offset=1.0,
            post_norms=True,
            qkv_bias=bias,
            o_bias=bias,
            embed_scale=math.sqrt(decoder.hidden),
            attention_scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=config.positive_or_null("attn_logit_softcapping", 50.0),
            logits_softcap=config.positive_or_null("final_logit_softcapping", 30.0),
        )
    )
