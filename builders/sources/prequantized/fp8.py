"""FP8 checkpoints (quant_method fp8): weight E4M3 (out, in), weight_scale or DeepSeek's weight_scale_inv.

Either is what a code is multiplied with, whatever its name: one for the tensor, one a row, or one for a block
of weight_block_size rows and columns (128 x 128). Static scales of activations mean nothing here: they are
quantized anew, token by token.
"""

from __future__ import annotations

import numpy as np

from builders.model_config import ModelConfig
from builders.sources.floats8 import Floats8
from builders.sources.matrix import Matrix
from builders.sources.module_keys import FLOATS, Module, modules
from builders.sources.shards import Shards
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, BadConfig, Unsupported

ACTIVATION_SCALES = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale",
    "activation_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip
Block = tuple[int, int]


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every module with an FP8 weight. Raises BadCheckpoint, BadConfig, Unsupported (E5M2)."""
    kind = config.read(str, "fmt", "e4m3").lower()
    if kind not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
        raise Unsupported(f"{config.path}: fmt {kind!r} is not read, only e4m3")
    block = read_block(config, "weight_block_size")
    config.ignore("activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize")
    drop_activation_scales(shards, notices)
    found: dict[str, Matrix] = {}
    for module in modules(shards, "weight"):
        dtype = shards.entry(module.key("weight")).dtype
        if dtype == "F8_E5M2":
            raise Unsupported(f"tensor {module.key('weight')!r} is F8_E5M2, only F8_E4M3 is read")
        if dtype == "F8_E4M3":
            scale = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
            found[module.key("weight")] = float8(module, scale, block)
    return found


def read_block(config: ModelConfig, key: str) -> Block | None:
    """[rows, columns] of a block, or None. Raises BadConfig."""
    value = config.read_or_null(list, key, None)
    if value is None:
        return None
    if len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise BadConfig(f"{config.path}: {key} is {value!r}, expected two whole numbers above 0")
    return value[0], value[1]


def drop_activation_scales(shards: Shards, notices: list[str]) -> None:
    """Set aside what an activation or KV cache is scaled by; says so once."""
    found = [key for key in shards if key.rsplit(".", 1)[-1] in ACTIVATION_SCALES]
    shards.taken.update(found)
    if found:
        notices.append(
            f"{len(found)} scales of activations or of the KV cache were set aside, such as {found[0]!r}: "
            "activations are quantized anew for every token"
        )


def float8(module: Module, scale_suffix: str, block: Block | None) -> Floats8:
    """The matrix of `weight` and its scales. Raises BadCheckpoint."""
    shape = module.shape("weight", 2, "F8_E4M3")
    found, scale = read_scale(module, scale_suffix, shape, block)

    def codes() -> Array:
        raw = module.raw("weight")
        if ((raw & 0x7F) == 0x7F).any():
            raise BadCheckpoint(f"tensor {module.key('weight')!r} holds NaN; the checkpoint is damaged")
        return raw

    return Floats8(shape, block=found, scale=scale, read=codes)


def read_scale(
    module: Module, suffix: str, shape: tuple[int, int], block: Block | None
) -> tuple[Block, Array]:
    """(rows and columns that share a scale, f32 scales (row blocks, column blocks)). Raises BadCheckpoint."""
    rows, cols = shape
    key = module.key(suffix)
    if key not in module.shards:
        raise BadCheckpoint(f"tensor {module.key('weight')!r} has no {key!r}; the checkpoint is incomplete")
    size = module.shards.entry(key).shape
    module.shape(suffix, len(size), *FLOATS)
    scale = module.scales(suffix)
    if scale.size == 1:
        return shape, scale.reshape(1, 1).astype(np.float32)
    wanted = [(rows,), (rows, 1)]
    if block is not None:
        wanted.append((-(-rows // block[0]), -(-cols // block[1])))
    module.expect(suffix, size, *wanted)
    if block is not None and size == wanted[-1]:
        return block, scale
    return (1, cols), scale.reshape(rows, 1)
