"""The quality report of an engine for people: a summary among other sections, or the whole of it."""

from __future__ import annotations

from edge_runtime.cli.output import table
from edge_runtime.engine.manifest import Quality

NOT_MEASURED = "quality: not measured (edge-build --eval TEXT measures it)"
_BAR = 30  # characters
_LOWEST = 10  # tensors of lowest SQNR in the whole report


def quality_text(quality: Quality | None) -> str:
    """The summary that `edge-inspect` prints."""
    if quality is None:
        return NOT_MEASURED
    worst = _lowest(quality, 3)
    rows = _rows(quality)
    if worst:
        rows.append(("worst tensors", ", ".join(f"{name} {db:.1f} dB" for name, db in worst)))
    return "quality\n" + table(rows)


def report_text(quality: Quality | None) -> str:
    """All that was measured: figures, the two models' likeness after every layer, the worst tensors."""
    if quality is None:
        return NOT_MEASURED
    sections = ["quality\n" + table(_rows(quality))]
    if quality.layer_cosine:
        sections.append(
            table(_layers(quality.layer_cosine), ("after layer", "cosine to f32", "1 - cosine"), right=(0, 1))
        )
    if worst := _lowest(quality, _LOWEST):
        rows = [(name, f"{db:.2f}") for name, db in worst]
        sections.append(table(rows, ("tensors of lowest SQNR", "dB"), right=(1,)))
    return "\n\n".join(sections)


def _rows(q: Quality) -> list[tuple[str, str]]:
    rise = 100.0 * (q.perplexity / q.perplexity_f32 - 1.0) if q.perplexity_f32 > 0 else 0.0
    activations = "f32 activations" if q.backend == "reference" else f"as the {q.backend} backend computes"
    rows = [
        ("text", f"{q.text}, {q.tokens} tokens, {activations}"),
        ("perplexity", f"{q.perplexity:.4f}, f32 {q.perplexity_f32:.4f} ({rise:+.2f} %)"),
        ("KL to f32", f"mean {q.kl_mean:.5f}, 99% below {q.kl_p99:.5f} nats"),
        ("same first choice", f"{100 * q.top1_agreement:.2f} %"),
        ("matrices", f"{q.bits_per_weight:.2f} bits/weight, scales included"),
    ]
    if q.task is not None:
        f32 = "" if q.task.accuracy_f32 is None else f", f32 {100 * q.task.accuracy_f32:.2f} %"
        right = f"{100 * q.task.accuracy:.2f} % of {q.task.cases} cases right{f32}"
        rows.append(("task", f"{q.task.name}: {right} ({q.task.backend})"))
    return rows + [("broken limit", clause) for clause in q.broken]


def _layers(cosines: tuple[float, ...]) -> list[tuple[object, ...]]:
    """Layer, cosine, and a bar of the distance 1 - cosine against the greatest one."""
    most = max(max(1.0 - c for c in cosines), 1e-12)
    return [
        (i, f"{c:.6f}", "#" * max(0, min(_BAR, round(_BAR * (1.0 - c) / most))))
        for i, c in enumerate(cosines)
    ]


def _lowest(quality: Quality, count: int) -> list[tuple[str, float]]:
    return sorted(quality.sqnr_db.items(), key=lambda item: item[1])[:count]
