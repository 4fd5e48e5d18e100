"""An explanation for people: what each layer got, what binds, and what a little more would buy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from builders.allocation import BITS, DECODE, FIRST
from builders.explain import Explanation, Reason, Use
from edge_runtime.cli.output import size, table

_BEST = 3  # of the next steps up, and of those down


@dataclass(frozen=True, slots=True)
class Row:
    """Layers next to each other whose tensors have the same formats; bytes, and bits a weight, as stored."""

    label: str
    bits: float
    bytes: int
    loss: float
    formats: str


def explanation_text(why: Explanation) -> str:
    """Budgets with their prices, a row for each run of equal layers, the next steps up and down."""
    rows = [
        (r.label, f"{r.bits:.2f}", size(r.bytes), _share(r.loss, why.loss), r.formats)
        for r in layer_rows(why)
    ]
    cache = f", of it the KV cache {why.kv_loss:.3g}" if why.kv_loss else ""
    titles = ("budget", "used", "of", "price of the next", "with 1% more")
    lines = [
        f"predicted loss {why.loss:.4g} ({why.unit}){cache}",
        *_tried(why),
        "",
        table([_budget(use) for use in why.budgets], titles),
        "",
        table(rows, ("layers", "stored bits", "size", "of loss", "formats"), right=(1, 2, 3)),
    ]
    lines += _steps(why.tensors)
    return "\n".join(lines)


def _tried(why: Explanation) -> list[str]:
    """The plan that was the best when it was tried out, beside the one of the losses as measured."""
    if not why.tried:
        return []
    label, kl = min(why.tried, key=lambda each: each[1])
    first, before = why.tried[0]
    beside = "" if label == first else f"; {first}: {before:.4g}"
    return [f"{len(why.tried)} plans tried whole, best {label}: KL {kl:.4g}{beside}"]


def layer_rows(why: Explanation) -> list[Row]:
    """Embedding and head by name, layers by number; equal neighbours and blocks of a vocabulary together."""
    groups = _by_layer(why.tensors)
    rows: list[Row] = []
    at = 0
    while at < len(groups):
        label, reasons = groups[at]
        end = at + 1
        while end < len(groups) and _alike(groups[at], groups[end]):
            end += 1
        all_of = [r for _, more in groups[at:end] for r in more]
        last = groups[end - 1][0].rpartition(".")[2]
        name = label if end == at + 1 else f"{label}-{last}"
        nbytes, weights = sum(r.bytes for r in all_of), sum(r.weights for r in all_of)
        rows.append(Row(name, 8.0 * nbytes / weights, nbytes, sum(r.loss for r in all_of), _formats(reasons)))
        at = end
    return rows


def layer_bits(why: Explanation) -> list[tuple[str, float, float]]:
    """(label, stored bits a weight, loss) of every layer, embedding and head, none put together."""
    return [
        (label, 8.0 * sum(r.bytes for r in of) / sum(r.weights for r in of), sum(r.loss for r in of))
        for label, of in _by_layer(why.tensors)
    ]


def _by_layer(reasons: Iterable[Reason]) -> list[tuple[str, list[Reason]]]:
    found: dict[str, list[Reason]] = {}
    for r in reasons:
        found.setdefault(r.name if r.layer is None else str(r.layer), []).append(r)
    return list(found.items())


def _alike(one: tuple[str, list[Reason]], other: tuple[str, list[Reason]]) -> bool:
    """Whether both are layers, or blocks of one vocabulary, with the same formats."""
    (a, _, m), (b, _, n) = one[0].rpartition("."), other[0].rpartition(".")
    return a == b and m.isdigit() and n.isdigit() and _formats(one[1]) == _formats(other[1])


def _formats(reasons: Sequence[Reason]) -> str:
    """``q4_k q,k; int8_row v,down``, or the format alone where all tensors have it."""
    kinds: dict[str, list[str]] = {}
    for r in reasons:
        kinds.setdefault(r.format, []).append(r.kind)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{fmt} {','.join(names)}" for fmt, names in kinds.items())


def _budget(use: Use) -> tuple[str, str, str, str, str]:
    def amount(value: float) -> str:
        return f"{1e3 * value:.3f} ms" if use.name in (DECODE, FIRST) else size(round(value))

    price = f"{use.price:.3g} less loss a {use.per}" if use.price > 0 else "nothing: it does not bind"
    if use.used > use.limit:
        price = "it cannot be kept"
    more = "" if use.one_percent is None else f"{use.one_percent:.3g} less"
    name = f"{use.name} of weights" if use.name == BITS else use.name
    return name, amount(use.used), amount(use.limit), price, more


def _steps(reasons: Sequence[Reason]) -> list[str]:
    """What would be bought next, and what would be given up first."""
    ups = sorted((r for r in reasons if r.better), key=lambda r: -r.better.loss_per_byte if r.better else 0.0)
    downs = sorted((r for r in reasons if r.worse), key=lambda r: r.worse.loss_per_byte if r.worse else 0.0)
    lines: list[str] = []
    for title, chosen in (("bought next", ups[:_BEST]), ("given up first", downs[:_BEST])):
        if chosen:
            lines += ["", f"{title}:"]
        for r in chosen:
            move = r.better if title == "bought next" else r.worse
            if move is not None:
                sign = "+" if move.bytes > 0 else "-"
                lines.append(
                    f"  {r.name}  {r.format} -> {move.format}  {sign}{size(abs(move.bytes))}, "
                    f"loss {move.loss:+.3g} ({move.loss_per_byte:.3g} a byte)"
                )
    return lines


def _share(part: float, whole: float) -> str:
    return f"{100.0 * part / whole:.1f}%" if whole > 0 else "0.0%"
