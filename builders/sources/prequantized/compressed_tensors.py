"""compressed-tensors checkpoints (llm-compressor): integers packed or as they are, FP8, NVFP4 and MXFP4.

What a module holds says how it is stored, the config only its bits and block:

* weight_packed i32 (out, in * bits / 32) with weight_shape: codes + 2^(bits-1), one stream of bits a row;
* weight i8 (out, in): codes as they are;
* weight E4M3 (out, in): FP8;
* weight_packed u8 (out, in / 2): E2M1, the first of two in the low half; weight_scale E4M3 (out, in / 16)
  over weight_global_scale (NVFP4), or powers of two, u8 (out, in / 32) (MXFP4).

weight_scale: one, one a row or one a group. weight_zero_point: like it, packed down the rows beside packed
weights. weight_g_idx: the group of each input (act-order). value = (code - zero) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from builders.model_config import ModelConfig
from builders.sources.act_order import read_order
from builders.sources.floats4 import Floats4
from builders.sources.integers import Integers
from builders.sources.matrix import Matrix
from builders.sources.module_keys import FLOATS, Module, modules
from builders.sources.prequantized.fp8 import Block, drop_activation_scales, float8, read_block
from builders.sources.shards import Shards
from builders.sources.words import unpack, word_count
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, BadConfig, Unsupported

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "dense",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one config group stores weights: group None for one scale a row (or a tensor, or a block)."""

    bits: int
    group: int | None
    block: Block | None


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every compressed module. Raises BadCheckpoint, BadConfig, Unsupported."""
    schemes = _schemes(config)
    config.ignore("ignore", "quantization_status", "global_compression_ratio", "version", "kv_cache_scheme")
    config.only("transform_config", None, {}, why="rotated checkpoints compute something else")
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.read(str, "format", "dense") != "dense":
        raise Unsupported(f"{config.path}: sparsity_config: sparse checkpoints are not read; save it dense")
    drop_activation_scales(shards, notices)
    found: dict[str, Matrix] = {}
    for module in modules(shards, "weight_packed"):
        packed = shards.entry(module.key("weight_packed")).dtype
        found[module.key("weight")] = _packed(module, schemes) if packed != "U8" else _fp4(module)
    for module in modules(shards, "weight_scale"):
        if not module.has("weight"):
            continue
        key = module.key("weight")
        if shards.entry(key).dtype == "F8_E4M3":
            block = next((scheme.block for scheme in schemes if scheme.block is not None), None)
            found[key] = float8(module, "weight_scale", block)
        else:
            found[key] = _whole(module, schemes)
    return found


def _schemes(config: ModelConfig) -> list[Scheme]:
    form = config.read(str, "format", "dense")
    if form not in FORMATS:
        raise Unsupported(f"{config.path}: format {form!r} is not read, only {', '.join(FORMATS)}")
    groups = config.section("config_groups")
    if groups is None:
        raise BadConfig(f"{config.path} has no config_groups; is it a compressed-tensors checkpoint?")
    schemes = []
    for name in groups.values:
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if weights is None:
            continue
        size = weights.read_or_null(int, "group_size", None)
        schemes.append(
            Scheme(
                bits=weights.read(int, "num_bits", 8),
                group=None if size == -1 else size,
                block=read_block(weights, "block_structure"),
            )
        )
    return schemes


def _packed(module: Module, schemes: list[Scheme]) -> Integers:
    rows, words = module.shape("weight_packed", 2, "I32")
    module.expect("weight_shape", module.shape("weight_shape", 1, "I64", "I32"), (2,))
    shape = tuple(int(n) for n in module.raw("weight_shape"))
    cols = shape[1]
    scheme = next((s for s in schemes if shape[0] == rows and word_count(cols, s.bits) == words), None)
    if scheme is None or cols < 1 or not 1 <= scheme.bits <= 8:
        bits = ", ".join(str(s.bits) for s in schemes)
        raise BadCheckpoint(
            f"tensor {module.key('weight_packed')!r} has shape {(rows, words)}, "
            f"expected {shape} packed to {bits} bits"
        )
    bits = scheme.bits
    read_scale, groups, group = _scales(module, (rows, cols), schemes)
    read_zero = None
    if module.has("weight_zero_point"):
        if module.shards.entry(module.key("weight_zero_point")).dtype == "I32":
            wanted = (word_count(rows, bits), groups)
            module.expect("weight_zero_point", module.shape("weight_zero_point", 2, "I32"), wanted)

            def read_zero() -> Array:
                return unpack(module.raw("weight_zero_point"), bits, rows).astype(np.int16)

        else:
            read_zero = _zero(module, (rows, groups), bits)
    order = None
    if module.has("weight_g_idx"):
        module.expect("weight_g_idx", module.shape("weight_g_idx", 1, "I32", "I64"), (cols,))
        if module.raw("weight_g_idx").min() >= 0:  # -1 for those that were never reordered
            order, group = read_order(module, "weight_g_idx", groups)

    def codes() -> Array:
        words = np.ascontiguousarray(module.raw("weight_packed").T)
        found = unpack(words, bits, cols)
        return np.ascontiguousarray((found if order is None else found[order]).T)

    return Integers(
        (rows, cols),
        bits=bits,
        group=group,
        read_scale=read_scale,
        read_zero=read_zero,
        read=codes,
        order=order,
    )


def _whole(module: Module, schemes: list[Scheme]) -> Integers:
    """weight i8: codes of 8 bits, or of fewer in a byte each."""
    rows, cols = shape = module.shape("weight", 2, "I8")
    bits = schemes[0].bits if schemes and all(s.bits == schemes[0].bits for s in schemes) else 8
    read_scale, groups, group = _scales(module, shape, schemes)
    read_zero = _zero(module, (rows, groups), bits) if module.has("weight_zero_point") else None
    middle = 1 << (bits - 1)

    def codes() -> Array:
        raw = module.raw("weight")
        if raw.min() < -middle or raw.max() >= middle:
            raise BadCheckpoint(
                f"tensor {module.key('weight')!r} holds {raw.min()} to {raw.max()}, more than {bits} bits"
            )
        return (raw.astype(np.int16) + middle).astype(np.uint8)

    return Integers(
        (rows, cols), bits=bits, group=group, read_scale=read_scale, read_zero=read_zero, read=codes
    )


def _scales(
    module: Module, shape: tuple[int, int], schemes: list[Scheme]
) -> tuple[Callable[[], Array], int, int]:
    """(reads f32 scales (rows, groups), groups, columns of a group). Raises BadCheckpoint."""
    rows, cols = shape
    size = module.shards.entry(module.key("weight_scale")).shape
    module.shape("weight_scale", len(size), *FLOATS)
    if math.prod(size) == 1:
        return lambda: np.repeat(module.scales("weight_scale").reshape(1, 1), rows, axis=0), 1, cols
    columns = {-(-cols // s.group): s.group for s in schemes if s.group is not None}
    wanted = [(rows, 1), (rows,), *((rows, count) for count in columns)]
    module.expect("weight_scale", size, *wanted)
    groups = math.prod(size) // rows
    return lambda: module.scales("weight_scale").reshape(rows, groups), groups, columns.get(groups, cols)


def _zero(module: Module, shape: tuple[int, int], bits: int) -> Callable[[], Array]:
    """Reads zero points as codes from 0 on: i16, of that shape."""
    key = module.key("weight_zero_point")
    size = module.shards.entry(key).shape
    module.shape("weight_zero_point", len(size), "I8", *FLOATS)
    if math.prod(size) not in (1, shape[0] * shape[1]):
        raise BadCheckpoint(f"tensor {key!r} has shape {size}, expected {shape}")
    middle = 1 << (bits - 1)

    def read() -> Array:
        whole = module.shards.entry(key).dtype == "I8"
        raw = module.raw("weight_zero_point") if whole else module.scales("weight_zero_point")
        shifted = raw.astype(np.float32) + middle
        if shifted.min() < 0 or shifted.max() >= 2 * middle:
            raise BadCheckpoint(f"tensor {key!r} lies outside {bits} bits")
        wide = shifted.reshape(1, 1) if raw.size == 1 else shifted.reshape(shape)
        return np.broadcast_to(wide, shape).astype(np.int16)

    return read


def _fp4(module: Module) -> Floats4:
    rows, half = module.shape("weight_packed", 2, "U8")
    shape = rows, 2 * half
    nv = module.has("weight_global_scale")
    size = module.shape("weight_scale", 2, *(("F8_E4M3",) if nv else ("U8", "F8_E8M0")))
    module.expect("weight_scale", size, (rows, 2 * half // (16 if nv else 32)))
    scale, shared = module.raw("weight_scale"), None
    if nv:
        count = module.shards.entry(module.key("weight_global_scale")).shape
        module.shape("weight_global_scale", len(count), "F32")
        found = module.scales("weight_global_scale")
        if found.size != 1 or not found.reshape(-1)[0] > 0:
            raise BadCheckpoint(f"tensor {module.key('weight_global_scale')!r} is not one number above 0")
        shared = float(found.reshape(-1)[0])
    if ((scale & (0x7F if nv else 0xFF)) == (0x7F if nv else 0xFF)).any():
        raise BadCheckpoint(f"tensor {module.key('weight_scale')!r} holds NaN; the checkpoint is damaged")
    return Floats4(shape, scale=scale, shared=shared, read=lambda: module.raw("weight_packed"))
