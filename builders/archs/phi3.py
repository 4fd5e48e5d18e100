"""Phi-3, Phi-3.5 and Phi-4-mini (Abdin et al. 2024): fused projections, partial rotation, longrope."""

from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import Layer, build, layer_count, read_decoder, uniform_windows
from builders.model_config import ModelConfig
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config, kv_heads_default=True)
    rotary = read_rotary(
        config,
        decoder.head_dim,
        decoder.max_context,
        context,
        original=4096,
        partial=True,
        yarn_is_longrope=True,
    )
    windows = uniform_windows(config, layer_count(config), default=None)
    return build(replace(decoder, layers=tuple(Layer(rotary, window) for window in windows), fused=True))
