"""What edge-bench measures of an engine as it serves: speed, requests at once, prefixes."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from edge_runtime.cli.workload import RandomTokens
from edge_runtime.errors import NumericError
from edge_runtime.serving.metrics import Stopwatch, percentile
from edge_runtime.serving.request import Completion, Request
from edge_runtime.serving.session import Session

_POINTS = 64  # of a latency curve, at most


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, repeated: `tokens` new tokens after `depth` tokens that were there already."""

    kind: str  # prefill | decode
    depth: int
    tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "depth": self.depth,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "slowest_tokens_per_s": self.tokens / max(self.seconds),
            "fastest_tokens_per_s": self.tokens / min(self.seconds),
            "seconds": list(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class Level:
    """So many requests in flight, until all were answered, repeated.

    rates: tokens/s of all together, of each round; each: tokens/s of each request after its first token.
    latency: (position in the answer, median, 95th percentile), milliseconds since the token before. figures:
    Session.snapshot() after the last round, over all rounds.
    """

    concurrency: int
    requests: int
    rates: tuple[float, ...]
    each: tuple[float, ...]
    latency: tuple[tuple[int, float, float], ...]
    pages_peak: int
    figures: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates)

    @property
    def request_tokens_per_s(self) -> float:
        return statistics.median(self.each) if self.each else 0.0

    def as_dict(self) -> dict[str, Any]:
        position, p50, p95 = zip(*self.latency, strict=True) if self.latency else ((), (), ())
        return {
            "concurrency": self.concurrency,
            "requests": self.requests,
            "rounds": len(self.rates),
            "tokens_per_s": self.tokens_per_s,
            "slowest_tokens_per_s": min(self.rates),
            "fastest_tokens_per_s": max(self.rates),
            "request_tokens_per_s": self.request_tokens_per_s,
            "latency": {"position": position, "p50_ms": p50, "p95_ms": p95},
            "pages_peak": self.pages_peak,
            "figures": self.figures,
        }


def measure_speed(
    session: Session, prompts: Sequence[int], depths: Sequence[int], decode: int, repeat: int
) -> list[Row]:
    """One row for each prompt length and depth, decoding plainly, from prompts that no cache knows.

    Runs are interleaved, so that drift meets all rows alike.
    """
    draw = RandomTokens(session)
    run(session, draw(min(8, session.context - 2)), 2)  # caches and thread pool are warm after this
    prefill: dict[int, list[float]] = {n: [] for n in prompts}
    writing: dict[int, list[float]] = {n: [] for n in depths}
    for _ in range(repeat):
        for n in prompts:
            timing = run(session, draw(n), 1).timing
            prefill[n].append((timing.ttft_ms - timing.queue_ms) / 1e3)
        for n in depths:
            writing[n].append(decode / run(session, draw(n), decode + 1).timing.tokens_per_s)
    return [Row("prefill", 0, n, tuple(s)) for n, s in prefill.items()] + [
        Row("decode", n, decode, tuple(s)) for n, s in writing.items()
    ]


def run(session: Session, prompt: list[int], tokens: int) -> Completion:
    """A plain answer of exactly so many tokens. Raises NumericError when it cannot be had."""
    done = session.answer(Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, speculate=False))
    if done.finish_reason != "length":
        raise NumericError(
            f"a run of {len(prompt)}+{tokens} tokens ended by {done.finish_reason}: {done.error}"
        )
    return done


def measure_level(session: Session, asked: Sequence[Request], concurrency: int, repeat: int) -> Level:
    """Answer all requests, `concurrency` in flight, `repeat` times; each time with an empty prefix cache.

    A round that is not counted comes first.
    """
    _serve(session, asked[:concurrency], concurrency)
    session.metrics.reset()
    rates: list[float] = []
    watches: list[Stopwatch] = []
    peak = 0
    for _ in range(repeat):
        session.forget_prefixes()
        begin, before = perf_counter(), session.metrics.tokens
        seen, pages = _serve(session, asked, concurrency)
        rates.append((session.metrics.tokens - before) / (perf_counter() - begin))
        watches += seen
        peak = max(peak, pages)
    each = [w.timing(0).tokens_per_s for w in watches if w.gaps]
    return Level(
        concurrency, len(asked), tuple(rates), tuple(each), _latency(watches), peak, session.snapshot()
    )


def _serve(session: Session, asked: Sequence[Request], concurrency: int) -> tuple[list[Stopwatch], int]:
    """Stopwatch of each request, and the most KV pages held at once."""
    line = deque(asked)
    watches: dict[int, Stopwatch] = {}
    running = peak = 0
    while line or running:
        while line and running < concurrency:
            watch = Stopwatch()
            watches[session.submit(line.popleft())] = watch
            running += 1
        new: Counter[int] = Counter()
        for event in session.step():
            new[event.request] += event.token is not None
            if event.finish_reason is not None:
                running -= 1
            if event.finish_reason == "error":
                raise NumericError(f"a request ended by an error: {event.error}")
        for number, count in new.items():
            watches[number].take(count)
        peak = max(peak, session.pages_used)
    return list(watches.values()), peak


def _latency(watches: Sequence[Stopwatch]) -> tuple[tuple[int, float, float], ...]:
    """Intervals by position, neighbours together where there are more than can be drawn."""
    longest = max((len(w.gaps) for w in watches), default=0)
    width = -(-longest // _POINTS) or 1
    curve = []
    for at in range(0, longest, width):
        gaps = [gap for w in watches for gap in w.gaps[at : at + width]]
        position = at + 2 + (min(width, longest - at) - 1) // 2  # the answer's first token is number 1
        curve.append((position, 1e3 * percentile(gaps, 50), 1e3 * percentile(gaps, 95)))
    return tuple(curve)
