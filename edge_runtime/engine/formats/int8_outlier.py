"""LLM.int8() (Dettmers et al. 2022): `int8_row_o128`, int8 with an f32 scale per row and f16 outlier columns.

One column for every 128 (ceil(cols/128) of them) is kept in f16. Their places are free: plane `index` (1, n),
i32, holds the column numbers, ascending, then -1 for slots that are not used; plane `outlier` (rows, n) their
values. `q` holds 0 there. scale = absmax of the row's other columns / 127, code = round_half_even(x / scale).

Without an index the codec takes the columns of greatest magnitude; an algorithm that knows the activations
gives its own `index` in the grid, in any order. A backend leaves the activations of these columns out of its
int8 codes, which is the point: one large input no longer coarsens the codes of all the others.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import scaled
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange

NAME = "int8_row_o128"
COLUMNS = 128  # columns for each outlier column
LIMIT = 127
NONE = -1  # index of a slot that is not used


def largest_columns(x: Array) -> Array:
    """The index plane (1, ceil(cols/128)) i32 of the columns of greatest magnitude; columns of 0 are left."""
    size = np.maximum(np.abs(x.min(axis=0)), np.abs(x.max(axis=0)))
    count = -(-len(size) // COLUMNS)
    first = np.argsort(-size, kind="stable")[:count]  # of equal ones the lower column
    chosen = np.sort(first[size[first] > 0])
    index = np.full((1, count), NONE, np.int32)
    index[0, : len(chosen)] = chosen
    return index


def _check_index(planes: Planes, cols: int) -> None:
    index = planes["index"].reshape(-1)
    used = index[index != NONE]
    if used.size and (used.min() < 0 or used.max() >= cols):
        raise ValueOutOfRange(
            f"{NAME}: plane 'index' names columns {used.min()}..{used.max()}, "
            f"expected numbers below {cols}, or {NONE} for none"
        )
    if (np.diff(used) <= 0).any() or (index[: used.size] == NONE).any():
        raise ValueOutOfRange(
            f"{NAME}: plane 'index' is not ascending, each column once, then {NONE} for none"
        )


def _ascending(index: Array) -> Array:
    """Columns in order, unused slots last."""
    return np.sort(index.view(np.uint32)).view(np.int32)


def _on_grid(x: Array, grid: Planes) -> dict[str, Array]:
    scaled.check_scales(NAME, grid)
    index = _ascending(grid["index"]) if "index" in grid else largest_columns(x)
    _check_index({"index": index}, x.shape[1])
    used = index[0] != NONE
    columns = index[0][used]
    outlier = np.zeros((x.shape[0], index.shape[1]), np.float16)
    with np.errstate(over="ignore"):
        outlier[:, used] = x[:, columns]
    if not np.isfinite(outlier).all():
        raise ValueOutOfRange(
            f"{NAME}: an outlier column holds {np.abs(x[:, columns]).max():.6g}, but its f16 values end at "
            "65504; use int8_row or mend the outlier"
        )
    q = np.empty(x.shape, np.int8)
    for r, y in scaled.quotients(x, grid["scale"], x.shape[1]):
        np.rint(y, out=y)
        np.clip(y, -LIMIT, LIMIT, out=y)
        y[:, columns] = 0
        q[r] = y
    return {"q": q, "scale": grid["scale"], "outlier": outlier, "index": index}


def _grid_for(low: Array, high: Array) -> dict[str, Array]:
    return {"scale": scaled.f32_scale(np.maximum(np.abs(low), np.abs(high)), LIMIT)}


def _encode(x: Array) -> dict[str, Array]:
    index = largest_columns(x)
    kept = np.ones((1, x.shape[1]), np.bool_)
    kept[0, index[index != NONE]] = False
    low = x.min(axis=1, initial=0, where=kept)[:, None]
    high = x.max(axis=1, initial=0, where=kept)[:, None]
    return _on_grid(x, _grid_for(low, high) | {"index": index})


def _decode(planes: Planes, rows: int, cols: int) -> Array:
    out = planes["q"].astype(np.float32)
    out *= planes["scale"]
    used = planes["index"][0] != NONE
    out[:, planes["index"][0][used]] = planes["outlier"][:, used]
    return out


def _bound(values: Array, planes: Planes) -> Array:
    step = np.abs(planes["scale"].astype(np.float64))
    bound = scaled.error_bound(values, step / 2, -LIMIT * step, LIMIT * step)
    columns = planes["index"][planes["index"] != NONE]
    bound[:, columns] = scaled.half_ulp(values[:, columns].astype(np.float64), -14, 10)
    return bound


register(
    Format(
        NAME,
        (
            Plane("q", "i8", 1),
            Plane("scale", "f32", "row"),
            Plane("outlier", "f16", COLUMNS, derived=True),
            Plane("index", "i32", COLUMNS, shared=True, derived=True),
        ),
        _encode,
        _decode,
        _bound,
        "int",
        _on_grid,
        _grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        np.arange(-LIMIT, LIMIT + 1, dtype=np.float32),
        _check_index,
    )
)
