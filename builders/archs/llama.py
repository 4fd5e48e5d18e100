"""Llama (Touvron et al. 2023) and all that kept its shape."""

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
        )
    )
