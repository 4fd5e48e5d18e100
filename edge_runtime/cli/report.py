"""What edge-bench found, as JSON and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.cli.first_token import TAIL, FirstToken
from edge_runtime.cli.measure import Level, Row
from edge_runtime.cli.output import size, table
from edge_runtime.cli.speedup import Speedup

_LEVEL = (
    *("at once", "tokens/s", "each", "first p50", "p95", "next p50", "p95", "p99", "queue p95", "accepted"),
    *("pages", "missed"),
)


@dataclass(slots=True)
class Findings:
    """What was measured; empty or None where a section was not asked for.

    source: what the requests were; way: how their tokens were guessed ahead.
    """

    title: str
    repeat: int
    predicted: float  # tokens/s of decoding, by the plan
    max_tokens: int
    way: str = "off"
    source: str = ""
    rows: Sequence[Row] = ()
    levels: list[Level] = field(default_factory=list)
    speedup: Speedup | None = None
    first: FirstToken | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.as_dict() for row in self.rows],
            "requests": {
                "prompts": self.source,
                "max_tokens": self.max_tokens,
                "speculation": self.way,
                "levels": [level.as_dict() for level in self.levels],
            }
            if self.levels
            else None,
            "speculation": None if self.speedup is None else self.speedup.as_dict(),
            "prefix": None if self.first is None else self.first.as_dict(),
        }

    def as_text(self) -> str:
        parts = []
        if self.rows:
            parts.append(_speed(self.rows))
        if self.levels:
            parts.append(self._requests())
        if self.speedup is not None:
            parts.append(_speculation(self.speedup))
        if self.first is not None:
            parts.append(_prefix(self.first))
        return "\n\n".join(parts)

    def _requests(self) -> str:
        lines = []
        for level in self.levels:
            f = level.figures
            lines.append(
                (
                    level.concurrency,
                    f"{level.tokens_per_s:.0f}",
                    f"{level.request_tokens_per_s:.0f}",
                    f"{f['ttft_p50_ms']:.1f}",
                    f"{f['ttft_p95_ms']:.1f}",
                    f"{f['itl_p50_ms']:.2f}",
                    f"{f['itl_p95_ms']:.2f}",
                    f"{f['itl_p99_ms']:.2f}",
                    f"{f['queue_p95_ms']:.1f}",
                    f"{f['acceptance']:.0%}" if f["drafted"] else "-",
                    f"{level.pages_peak}/{f['pages']}",
                    f["missed"],
                )
            )
        return (
            f"requests: {self.source}; answers of at most {self.max_tokens} tokens, speculation {self.way}\n"
            f"milliseconds to the first token, to each next one, and in the queue\n\n"
            f"{table(lines, _LEVEL, right=range(len(_LEVEL)))}"
        )


def _speed(rows: Sequence[Row]) -> str:
    lines = [
        (
            row.kind,
            row.depth,
            row.tokens,
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens / max(row.seconds):.1f}",
            f"{row.tokens / min(row.seconds):.1f}",
        )
        for row in rows
    ]
    head = ("", "after", "tokens", "tokens/s", "slowest", "fastest")
    return f"speed: random tokens, plain decoding\n\n{table(lines, head, right=(1, 2, 3, 4, 5))}"


def _speculation(found: Speedup) -> str:
    lines = []
    for side in found.sides[1:]:
        ratios, whole = found.ratios(side), found.ratios(side, whole=True)
        lines.append(
            (
                side.name,
                f"{statistics.median(ratios):.2f}x",
                f"{min(ratios):.2f}x",
                f"{max(ratios):.2f}x",
                "-" if side.formula is None else f"{side.formula:.2f}x",
                f"{statistics.median(whole):.2f}x",
                f"{side.acceptance:.0%}",
                f"{side.tokens_per_step:.2f}",
            )
        )
    head = (
        "draft length",
        "speed-up",
        "slowest",
        "fastest",
        "formula",
        "whole request",
        "accepted",
        "a step",
    )
    plain = found.sides[0]
    same = "all the same tokens" if not found.different else f"{found.different} WITH OTHER TOKENS"
    return (
        f"speculation: {found.way} against plain decoding at {plain.brought / sum(plain.decoding):.0f} "
        f"tokens/s, in turn; {found.source}\n"
        f"{found.answers} answers, {same} as plain decoding; chance that a guess stands "
        f"{found.chance:.2f}\n\n"
        f"{table(lines, head, right=range(1, 8))}"
    )


def _prefix(found: FirstToken) -> str:
    ways = (
        ("nothing known", found.computed),
        ("prefix in the cache", found.cached),
        ("prefix from a file", found.loaded),
        ("reading that file", found.loading),
    )
    lines = [
        (name, f"{statistics.median(ms):.2f}", f"{min(ms):.2f}", f"{max(ms):.2f}", ratio)
        for name, ms in ways
        for ratio in [
            "" if ms is found.loading else f"{statistics.median(found.computed) / statistics.median(ms):.1f}x"
        ]
    ]
    same = "the same token" if found.same else "NOT THE SAME TOKEN"
    return (
        f"prefix: first token of {found.tokens + TAIL} tokens, {found.tokens} of them a prefix, "
        f"{found.cached_tokens} found; {same} each way; file {size(found.file_bytes)}\n\n"
        f"{table(lines, ('', 'ms', 'fastest', 'slowest', 'speed-up'), right=(1, 2, 3, 4))}"
    )
