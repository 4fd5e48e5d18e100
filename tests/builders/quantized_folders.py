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
    shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]] = llama_shapes,
    **changes: Any,
) -> Values:
    """A random Llama, or a model of other shapes, whose linears are stored as `writer` says; the rest f16."""
    config = llama_config(**changes) | {"quantization_config": quantization}
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    values: Values = {}
    for key, shape in shapes(config).items():
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


def phi3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Phi-3's fused projections: q, k and v in one matrix, gate and up in another."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in llama_shapes(config).items():
        for first, others, fused in (("q", "kv", "qkv_proj"), ("gate", ("up",), "gate_up_proj")):
            if f".{first}_proj." in key:
                rest = [key.replace(f".{first}_", f".{other}_") for other in others]
                rows = shape[0] + sum(llama_shapes(config)[k][0] for k in rest)
                found[key.replace(f"{first}_proj", fused)] = (rows, shape[1])
        if not any(f".{side}_proj." in key for side in ("q", "k", "v", "gate", "up")):
            found[key] = shape
    return found


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


def nf4_writer(block: int = 64, *, double: bool = False, quant_map: Array | None = None) -> Writer:
    """bitsandbytes' NF4: nearest table value, absmax of each block, codes high half first.

    double: absmaxes less their mean, in the 256 values of `quant_map`, one scale for 256 of them.
    """
    table = np.array(NF4, np.float32)

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        blocks = weight.reshape(-1, block)
        absmax = np.abs(blocks).max(axis=1)
        codes = np.abs(blocks[:, :, None] / absmax[:, None, None] - table).argmin(axis=2).astype(np.uint8)
        flat = codes.reshape(-1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float16"}
        state["shape"] = list(weight.shape)
        tensors = {
            f"{module}.weight": ((flat[::2] << 4) | flat[1::2]).reshape(-1, 1),
            f"{module}.weight.quant_map": table,
        }
        if double:
            assert quant_map is not None
            offset = float(absmax.mean())
            rest = absmax - np.float32(offset)
            scale = np.array([np.abs(rest[i : i + 256]).max() for i in range(0, len(rest), 256)], np.float32)
            unit = rest / np.repeat(scale, 256)[: len(rest)]
            nested = np.abs(unit[:, None] - quant_map).argmin(axis=1).astype(np.uint8)
            absmax = quant_map[nested] * np.repeat(scale, 256)[: len(rest)] + np.float32(offset)
            tensors[f"{module}.weight.absmax"] = nested
            tensors[f"{module}.weight.nested_absmax"] = scale
            tensors[f"{module}.weight.nested_quant_map"] = quant_map
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            tensors[f"{module}.weight.absmax"] = absmax
        text = json.dumps(state).encode()
        tensors[f"{module}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
        return tensors, (table[codes] * absmax[:, None]).reshape(weight.shape)

    return write


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def bnb_config(bits: int) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        f"load_in_{bits}bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_threshold": 6.0,
        "_load_in_4bit": bits == 4,
    }


def int8_writer() -> Writer:
    """LLM.int8(): code * (SCB / 127), SCB the greatest magnitude of a row."""

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        most = np.abs(weight).max(axis=1)
        codes = np.rint(weight / most[:, None] * 127).astype(np.int8)
        tensors = {
            f"{module}.weight": codes,
            f"{module}.SCB": most,
            f"{module}.weight_format": np.array(0, np.uint8),
        }
        return tensors, codes.astype(np.float32) * (most / np.float32(127))[:, None]

    return write


def e4m3_values() -> Array:
    """f32 of codes 0..126 of E4M3: 3 bits of fraction, exponent bias 7, none infinite."""
    values = [
        (code & 7) / 8 * 2.0**-6 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7)
        for code in range(127)
    ]
    return np.array(values, np.float32)


def e4m3_codes(values: Array) -> Array:
    """The nearest codes, by search through all of them."""
    table = e4m3_values()
    nearest = np.abs(np.abs(values)[..., None] - table).argmin(axis=-1)
    return (nearest | np.where(values < 0, 128, 0)).astype(np.uint8)


def fp8_writer(kind: str, scale_name: str = "weight_scale", block: tuple[int, int] = (128, 128)) -> Writer:
    """E4M3 with f32 scales: kind "tensor", "row" or "block". `save_fp8` names the codes' type."""
    table = np.concatenate([e4m3_values(), [np.nan], -e4m3_values(), [np.nan]]).astype(np.float32)

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        rows, cols = weight.shape
        high, wide = {"tensor": (rows, cols), "row": (1, cols), "block": block}[kind]
        scale = np.zeros((-(-rows // high), -(-cols // wide)), np.float32)
        spread = np.zeros(weight.shape, np.float32)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                place = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                scale[i, j] = np.abs(weight[place]).max() / 448
                spread[place] = scale[i, j]
        codes = e4m3_codes(weight / spread)
        stored = scale.reshape(()) if kind == "tensor" else scale
        tensors = {f"{module}.weight": codes, f"{module}.{scale_name}": stored}
        return tensors | {f"{module}.input_scale": np.array(0.5, np.float32)}, table[codes] * spread

    return write


def save_fp8(tensors: Tensors, path: Path) -> None:
    """A safetensors file whose u8 weights are E4M3."""
    import struct

    header: dict[str, Any] = {}
    names = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8"}
    data = b""
    for key, array in tensors.items():
        fp8 = array.dtype == np.uint8 and key.endswith(".weight")
        dtype = "F8_E4M3" if fp8 else names[array.dtype.name]
        raw = array.tobytes()
        header[key] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def compressed_config(form: str, bits: int, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    group = {"targets": ["Linear"], "weights": scheme | weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def compressed_writer(
    bits: int = 4, group: int = -1, *, symmetric: bool = True, packed: bool = True, act_order: bool = False
) -> Writer:
    """compressed-tensors' integers: signed codes, packed as code + 2^(bits-1) along a row, or as they are."""
    gptq = gptq_writer(bits, group, symmetric=symmetric, v2=True, act_order=act_order)
    middle = 1 << (bits - 1)

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        made, values = gptq(module, weight, rng)
        scale = np.ascontiguousarray(made[f"{module}.scales"].T)
        g_idx = made[f"{module}.g_idx"]
        step = scale.astype(np.float64)[:, g_idx]
        zero = _zeros_of(made[f"{module}.qzeros"], bits, weight.shape[0])  # (groups, rows)
        codes = np.rint(values / step).astype(np.int64) + zero.T[:, g_idx]
        tensors = {f"{module}.weight_scale": scale}
        if packed:
            tensors[f"{module}.weight_packed"] = np.ascontiguousarray(pack_words(codes.T, bits).T)
            tensors[f"{module}.weight_shape"] = np.array(weight.shape, np.int64)
        else:
            tensors[f"{module}.weight"] = np.ascontiguousarray((codes - middle).astype(np.int8))
        if not symmetric:
            words = pack_words(zero.T, bits) if packed else (zero.T - middle).astype(np.int8)
            tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(words)
        if act_order:
            tensors[f"{module}.weight_g_idx"] = g_idx
        return tensors, values

    return write


def _zeros_of(words: Array, bits: int, rows: int) -> Array:
    """Zero points (groups, rows) of packed ones (groups, rows * bits / 32), bit by bit."""
    stream = words.view(np.uint32)
    out = np.zeros((words.shape[0], rows), np.int64)
    for i in range(rows):
        for bit in range(bits):
            word, at = divmod(i * bits + bit, 32)
            out[:, i] |= ((stream[:, word].astype(np.int64) >> at) & 1) << bit
    return out
