"""A plan as a picture: stored bits a weight of each layer, and its share of the predicted loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.explain import Explanation
from builders.explanation_text import layer_bits
from builders.picture import save_beside


def draw_plan(why: Explanation, path: Path) -> None:
    """The picture of a plan that is being built, in which it must not be the one thing that fails."""
    save_beside(plan_figure(why), path)


def plan_figure(why: Explanation) -> Any:
    """Bars of bits a weight as stored, dots of loss; one bar for each layer, the embedding and the head."""
    from matplotlib.figure import Figure

    rows = layer_bits(why)
    places = list(range(len(rows)))
    figure = Figure(figsize=(max(6.0, 0.28 * len(rows) + 2.0), 3.6), layout="constrained")
    bits = figure.add_subplot()
    bits.bar(places, [b for _, b, _ in rows], color="#4c72b0", width=0.8)
    bits.set_xticks(places, [label for label, _, _ in rows], rotation=90, fontsize=7)
    bits.set_ylabel("stored bits a weight")
    loss = bits.twinx()
    loss.plot(places, [x for _, _, x in rows], "o", color="#c44e52", markersize=3)
    loss.set_ylabel(f"loss ({why.unit})", color="#c44e52")
    loss.set_ylim(bottom=0.0)
    bits.set_title(f"KV {why.kv}, predicted loss {why.loss:.4g}", fontsize=9)
    return figure
