"""Already quantized model folders, written from each method's specification with plain loops and numpy.

Nothing here comes from the importers: packing is done code by code, so that a mistake on one side shows.
Every writer gives the f32 values that the folder means, by checkpoint key.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hf_folders import byte_tokenizer, llama_config, llama_shapes
from safetensors.numpy import save_file

Array = np.ndarray
Values = dict[str, Array]
Tensors = dict[str, Array]
# (module name, f32 weight, generator) -> (tensors of the module, the values that they mean)
Writer = Callable[[str, Array, np.random.Generator], tuple[Tensors, Array]]


def write_quantized(
    folder: Path,
    quantization: dict[str, Any],
    writer: Writer,
    *,
    seed: int = 0,
    save: Any = save_file,
    **changes: Any,
) -> Values:
    """A random Llama whose linears are stored as `writer` says; the rest is f16."""
    config = llama_config(**changes) | {"quantization_config": quantization}
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    values: Values = {}
    for key, shape in llama_shapes(config).items():
        weight = np.ones(shape) if len(shape) == 1 else rng.normal(0, shape[1] ** -0.5, shape)
        if key.endswith("_proj.weight"):
            module = key.removesuffix(".weight")
            found, values[key] = writer(module, weight.astype(np.float32), rng)
            tensors |= found
        else:
            tensors[key] = weight.astype(np.float16)
            values[key] = tensors[key].astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return values


def pack_words(codes: Array, bits: int) -> Array:
    """(n, m) codes -> (n * bits / 32, m) i32: one stream of bits down each column, low first."""
    words = np.zeros((codes.shape[0] * bits // 32, codes.shape[1]), np.uint32)
    for i, row in enumerate(codes):
        for bit in range(bits):
            word, at = divmod(i * bits + bit, 32)
            words[word] |= ((row.astype(np.uint32) >> np.uint32(bit)) & np.uint32(1)) << np.uint32(at)
    return words.view(np.int32)


def affine_grid(weight: Array, group: int, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """(codes (rows, cols), scale f16 (rows, groups), zero (rows, groups)) by minimum and maximum."""
    rows, cols = weight.shape
    top = (1 << bits) - 1
    starts = range(0, cols, group)
    scale = np.zeros((rows, len(starts)), np.float16)
    zero = np.zeros(scale.shape, np.int64)
    codes = np.zeros(weight.shape, np.int64)
    for g, start in enumerate(starts):
        part = weight[:, start : start + group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale[:, g] = ((high - low) / top).astype(np.float16)
        step = scale[:, g].astype(np.float64)
        zero[:, g] = (top + 1) // 2 if symmetric else np.clip(np.rint(-low / step), 0, top)
        codes[:, start : start + group] = np.clip(np.rint(part / step[:, None]) + zero[:, g, None], 0, top)
    return codes, scale, zero


def affine_values(codes: Array, scale: Array, zero: Array, group_of: Array) -> Array:
    """(code - zero) * scale in f32, group_of (cols,) being the group of each column."""
    shifted = (codes - zero[:, group_of]).astype(np.float32)
    return shifted * scale.astype(np.float32)[:, group_of]


def gptq_writer(
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    v2: bool = False,
    act_order: bool = False,
    dtype: str = "float16",
) -> Writer:
    """AutoGPTQ's tensors; with act_order the groups are runs of a random order of the inputs, one for each
    input (q, k and v share theirs, as gate and up do)."""
    orders: dict[tuple[str, int], Array] = {}

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        cols = weight.shape[1]
        width = cols if group == -1 else group
        block, name = module.rsplit(".", 1)
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name, name)
        order = orders.setdefault(
            (block + shared, cols), rng.permutation(cols) if act_order else np.arange(cols)
        )
        codes, scale, zero = affine_grid(weight[:, order], width, bits, symmetric)
        g_idx = np.empty(cols, np.int64)
        g_idx[order] = np.arange(cols) // width
        inverse = np.argsort(order)
        codes = codes[:, inverse]
        stored = zero.T if v2 else (zero.T - 1) % (1 << bits)
        assert v2 or bits == 3 or zero.min() > 0  # v1 lends from the next field there
        tensors = {
            f"{module}.qweight": pack_words(codes.T, bits),
            f"{module}.qzeros": np.ascontiguousarray(pack_words(stored.T, bits).T),
            f"{module}.scales": np.ascontiguousarray(scale.T).astype(dtype),
            f"{module}.g_idx": g_idx.astype(np.int32),
        }
        return tensors, affine_values(codes, scale, zero, g_idx)

    return write


def gptq_config(bits: int = 4, group: int = 32, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    } | changes


def awq_writer(group: int = 32) -> Writer:
    """AutoAWQ's gemm tensors: eight outputs a word, output 0 2 4 6 1 3 5 7 of them from the low bits on."""

    def pack(codes: Array) -> Array:  # (n, out) -> (n, out / 8)
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for w in range(words.shape[1]):
            for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, w] |= codes[:, 8 * w + place].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        width = weight.shape[1] if group == -1 else group
        codes, scale, zero = affine_grid(weight, width, 4, False)
        tensors = {
            f"{module}.qweight": pack(codes.T),
            f"{module}.qzeros": pack(zero.T),
            f"{module}.scales": np.ascontiguousarray(scale.T),
        }
        return tensors, affine_values(codes, scale, zero, np.arange(weight.shape[1]) // width)

    return write


def awq_config(group: int = 32, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    } | changes
