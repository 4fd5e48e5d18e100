"""SmolLM3 (Hugging Face 2025): Llama with no rotation in every fourth layer (Yang et al. 2501.18795)."""

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
from edge_runtime.errors import BadConfig


def read(config: ModelConfig, context: int) -> Architecture:
    decoder = read_decoder(config, tied=True)
    rotary = read_rotary(config, decoder.head_dim, decoder.max_context, context, theta=2_000_000.0)
    config.ignore("max_window_layers")
    count = layer_count(config)
    every = config.size("no_rope_layer_interval", 4)
    rotates = config.read_or_null(list, "no_rope_layers", None)  # despite its name: 1 = rotates
    if rotates is None:
        rotates = [int((i + 1) % every != 0) for i in range(count)]
    if len(rotates) < count or any(r not in (0, 1) for r in rotates):
        raise BadConfig(f"{config.path}: no_rope_layers must hold {count} entries of 0 or 1")
    window = read_window(config)
    if not config.read(bool, "use_sliding_window", False):
        window = None
    slides = ["sliding_attention" if window and not rotates[i] else "full_attention" for i in range(count)]
    types = layer_types(config, slides)
    bias = config.read(bool, "attention_bias", False)
    return build(
        replace(
            decoder,
            layers=tuple(
                Layer(rotary if rotates[i] else None, window_of(config, types[i], window))
                for i in range(count)
            ),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=config.read(bool, "mlp_bias", False),
        )
    )
