"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on q, k and v; windows in the later layers, when in use."""

from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import Layer, build, layer_count, qwen_windows, read_decoder
from builders.model_config import ModelConfig
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config)
    config.ignore("attention_bias")  # q, k and v always have one, whatever it says
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context)
    windows = qwen_windows(config, layer_count(config))
    return build(replace(decoder, layers=tuple(Layer(rotary, window) for window in windows), qkv_bias=True))
