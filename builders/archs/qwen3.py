"""Qwen3, dense (Yang et al. 2025): q/k norm on each head instead of biases."""

from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import Layer, build, layer_count, qwen_windows, read_decoder
from builders.model_config import ModelConfig
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config, head_dim=128)
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context)
    windows = qwen_windows(config, layer_count(config))
    bias = config.read(bool, "attention_bias", False)
    return build(
        replace(
            decoder,
            layers=tuple(Layer(rotary, window) for window in windows),
            qk_norm=True,
            qkv_bias=bias,
            o_bias=bias,
        )
    )
