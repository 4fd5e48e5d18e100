"""Mistral (Jiang et al. 2023): Llama with one attention window in every layer."""

from dataclasses import replace

from builders.architecture import Architecture
from builders.decoder import Layer, build, layer_count, read_decoder, uniform_windows
from builders.model_config import ModelConfig
from builders.rotary import read_rotary


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config)
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context)
    windows = uniform_windows(config, layer_count(config), default=4096)
    return build(replace(decoder, layers=tuple(Layer(rotary, window) for window in windows)))
