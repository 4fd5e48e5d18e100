"""bitsandbytes checkpoints: NF4 (QLoRA, Dettmers et al. 2305.14314) and LLM.int8() (2208.07339).

NF4: weight u8, two codes a byte, the first in the high half, blocks running over the flat tensor;
weight.absmax f32, or u8 codes with weight.nested_absmax and weight.nested_quant_map (double quantization).
weight.quant_state.bitsandbytes__nf4 is JSON: shape, blocksize, nested_offset. value = NF4[code] * absmax.
int8: weight i8 (out, in), SCB f32 (out,): the greatest magnitude of each row. value = code * (SCB / 127);
the library multiplies by SCB and by 1/127 one after the other, which differs by 2^-22 of a value at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from builders.model_config import ModelConfig
from builders.sources.integers import Integers
from builders.sources.matrix import Matrix
from builders.sources.module_keys import Module, modules
from builders.sources.normal_floats import NESTED, Nested, NormalFloats
from builders.sources.shards import Shards
from edge_runtime.engine.folder import parse_object
from edge_runtime.engine.formats import Array
from edge_runtime.engine.formats.nf4 import NF4
from edge_runtime.engine.formats.nf4_double import DYNAMIC
from edge_runtime.errors import BadCheckpoint, Unsupported

_STATE = "weight.quant_state.bitsandbytes__nf4"
_CONFIG = re.compile(r"_?load_in_[48]bit|bnb_4bit_.*|llm_int8_.*|_?quant_method|modules_to_not_convert")


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every NF4 module and every int8 one. Raises BadCheckpoint, Unsupported (FP4)."""
    kind = config.read_or_null(str, "bnb_4bit_quant_type", None)
    fp4 = next((key for key in shards if key.endswith("quant_state.bitsandbytes__fp4")), None)
    if fp4 is not None or (kind == "fp4" and config.read_or_null(bool, "load_in_4bit", False)):
        raise Unsupported(
            f"{config.path}: bnb_4bit_quant_type fp4 is not read ({fp4 or 'named by the config'}); use nf4"
        )
    config.ignore(*(key for key in config.values if _CONFIG.fullmatch(key)))
    found: dict[str, Matrix] = {}
    for module in modules(shards, _STATE):
        found[f"{module.name}.weight"] = _nf4(module)
    for module in modules(shards, "SCB"):
        found[f"{module.name}.weight"] = _int8(module)
    return found


def _int8(module: Module) -> Integers:
    rows, cols = module.shape("weight", 2, "I8")
    module.expect("SCB", module.shape("SCB", 1, "F32"), (rows,))
    if module.set_aside("weight_format") and module.raw("weight_format").any():
        raise Unsupported(
            f"tensor {module.key('weight_format')!r} names a kernel's own order, expected 0 (rows)"
        )
    return Integers(
        (rows, cols),
        bits=8,
        group=cols,
        read_scale=lambda: module.scales("SCB").reshape(rows, 1) / np.float32(127),
        read_zero=None,
        read=lambda: module.raw("weight").view(np.uint8) ^ np.uint8(128),
    )


def _nf4(module: Module) -> NormalFloats:
    module.set_aside(_STATE)
    state = parse_object(module.raw(_STATE).tobytes(), module.key(_STATE))
    rows, cols = shape = _shape(module, state.get("shape"))
    block = state.get("blocksize")
    if state.get("quant_type") != "nf4" or type(block) is not int or not 1 <= block <= 1 << 20:
        raise BadCheckpoint(f"{module.key(_STATE)!r}: quant_type or blocksize is wrong: {str(state)[:200]}")
    key = module.key("weight")
    if key not in module.shards or module.shards.entry(key).nbytes != -(-rows * cols // 2):
        raise BadCheckpoint(f"tensor {key!r} is missing or not the {-(-rows * cols // 2)} bytes of {shape}")
    module.shards.taken.add(key)
    module.expect("weight.quant_map", module.shape("weight.quant_map", 1, "F32"), (16,))
    if not np.array_equal(module.scales("weight.quant_map"), NF4):
        raise Unsupported(f"tensor {module.key('weight.quant_map')!r} is not the table of NF4")
    blocks = -(-rows * cols // block)
    read_absmax = _absmax(module, state, blocks)

    def codes() -> Array:
        packed = module.raw("weight").reshape(-1).view(np.uint8)
        flat = np.empty(2 * len(packed), np.uint8)
        flat[0::2], flat[1::2] = packed >> 4, packed & 15
        return flat[: rows * cols].reshape(shape)

    return NormalFloats(shape, block=block, read_absmax=read_absmax, read=codes)


def _absmax(module: Module, state: dict[str, Any], blocks: int) -> Callable[[], tuple[Array, Nested | None]]:
    """Reads f32 (blocks,), and how it is stored where that is double quantization by blocks of 256."""
    if not module.has("weight.nested_absmax"):
        module.expect("weight.absmax", module.shape("weight.absmax", 1, "F32"), (blocks,))
        return lambda: (module.scales("weight.absmax"), None)
    module.expect("weight.absmax", module.shape("weight.absmax", 1, "U8"), (blocks,))
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or not 1 <= size <= 1 << 20 or not isinstance(offset, int | float):
        raise BadCheckpoint(f"{module.key(_STATE)!r} has no nested_blocksize and nested_offset")
    wanted = (-(-blocks // size),)
    module.expect("weight.nested_absmax", module.shape("weight.nested_absmax", 1, "F32"), wanted)
    module.expect("weight.nested_quant_map", module.shape("weight.nested_quant_map", 1, "F32"), (256,))

    def read() -> tuple[Array, Nested | None]:
        codes, table = module.raw("weight.absmax"), module.scales("weight.nested_quant_map")
        scale = module.scales("weight.nested_absmax")
        with np.errstate(over="ignore"):
            absmax = table[codes] * np.repeat(scale, size)[:blocks] + np.float32(offset)
        if not np.isfinite(absmax).all():
            raise BadCheckpoint(f"the scales of {module.name!r} hold NaN or Inf; the checkpoint is damaged")
        standard = np.array_equal(table, DYNAMIC)  # the map that nf4_g64_dq has
        return absmax, Nested(codes, scale, float(offset)) if size == NESTED and standard else None

    return read


def _shape(module: Module, value: Any) -> tuple[int, int]:
    good = (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is int and 0 < n <= 1 << 24 for n in value)
    )
    if not good:
        raise BadCheckpoint(f"{module.key(_STATE)!r}: shape is {value!r}, expected two whole numbers above 0")
    return value[0], value[1]
