"""How far a decoded value may lie from the value, by the paper's or the specification's closed form."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.formats.trellis import trellis_of

NAMES = sorted(n for n, fmt in FORMATS.items() if trellis_of(fmt) is None)  # those: test_trellis.py
SCALED = [n for n in NAMES if FORMATS[n].on_grid is not None]
TENSOR = [n for n in NAMES if any(p.whole for p in FORMATS[n].planes)]
GROUPED = [n for n in NAMES if FORMATS[n].group and n not in TENSOR]


def matrix(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Normal values with a spread of row scales and a few heavy outliers, as weights have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))
    x[rng.random((rows, cols)) < 0.001] *= 30
    return x.astype(np.float32)


def closed_form(name: str, x: np.ndarray) -> np.ndarray:
    """The format's error bound from the values alone: half the widest step that its scale can have.

    An f16 scale lies at most 2^-10 of itself, or one denormal step of 2^-24, above the wanted one.
    """
    v = np.abs(x.astype(np.float64))
    rounding = v * 2.0**-21 + 2.0**-149
    if name == "f32":
        return np.zeros_like(v)
    if name in ("f16", "bf16", "fp8_e5m2"):
        relative, smallest = {"f16": (11, 25), "bf16": (8, 134), "fp8_e5m2": (3, 17)}[name]
        return np.maximum(v * 2.0**-relative, 2.0**-smallest)
    if name == "int8_row_o128":
        return closed_form_of_outliers(x)
    low, high = shared(name, np.minimum, x), shared(name, np.maximum, x)
    largest = np.maximum(high, -low)
    if name == "nf4_g64_f32":
        return (1 - 0.6961928) / 2 * (largest + 2.0**-126) + rounding
    if name == "nf4_g64_dq":
        return closed_form_of_double(largest) + rounding
    if name.startswith("fp8_e4m3"):
        scale = largest / 448 * (1 + 2.0**-20) + 2.0**-126
        return np.maximum(v * 2.0**-4, scale * 2.0**-10) + rounding
    if name == "int8_row":
        return (largest / 127 * (1 + 2.0**-20) + 2.0**-126) / 2 + rounding
    if "fp4" in name:
        return closed_form_of_fp4(name, v, largest) + rounding
    if name.endswith("_k"):
        return closed_form_of_k_quant(int(name[1]), low, high) + rounding
    if name.startswith("nf4"):
        wanted, half = largest, (1 - 0.6961928) / 2  # the widest gap of the table
    elif name.endswith("_zp"):
        wanted, half = (high - low) / (2 ** int(name[3]) - 1), 0.5
    elif name.endswith("_min"):
        least = -low * (1 + 2.0**-10) + 2.0**-24  # what the minimum may reach below 0
        wanted, half = (high + least) / (2 ** int(name[3]) - 1), 0.5
        rounding += least * 2.0**-21
    else:
        wanted, half = largest / (2 ** (int(name[3]) - 1) - 1), 0.5
    return half * (wanted * (1 + 2.0**-10) + 2.0**-24) + rounding


def closed_form_of_fp4(name: str, v: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Half the distance of E2M1's neighbours; the way to 6 steps where the scale was rounded down."""
    if name.startswith("mx"):
        scale = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(largest, 2.0**-149))) - 2, -127)
        return np.maximum(v / 4, scale / 4)
    unit = largest.max() / (448 * 6) + 2.0**-126  # of the E4M3 scales, whose own least step is 2^-9
    scale = largest / 6 * (1 + 2.0**-4) + unit * 2.0**-10
    return np.maximum(np.maximum(v, scale) / 4, largest * 2.0**-4 + 6 * unit * 2.0**-10)


def closed_form_of_k_quant(bits: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Half a step, which is a whole number of the super-block's f16 units: at most one more than wanted."""

    def unit(wanted: np.ndarray, most: int) -> np.ndarray:
        out = np.empty(wanted.shape)
        for start in range(0, wanted.shape[1], 256):
            part = wanted[:, start : start + 256]
            out[:, start : start + 256] = part.max(axis=1, keepdims=True) / most * (1 + 2.0**-10) + 2.0**-24
        return out

    if bits in (3, 6):
        wanted = np.maximum(high, -low) / (2 ** (bits - 1) - 1)
        return (wanted + unit(wanted, 127)) / 2
    most = 15 if bits == 2 else 255
    least = -low + unit(-low, most)
    wanted = (high + least) / (2**bits - 1)
    return (wanted + unit(wanted, most)) / 2 + least * 2.0**-21


def closed_form_of_outliers(x: np.ndarray) -> np.ndarray:
    """Half an int8 step of the row without its outlier columns; in those half an f16 step."""
    size = np.abs(x).max(axis=0)
    taken = np.argsort(-size, kind="stable")[: -(-x.shape[1] // 128)]
    rest = np.abs(x.astype(np.float64))
    rest[:, taken] = 0
    step = rest.max(axis=1, keepdims=True) / 127 * (1 + 2.0**-20) + 2.0**-126
    bound = np.broadcast_to(step / 2, x.shape) + np.abs(x) * 2.0**-21 + 2.0**-149
    bound[:, taken] = np.maximum(np.abs(x[:, taken].astype(np.float64)) * 2.0**-11, 2.0**-25)
    return bound


def closed_form_of_double(largest: np.ndarray) -> np.ndarray:
    """The second level moves a scale by half the widest gap of the dynamic map, 0.9/128 of scale2."""
    first = largest[:, ::64]
    rest = np.abs(first - first.mean())
    second = np.concatenate(
        [
            np.broadcast_to(g.max(axis=1, keepdims=True), g.shape)
            for g in np.split(rest, range(8, rest.shape[1], 8), 1)
        ],
        axis=1,
    )
    moved = second * (0.9 / 128 * (1 + 2.0**-10)) + 2.0**-120 + first.mean() * 2.0**-20
    moved = np.repeat(moved, 64, axis=1)[:, : largest.shape[1]]
    return np.maximum((1 - 0.6961928) / 2 * (largest + moved), moved)


def shared(name: str, reduce: np.ufunc, x: np.ndarray) -> np.ndarray:
    """The extreme over the weights that share a scale and 0, one entry per weight."""
    if name.endswith("tensor"):
        return np.full(x.shape, float(reduce(reduce.reduce(x, axis=None), 0)))
    group = FORMATS[name].group or x.shape[1]
    out = np.empty(x.shape)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group].astype(np.float64)
        out[:, start : start + group] = reduce(reduce.reduce(part, axis=1), 0)[:, None]
    return out


def check(name: str, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Encode, decode, and hold every element to both bounds; returns planes and decoded values."""
    fmt = FORMATS[name]
    planes = fmt.encode(x)
    assert {n: a.shape for n, a in planes.items()} == fmt.shapes(*x.shape)
    decoded = fmt.decode(planes, *x.shape)
    assert decoded.shape == x.shape and decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    error = np.abs(x.astype(np.float64) - decoded)
    bound, limit = fmt.bound(x, planes), closed_form(name, x)
    assert (error <= bound).all()
    assert (bound <= limit * (1 + 2.0**-20) + 2.0**-148).all()  # the format's own bound is not a loose one
    return planes, decoded
