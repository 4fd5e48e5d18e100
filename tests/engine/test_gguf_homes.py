"""Formats that are exact homes of llama.cpp's blocks: the same f32 bits as the `gguf` package's codec."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.engine.formats import ENCODINGS, codes, get_format

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
quants, Kind = gguf.quants, gguf.GGMLQuantizationType

Array = np.ndarray
ROWS, BLOCKS = 6, 3


def f16(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view(np.float16)


def columns(raw: Array, *sizes: int) -> list[Array]:
    """Blocks (n, bytes) cut into fields."""
    assert sum(sizes) == raw.shape[1]
    return np.split(raw, np.cumsum(sizes)[:-1], axis=1)


def crumbs(raw: Array, bits: int, run: int) -> Array:
    """Fields of `bits` from runs of `run` bytes: all lowest fields of a run first (ggml's order)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    return ((raw.reshape(len(raw), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def six_bit_pairs(raw: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima in the 12 bytes of Q4_K and Q5_K."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    least = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scale, least


def q2_k(raw: Array) -> tuple[Array, dict[str, Array]]:
    scale_min, q, d, dmin = columns(raw, 16, 64, 2, 2)
    return crumbs(q, 2, 32), {"scale_min": scale_min, "super": f16(d), "super_min": f16(dmin)}


def q3_k(raw: Array) -> tuple[Array, dict[str, Array]]:
    mask, q, s, d = columns(raw, 32, 64, 12, 2)
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    high = np.concatenate([(s[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return crumbs(q, 2, 32) | (crumbs(mask, 1, 32) << 2), {"scale": scale, "super": f16(d)}


def q4_k(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, dmin, s, q = columns(raw, 2, 2, 12, 128)
    scale, least = six_bit_pairs(s)
    return crumbs(q, 4, 32), {"scale": scale, "min": least, "super": f16(d), "super_min": f16(dmin)}


def q5_k(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, dmin, s, high, q = columns(raw, 2, 2, 12, 32, 128)
    scale, least = six_bit_pairs(s)
    u = crumbs(q, 4, 32) | (crumbs(high, 1, 32) << 4)
    return u, {"scale": scale, "min": least, "super": f16(d), "super_min": f16(dmin)}


def q6_k(raw: Array) -> tuple[Array, dict[str, Array]]:
    q, high, scale, d = columns(raw, 128, 64, 16, 2)
    return crumbs(q, 4, 64) | (crumbs(high, 2, 32) << 4), {"scale": scale.view(np.int8), "super": f16(d)}


def q4_1(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, m, q = columns(raw, 2, 2, 16)
    return crumbs(q, 4, 16), {"scale": f16(d), "min": f16(m)}


def q5_1(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, m, high, q = columns(raw, 2, 2, 4, 16)
    high_bits = np.unpackbits(high, axis=1, bitorder="little")
    return crumbs(q, 4, 16) | (high_bits << 4), {"scale": f16(d), "min": f16(m)}


def q4_0(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, q = columns(raw, 2, 16)
    return crumbs(q, 4, 16), {"scale": f16(d)}


def q5_0(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, high, q = columns(raw, 2, 4, 16)
    high_bits = np.unpackbits(high, axis=1, bitorder="little")
    return crumbs(q, 4, 16) | (high_bits << 4), {"scale": f16(d)}


def mxfp4(raw: Array) -> tuple[Array, dict[str, Array]]:
    e, q = columns(raw, 1, 16)
    return crumbs(q, 4, 16), {"scale": e}


def nvfp4(raw: Array) -> tuple[Array, dict[str, Array]]:
    d, q = columns(raw, 4, 32)
    return crumbs(q, 4, 8), {"scale": d, "super": np.ones((1, 1), np.float32)}


# format, GGUF's type, its fields as codes and grid, byte offsets of its f16 fields
HOMES = [
    ("q2_k", "Q2_K", q2_k, (80, 82)),
    ("q3_k", "Q3_K", q3_k, (108,)),
    ("q4_k", "Q4_K", q4_k, (0, 2)),
    ("q5_k", "Q5_K", q5_k, (0, 2)),
    ("q6_k", "Q6_K", q6_k, (208,)),
    ("int4_g32", "Q4_0", q4_0, (0,)),
    ("int5_g32", "Q5_0", q5_0, (0,)),
    ("int4_g32_min", "Q4_1", q4_1, (0, 2)),
    ("int5_g32_min", "Q5_1", q5_1, (0, 2)),
    ("mxfp4_g32", "MXFP4", mxfp4, ()),
    ("nvfp4_g16", "NVFP4", nvfp4, ()),
]


def equal(name: str, kind: str, raw: Array, fields: object) -> None:
    """Blocks (ROWS, blocks, bytes) decode to the same bits by both."""
    want = quants.dequantize(raw.reshape(ROWS, -1), Kind[kind])
    cols = want.shape[1]
    u, grid = fields(raw.reshape(-1, raw.shape[2]))  # type: ignore[operator]
    fmt = get_format(name)
    planes = codes.join(fmt.codes, u.reshape(ROWS, cols))
    for plane in fmt.grid_planes:
        assert grid[plane.name].dtype == np.dtype(ENCODINGS[plane.encoding].dtype)
        planes[plane.name] = grid[plane.name] if plane.per == "tensor" else grid[plane.name].reshape(ROWS, -1)
    got = fmt.decode(planes, ROWS, cols)
    # -0 and 0 are one value: gguf's codes are integers, which have no -0
    assert np.array_equal(got + np.float32(0), want + np.float32(0))
    fmt.check_planes(fmt.encode_on_grid(got, planes), ROWS, cols)


@pytest.mark.parametrize(("name", "kind", "fields", "halves"), HOMES, ids=[h[0] for h in HOMES])
def test_random_blocks_decode_to_the_same_bits(
    name: str, kind: str, fields: object, halves: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(11)
    _, nbytes = gguf.constants.GGML_QUANT_SIZES[Kind[kind]]
    raw = rng.integers(0, 256, (ROWS, BLOCKS, nbytes), dtype=np.uint8)
    for at in halves:  # any finite f16 of either sign
        half = rng.standard_normal((ROWS, BLOCKS, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = half.view(np.uint8).reshape(ROWS, BLOCKS, 2)
    if kind == "MXFP4":
        raw[:, :, 0] = rng.integers(0, 254, (ROWS, BLOCKS))
        raw[0, 0, 0] = 0  # a denormal scale
    if kind == "NVFP4":
        raw[:, :, :4] = rng.integers(0, 0x7F, (ROWS, BLOCKS, 4))
    equal(name, kind, raw, fields)


@pytest.mark.parametrize(
    ("name", "kind", "fields", "halves"),
    [h for h in HOMES if h[1] in ("Q4_0", "Q5_0", "Q4_1", "Q5_1", "MXFP4")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_quantized_blocks_decode_to_the_same_bits(
    name: str, kind: str, fields: object, halves: object
) -> None:
    x = np.random.default_rng(12).standard_normal((ROWS, 32 * BLOCKS)).astype(np.float32)
    raw = quants.quantize(x, Kind[kind])
    equal(name, kind, raw.reshape(ROWS, BLOCKS, -1), fields)


def test_mxfp4_codes_are_ggufs() -> None:
    """Both take section 6.3's scale and the nearest value; only ties could differ, and here are none."""
    x = np.random.default_rng(13).standard_normal((ROWS, 96)).astype(np.float32)
    u, grid = mxfp4(quants.quantize(x, Kind.MXFP4).reshape(-1, 17))
    fmt = get_format("mxfp4_g32")
    planes = fmt.encode(x)
    assert np.array_equal(planes["scale"], grid["scale"].reshape(ROWS, 3))
    got = codes.split(fmt.codes, planes, 96)
    want = u.reshape(ROWS, 96)
    assert np.array_equal(np.where(got == 8, 0, got), np.where(want == 8, 0, want))
