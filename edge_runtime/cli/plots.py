"""The figure of edge-bench, one panel for each thing that was measured; matplotlib is loaded to draw it."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.cli.first_token import FirstToken
from edge_runtime.cli.measure import Row
from edge_runtime.cli.report import Findings
from edge_runtime.cli.speedup import Speedup
from edge_runtime.errors import BadConfig, Unsupported

# Okabe and Ito 2008: told apart by colour-blind readers, and in grey
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
_WIDTH, _HEIGHT = 4.0, 3.1  # inches of a panel; three side by side make 1200 pixels
Panel = Callable[[Any], None]


def check_plot(path: Path) -> None:
    """Raise Unsupported without matplotlib, BadConfig for a name that is no picture's."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("--plot needs matplotlib; install it with: pip install 'edge-runtime[plot]'")
    if path.suffix not in (".svg", ".png"):
        raise BadConfig(f"--plot {path}: expected a name that ends in .svg or .png")


def draw(found: Findings, path: Path) -> None:
    """Write the figure. Raises Unsupported, BadConfig."""
    check_plot(path)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(found)
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.3), dpi=100, layout=layout)
        figure.suptitle(found.title, fontsize=12)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axis in zip(panels, axes, strict=False):
            axis.grid(True, color="#e0e0e0", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            panel(axis)
        for axis in list(axes):
            axis.set_visible(False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise BadConfig(f"--plot {path}: {error}") from error


def _panels(found: Findings) -> list[Panel]:
    panels: list[Panel] = []
    if found.rows:
        panels.append(lambda axis: _speed(axis, found.rows, "prefill", None))
        panels.append(lambda axis: _speed(axis, found.rows, "decode", found.predicted))
    if found.levels:
        panels.append(lambda axis: _latency(axis, found))
        panels.append(lambda axis: _throughput(axis, found))
    speedup, first = found.speedup, found.first
    if speedup is not None:
        panels.append(lambda axis: _speedup(axis, speedup))
    if first is not None:
        panels.append(lambda axis: _first_token(axis, first))
    return panels


def _speed(axis: Any, rows: Any, kind: str, predicted: float | None) -> None:
    chosen: list[tuple[int, Row]] = sorted(
        ((r.tokens if kind == "prefill" else r.depth, r) for r in rows if r.kind == kind),
        key=lambda pair: pair[0],
    )
    x, speeds = [n for n, _ in chosen], [row.tokens_per_s for _, row in chosen]
    low = [s - row.tokens / max(row.seconds) for s, (_, row) in zip(speeds, chosen, strict=True)]
    high = [row.tokens / min(row.seconds) - s for s, (_, row) in zip(speeds, chosen, strict=True)]
    axis.errorbar(x, speeds, yerr=[low, high], marker="o", capsize=3, color=BLUE, label="median, range")
    if predicted:
        axis.axhline(predicted, color=GREY, ls="--", lw=1.2, label="predicted by the plan")
    axis.set(
        title="reading a prompt" if kind == "prefill" else "plain decoding, one request",
        xlabel="prompt length (tokens)" if kind == "prefill" else "tokens before (context depth)",
        ylabel="tokens/s",
    )
    axis.set_xticks(x)
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=8, loc="lower right" if kind == "prefill" else "lower left")


def _latency(axis: Any, found: Findings) -> None:
    """The fewest and the most requests at once."""
    ends = [found.levels[0], found.levels[-1]][: len(found.levels)]
    for level, colour in zip(ends, (BLUE, ORANGE), strict=False):
        if not level.latency:
            continue
        x, p50, p95 = zip(*level.latency, strict=True)
        axis.plot(x, p50, color=colour, lw=1.6, label=f"{level.concurrency} at once")
        axis.fill_between(x, p50, p95, color=colour, alpha=0.22, lw=0)
    axis.set(
        title=f"latency, speculation {found.way}",
        xlabel="position in the answer (tokens)",
        ylabel="ms since the token before",
    )
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # room for the legend
    title = "median, shaded up to the 95th percentile"
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right", title=title, title_fontsize=8)


def _throughput(axis: Any, found: Findings) -> None:
    x = [level.concurrency for level in found.levels]
    rates = [level.tokens_per_s for level in found.levels]
    low = [r - min(level.rates) for r, level in zip(rates, found.levels, strict=True)]
    high = [max(level.rates) - r for r, level in zip(rates, found.levels, strict=True)]
    axis.errorbar(x, rates, yerr=[low, high], marker="o", capsize=3, color=BLUE, label="all together")
    each = [level.request_tokens_per_s for level in found.levels]
    axis.plot(x, each, marker="s", ls="--", color=ORANGE, label="each request")
    axis.set(title="throughput", xlabel="requests at once", ylabel="tokens/s")
    axis.set_xticks(x)
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=8)


def _speedup(axis: Any, found: Speedup) -> None:
    fixed, gated = found.sides[1:-1], found.sides[-1]
    x = [int(side.guesses or 0) for side in fixed]
    ratios = [found.ratios(side) for side in fixed]
    y = [statistics.median(r) for r in ratios]
    low = [m - min(r) for m, r in zip(y, ratios, strict=True)]
    high = [max(r) - m for m, r in zip(y, ratios, strict=True)]
    axis.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, color=BLUE, label="measured")
    predicted = [(n, side.formula) for n, side in zip(x, fixed, strict=True) if side.formula is not None]
    if predicted:
        axis.plot(*zip(*predicted, strict=True), ls="--", marker="D", ms=4, color=ORANGE, label="formula")
    chosen = statistics.median(found.ratios(gated))
    axis.axhline(chosen, color=GREEN, ls="-.", lw=1.4, label=f"gate decides: {chosen:.2f}x")
    axis.axhline(1.0, color=GREY, lw=0.9)
    name = "tree nodes" if found.way == "medusa" else "draft length (tokens)"
    axis.set(title=f"speculation: {found.way}", xlabel=name, ylabel="speed-up over plain decoding")
    axis.set_xticks(x)
    axis.set_ylim(0, 1.3 * max(axis.get_ylim()[1], chosen, 1.0))
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _first_token(axis: Any, found: FirstToken) -> None:
    names = ("nothing\nknown", "prefix in\nthe cache", "prefix\nfrom a file")
    ways = (found.computed, found.cached, found.loaded)
    medians = [statistics.median(ms) for ms in ways]
    reading = statistics.median(found.loading)
    places = range(len(names))
    axis.barh(places, medians, color=(GREY, BLUE, GREEN), height=0.6)
    axis.barh([2], [reading], left=[medians[2]], height=0.6, color="white", edgecolor=GREEN, hatch="////")
    ends = [*medians[:2], medians[2] + reading]
    words = [f"{m:.1f} ms" for m in medians]
    words[2] += f" + {reading:.1f} ms reading it"
    for place, end, word in zip(places, ends, words, strict=True):
        inside = end > 0.6 * max(ends)
        axis.text(
            end,
            place,
            f" {word} ",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
        )
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set(title=f"first token after a prefix of {found.tokens} tokens", xlabel="ms (median)")
