"""Granite 3, dense (IBM 2024): Llama with four multipliers."""

from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import Layer, build, layer_count, read_decoder
from builders.model_config import ModelConfig
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config, kv_heads_default=True)
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context)
    bias = config.read(bool, "attention_bias", False)
    return build(
        replace(
            decoder,
            layers=(Layer(rotary),) * layer_count(config),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=config.read(bool, "mlp_bias", False),
            embed_scale=config.positive("embedding_multiplier", 1.0),
            residual_scale=config.positive("residual_multiplier", 1.0),
            attention_scale=config.positive("attention_multiplier", 1.0),
            logits_scale=1.0 / config.positive("logits_scaling", 1.0),
        )
    )
