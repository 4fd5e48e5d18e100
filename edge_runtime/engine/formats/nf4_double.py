"""NF4 with double quantization: `nf4_g64_dq` (QLoRA, Dettmers et al. 2023, section 3; bitsandbytes).

    absmax = DYNAMIC[scale] * scale2 + offset,    value = NF4[q] * absmax,    each step rounded to f32

`offset` is the mean of all absmaxes, `scale2` the greatest |absmax - offset| of its 512 columns, and `scale`
the index of the entry of DYNAMIC nearest to (absmax - offset) / scale2, the lower one of two.

bitsandbytes runs `scale2` over blocks of 256 absmaxes of the flattened tensor. Here it is one per 512 columns
(8 groups) of a row, which repeats its values exactly where no 8 groups lie across such a block's end: where
cols/64 is 1, 2, 4 or a multiple of 8 (2048, 3072, 3584, 4096, 5632, 8192, 14336, ... columns). Other tensors
keep their values in `nf4_g64_f32`.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import nf4, scaled
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange

SECOND = 512  # columns that share a second-level scale
_RATIO = SECOND // nf4.GROUP


def dynamic_map() -> Array:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, ascending f32 (Dettmers 2015).

    Decade i = 0..6 spans 10^(i-6) * [0.1, 1] and has 2^i values of each sign, the middles of equal parts; 0
    and 1 complete it. The ends of the parts are rounded as torch.linspace rounds them on processors with a
    fused multiply-add, where the published checkpoints were made; elsewhere 42 entries differ by one bit.
    """
    data = [0.0, 1.0]
    for i in range(7):
        ends = _parts(2**i)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        data += [float(sign * v) for v in np.float32(10.0 ** (i - 6)) * middles for sign in (1, -1)]
    return np.array(sorted(data), np.float32)


def _parts(count: int) -> Array:
    """The ends of `count` equal parts of [0.1, 1], f32, each one fused multiply-add from the nearer end."""
    first, last = np.float32(0.1), np.float32(1)
    step = float((last - first) / np.float32(count))  # f64 from here: its product with a number is exact
    half = (count + 1) // 2
    up = float(first) + step * np.arange(half)
    down = float(last) - step * np.arange(count - half, -1, -1)
    return np.concatenate([up, down]).astype(np.float32)


DYNAMIC = dynamic_map()
_THRESHOLDS = nf4.thresholds(DYNAMIC)


def absmax(grid: Planes) -> Array:
    """The f32 scales (rows, groups) that the two levels stand for."""
    second = np.repeat(grid["scale2"], _RATIO, axis=1)[:, : grid["scale"].shape[1]]
    out: Array = DYNAMIC[grid["scale"]] * second + grid["offset"]
    return out


def _grid_for(low: Array, high: Array) -> dict[str, Array]:
    first = np.maximum(np.abs(low), np.abs(high))
    offset = np.float32(first.mean(dtype=np.float64))
    rest = first - offset
    second = scaled.f32_scale(scaled.absmax(rest, _RATIO), 1)
    code = np.empty(rest.shape, np.uint8)
    for r, y in scaled.quotients(rest, second, _RATIO):
        code[r] = np.searchsorted(_THRESHOLDS, y[:, : rest.shape[1]], side="left")
    return {"scale": code, "scale2": second, "offset": np.full((1, 1), offset, np.float32)}


def _on_grid(x: Array, grid: Planes) -> dict[str, Array]:
    with np.errstate(over="ignore", invalid="ignore"):
        scale = absmax(grid)
    if not np.isfinite(scale).all():
        raise ValueOutOfRange(
            "nf4_g64_dq: the given planes 'scale2' and 'offset' make scales that are NaN or Inf, "
            "expected finite ones"
        )
    planes = {name: grid[name] for name in ("scale", "scale2", "offset")}
    return {"q": nf4.codes(x, scale)} | planes


register(
    Format(
        "nf4_g64_dq",
        (
            Plane("q", "nf4", 1),
            Plane("scale", "dynamic8", nf4.GROUP),
            Plane("scale2", "f32", SECOND),
            Plane("offset", "f32", "tensor"),
        ),
        lambda x: _on_grid(x, _grid_for(*scaled.extent(x, nf4.GROUP))),
        lambda planes, rows, cols: nf4.values(planes["q"], absmax(planes), rows, cols),
        lambda x, planes: nf4.error_bound(x, absmax(planes)),
        "table",
        _on_grid,
        _grid_for,
        lambda grid: scaled.unshifted(absmax(grid)),
        nf4.NF4,
    )
)
