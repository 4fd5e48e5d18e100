"""Losses as a plan should trust them: measured ones drawn towards what tensor and format alone would say.

The loss of one tensor in one format depends on how its values happened to be rounded. A planner that takes
the least of many such figures takes the lucky ones, and where the build rounds anew (feedback: every tensor
after those before it have changed) the luck is gone. In logarithms, losses are nearly a level of the tensor
plus a level of the format; what is left over is mostly luck, and to shrink it is what an empirical Bayes
estimate does (Efron & Morris 1975, "Data Analysis Using Stein's Estimator and its Generalizations").
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from builders.sensitivity import Sensitivity
from edge_runtime.engine.program import Program

_SWEEPS = 50  # of alternating means, where some figures are missing; without, the first is exact


def shrunk(found: Sensitivity, program: Program, share: float) -> Sensitivity:
    """The losses with their logarithms moved by `share` (0 to 1) of the way to the fit of levels; zeros stay.

    Tensors of one width are fitted together: what scales and padding cost a format depends on it.
    """
    losses = dict(found.losses)
    by_width: dict[int, list[str]] = {}
    for name in losses:
        by_width.setdefault(program.tensors[name].cols, []).append(name)
    for names in by_width.values():
        alike = {name: {f: math.log(x) for f, x in losses[name].items() if x > 0.0} for name in names}
        fit = levels(alike)
        for name in names:
            moved = {f: math.exp((1.0 - share) * x + share * fit[name][f]) for f, x in alike[name].items()}
            losses[name] = {f: moved.get(f, x) for f, x in losses[name].items()}
    return msgspec.structs.replace(found, losses=losses)


def shaken(found: Sensitivity, width: float, seed: int) -> Sensitivity:
    """The losses times exp(normal * width), by the seed: a plan next to theirs is then the best.

    Equal losses of a tensor stay equal: groups of 64 and 128 are the same numbers where a row has 64, and the
    planner then takes the one that is stored in fewer bytes.
    """
    rng = np.random.default_rng((seed, 3))
    losses = {}
    for name, of in found.losses.items():
        factor = {x: math.exp(width * float(rng.normal())) for x in dict.fromkeys(of.values())}
        losses[name] = {f: x * factor[x] for f, x in of.items()}
    return msgspec.structs.replace(found, losses=losses)


def only(found: Sensitivity, fmt: str) -> Sensitivity:
    """The losses in one format; other formats are not to be had."""
    return msgspec.structs.replace(found, losses={n: {fmt: of[fmt]} for n, of in found.losses.items()})


def uniform_formats(found: Sensitivity) -> list[str]:
    """Formats that every tensor may have, those of the least losses in all first."""
    first = next(iter(found.losses.values()), {})
    common = [f for f in first if all(f in of for of in found.losses.values())]
    return sorted(common, key=lambda f: (sum(of[f] for of in found.losses.values()), f))


def levels(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """row -> column -> the least-squares fit of figures by a level of each row plus one of each column."""
    columns = list(dict.fromkeys(c for row in figures.values() for c in row))
    table = np.array([[row.get(c, np.nan) for c in columns] for row in figures.values()], float)
    table = table.reshape(len(figures), len(columns))
    known = ~np.isnan(table)
    values = np.where(known, table, 0.0)
    across, down = np.zeros((len(figures), 1)), np.zeros((1, len(columns)))
    for _ in range(_SWEEPS):
        across = _mean(values - down, known, 1)
        down = _mean(values - across, known, 0)
    fit = across + down
    at = {c: j for j, c in enumerate(columns)}
    return {row: {c: float(fit[i, at[c]]) for c in of} for i, (row, of) in enumerate(figures.items())}


def _mean(values: np.ndarray, known: np.ndarray, axis: int) -> np.ndarray:
    total = np.where(known, values, 0.0).sum(axis=axis, keepdims=True)
    return np.asarray(total / np.maximum(known.sum(axis=axis, keepdims=True), 1))
