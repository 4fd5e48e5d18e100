"""GPTQ checkpoints (Frantar et al. 2210.17323) as AutoGPTQ and GPTQModel write them.

qweight (in * bits / 32, out) i32, packed along the inputs; qzeros (groups, out * bits / 32) i32, packed along
the outputs; scales (groups, out); g_idx (in,), the group of each input. value = (code - zero) * scale[g_idx].
Format gptq (v1) stores zero - 1 and gptq_v2 zero itself. v1 is read as GPTQModel reads it: one is added to
every field of a word, a carry going on into the next field (3 bits: each field wraps alone). That undoes the
subtraction by which it was written.
With act-order the groups are not runs of inputs: columns are then put in the order of their groups.
"""

from __future__ import annotations

import numpy as np

from builders.model_config import ModelConfig
from builders.sources.act_order import read_order
from builders.sources.integers import Integers
from builders.sources.matrix import Matrix
from builders.sources.module_keys import FLOATS, Module, modules
from builders.sources.shards import Shards
from builders.sources.words import unpack, word_count
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadConfig, Unsupported

BITS = (2, 3, 4, 8)
# How it was made, not what it holds
_MADE = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "dynamic",
    "exllama_config", "hyb_act",
    "lm_head", "max_input_length", "meta", "method", "model_file_base_name", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "modules_to_not_convert", "mse", "offload_to_disk", "pad_token_id", "quantizer", "rotation",
    "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every module with a qweight. Raises BadCheckpoint, BadConfig, Unsupported."""
    bits = config.read(int, "bits")
    if bits not in BITS:
        raise Unsupported(f"{config.path}: bits is {bits}, expected one of {', '.join(map(str, BITS))}")
    group = config.read(int, "group_size", -1)
    if group != -1 and group < 1:
        raise BadConfig(f"{config.path}: group_size is {group}, expected -1 (whole rows) or at least 1")
    layout = config.read_or_null(str, "checkpoint_format", None) or config.read_or_null(str, "format", None)
    config.ignore("format")
    if layout not in (None, "gptq", "gptq_v2"):
        raise Unsupported(
            f"{config.path}: checkpoint_format {layout!r} is a kernel's own order; save it as gptq or gptq_v2"
        )
    if config.read_or_null(bool, "is_marlin_format", False):
        raise Unsupported(f"{config.path}: is_marlin_format is a kernel's own order; save it as gptq")
    config.only("pack_dtype", None, "int32", why="other words are not read")
    for key in _MADE:
        config.ignore(key)
    # `dynamic` gives some modules other bits and groups: their shapes tell
    return {
        f"{module.name}.weight": _matrix(module, bits, group, v1=layout != "gptq_v2")
        for module in modules(shards, "qweight")
    }


def _matrix(module: Module, bits: int, group: int, *, v1: bool) -> Integers:
    words, rows = module.shape("qweight", 2, "I32")
    groups = module.shape("scales", 2, *FLOATS)[0]
    module.expect("scales", (groups, module.shards.entry(module.key("scales")).shape[1]), (groups, rows))
    if module.has("g_idx"):
        (cols,) = module.shape("g_idx", 1, "I32", "I64")
        bits = next((b for b in BITS if word_count(cols, b) == words), bits)
        module.expect("qweight", (words, rows), (word_count(cols, bits), rows))
        order, group = read_order(module, "g_idx", groups)
    else:
        cols, order = words * 32 // bits, None
        group = cols if group == -1 else group
        module.expect("qweight", (words, rows), (word_count(cols, bits), rows))
        module.expect("scales", (groups, rows), (-(-cols // group), rows))
    module.expect("qzeros", module.shape("qzeros", 2, "I32"), (groups, word_count(rows, bits)))

    def zero() -> Array:
        zeros = module.raw("qzeros")
        if v1 and bits != 3:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            zeros = (zeros.view("<u4") + np.uint32(ones)).view("<i4")
        found = unpack(np.ascontiguousarray(zeros.T), bits, rows)
        if v1 and bits == 3:
            found = (found + np.uint8(1)) & np.uint8(7)
        return found.astype(np.int16)

    def codes() -> Array:
        found = unpack(module.raw("qweight"), bits, cols)
        return np.ascontiguousarray((found if order is None else found[order]).T)

    return Integers(
        (rows, cols),
        bits=bits,
        group=group,
        read_scale=lambda: np.ascontiguousarray(module.scales("scales").T),
        read_zero=zero,
        read=codes,
        order=order,
    )
