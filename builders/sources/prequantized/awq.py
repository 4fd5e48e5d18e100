"""AWQ checkpoints (Lin et al. 2306.00978) as AutoAWQ's `gemm` version writes them.

qweight (in, out / 8) i32: a word holds eight outputs, in the order 0 2 4 6 1 3 5 7 from its low bits on;
qzeros (groups, out / 8) likewise; scales (groups, out). value = (code - zero) * scale.
"""

from __future__ import annotations

import numpy as np

from builders.model_config import ModelConfig
from builders.sources.integers import Integers
from builders.sources.matrix import Matrix
from builders.sources.module_keys import FLOATS, Module, modules
from builders.sources.shards import Shards
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadConfig, Unsupported

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each nibble of a word
_MADE = (
    "modules_to_not_convert",
    "do_fuse",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "backend",
    "exllama_config",
)


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every module with a qweight. Raises BadCheckpoint, BadConfig, Unsupported."""
    version = config.read(str, "version", "gemm").lower()
    if version != "gemm":
        raise Unsupported(
            f"{config.path}: version {version!r} is not read, only gemm; quantize it with version='gemm'"
        )
    bits = config.read(int, "bits", config.read(int, "w_bit", 4))
    if bits != 4:
        raise Unsupported(f"{config.path}: bits is {bits}, AWQ's gemm version has 4")
    group = config.read(int, "group_size", config.read(int, "q_group_size", 128))
    if group != -1 and group < 1:
        raise BadConfig(f"{config.path}: group_size is {group}, expected -1 (whole rows) or at least 1")
    for key in (*_MADE, "zero_point"):  # a symmetric one stores zero points of 8
        config.ignore(key)
    return {f"{module.name}.weight": _matrix(module, group) for module in modules(shards, "qweight")}


def _matrix(module: Module, group: int) -> Integers:
    cols, words = module.shape("qweight", 2, "I32")
    rows = 8 * words
    group = cols if group == -1 else group
    groups = -(-cols // group)
    module.expect("scales", module.shape("scales", 2, *FLOATS), (groups, rows))
    module.expect("qzeros", module.shape("qzeros", 2, "I32"), (groups, words))
    return Integers(
        (rows, cols),
        bits=4,
        group=group,
        read_scale=lambda: np.ascontiguousarray(module.scales("scales").T),
        read_zero=lambda: _unpack(module.raw("qzeros")).astype(np.int16),
        read=lambda: _unpack(module.raw("qweight")),
    )


def _unpack(words: Array) -> Array:
    """(n, out / 8) words -> (out, n) u8 codes."""
    stream = np.ascontiguousarray(words.view("<u4").T)
    out = np.empty((8 * stream.shape[0], stream.shape[1]), np.uint8)
    for nibble, place in enumerate(ORDER):
        out[place::8] = (stream >> np.uint32(4 * nibble)) & np.uint32(15)
    return out
