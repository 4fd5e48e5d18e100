"""The picture of a sensitivity file: tensors by formats, the loss of each as a colour on a log scale.

Layers go down and formats across, from the gentlest to the harshest, so a dark row is a tensor that needs its
bits. matplotlib is loaded to draw it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from builders.picture import save_beside
from builders.sensitivity import Sensitivity
from edge_runtime.engine.formats import Array

_UNITS = {"kl": "rise of KL to f32, nats a token", "hessian": "relative square error at the output"}
_CELL, _ROW = 0.34, 0.17  # inches of a column and of a row


def draw(found: Sensitivity, path: Path) -> None:
    """Write the picture; formats that were run, and not scaled, are named in bold; the build goes on where it
    cannot be written."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tensors, formats, values = grid(found)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-9, 1.0)
    size = (2.4 + _CELL * len(formats), 1.9 + _ROW * len(tensors))
    with matplotlib.rc_context({"font.size": 7, "axes.titlesize": 9}):
        figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine())
        axis = figure.subplots()
        shown = np.ma.masked_invalid(np.maximum(values, low))
        image = axis.imshow(shown, aspect="auto", cmap="cividis_r", norm=LogNorm(low, max(high, 1.01 * low)))
        axis.set_xticks(range(len(formats)), formats, rotation=90)
        axis.set_yticks(range(len(tensors)), tensors)
        for label in axis.get_xticklabels():
            label.set_fontweight("bold" if label.get_text() in found.measured else "normal")
        axis.set_title(f"{found.algorithm} on {found.text}, {found.tokens} tokens")
        figure.colorbar(image, label=_UNITS[found.unit])
    save_beside(figure, path)


def grid(found: Sensitivity) -> tuple[list[str], list[str], Array]:
    """Tensors in the model's order, formats by their mean log loss, and the losses (tensors, formats); NaN
    where a format cannot hold a tensor."""
    tensors = list(found.losses)
    names = list(dict.fromkeys(name for losses in found.losses.values() for name in losses))

    def level(name: str) -> tuple[float, str]:
        logs = [math.log(losses[name]) for losses in found.losses.values() if losses.get(name, 0.0) > 0.0]
        return (sum(logs) / len(logs) if logs else -math.inf, name)

    formats = sorted(names, key=level)
    rows = [[found.losses[t].get(f, math.nan) for f in formats] for t in tensors]
    return tensors, formats, np.array(rows, np.float64)
