"""Figures of a request and of a session, on the monotonic clock: setting the wall clock changes nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from edge_runtime.serving.request import Timing

Clock = Callable[[], float]
_KEPT = 4096  # intervals that the session's percentiles look back on


@dataclass(slots=True)
class Stopwatch:
    """Moments of one request, in seconds of a monotonic clock."""

    clock: Clock = perf_counter
    submitted: float = 0.0
    admitted: float | None = None
    first: float | None = None  # token
    last: float | None = None
    gaps: list[float] = field(default_factory=list)  # between one token and the next
    ended: float | None = None
    due: float | None = None  # the deadline

    def __post_init__(self) -> None:
        self.submitted = self.clock()

    def admit(self) -> None:
        self.admitted = self.clock()

    def take(self, count: int) -> list[float]:
        """Note `count` tokens of one step; returns the intervals that end with them.

        Tokens that come together share the time since the one before: speculation makes bursts.
        """
        now = self.clock()
        if self.last is None:
            self.first, new = now, [0.0] * (count - 1)
        else:
            new = [(now - self.last) / count] * count
        self.last = now
        self.gaps += new
        return new

    def end(self) -> None:
        self.ended = self.clock()

    @property
    def missed(self) -> bool:
        """Whether the end came after the deadline."""
        return self.due is not None and self.ended is not None and self.ended > self.due

    def timing(self, prompt_tokens: int) -> Timing:
        """prompt_tokens: those that were run, not found in the cache."""
        start = self.submitted
        admitted = self.admitted if self.admitted is not None else self.clock()
        ended = self.ended if self.ended is not None else self.clock()
        first, last, gaps = self.first, self.last, self.gaps
        if first is None or last is None:
            return Timing(
                queue_ms=1e3 * (admitted - start), total_ms=1e3 * (ended - start), missed=self.missed
            )
        return Timing(
            queue_ms=1e3 * (admitted - start),
            ttft_ms=1e3 * (first - start),
            total_ms=1e3 * (ended - start),
            itl_p50_ms=1e3 * percentile(gaps, 50),
            itl_p95_ms=1e3 * percentile(gaps, 95),
            itl_p99_ms=1e3 * percentile(gaps, 99),
            tokens_per_s=len(gaps) / (last - first) if last > first else 0.0,
            prefill_tokens_per_s=prompt_tokens / (first - admitted) if first > admitted else 0.0,
            missed=self.missed,
        )


class Metrics:
    """Counters of a session since it was opened or reset, and intervals of its last tokens."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as for a measurement; call it while no requests are in flight."""
        self.steps = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.refused = 0
        self.drafted = 0
        self.accepted = 0
        self.verified = 0  # steps of a sequence that had guesses
        self.tried = 0  # guesses of chains that were put to the test: all before them stood
        self.missed = 0  # requests whose end came after their deadline
        self.finished: Counter[str] = Counter()
        self._gaps: deque[float] = deque(maxlen=_KEPT)
        self._first: deque[float] = deque(maxlen=_KEPT)
        self._queue: deque[float] = deque(maxlen=_KEPT)

    def take(self, watch: Stopwatch, count: int) -> None:
        """A request got `count` tokens of one step now."""
        is_first = watch.first is None
        self.tokens += count
        self._gaps.extend(watch.take(count))
        if is_first and watch.first is not None:
            self._first.append(watch.first - watch.submitted)
            if watch.admitted is not None:
                self._queue.append(watch.admitted - watch.submitted)

    def speculated(self, drafted: int, accepted: int) -> None:
        """A sequence's step had so many guesses, perhaps none, and so many of them stood."""
        self.drafted += drafted
        self.accepted += accepted
        self.verified += drafted > 0
        self.tried += min(accepted + 1, drafted)

    def end(self, watch: Stopwatch, reason: str, cached_tokens: int) -> None:
        """A request ended now."""
        watch.end()
        self.finished[reason] += 1
        self.cached_tokens += cached_tokens
        self.missed += watch.missed

    def snapshot(self) -> dict[str, float | int | dict[str, int]]:
        """Plain figures: counts, and milliseconds where the name ends in _ms."""
        gaps, first, queue = list(self._gaps), list(self._first), list(self._queue)
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "refused": self.refused,
            "finished": dict(self.finished),
            "missed": self.missed,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0,
            "queue_p50_ms": 1e3 * percentile(queue, 50),
            "queue_p95_ms": 1e3 * percentile(queue, 95),
            "ttft_p50_ms": 1e3 * percentile(first, 50),
            "ttft_p95_ms": 1e3 * percentile(first, 95),
            "ttft_p99_ms": 1e3 * percentile(first, 99),
            "itl_p50_ms": 1e3 * percentile(gaps, 50),
            "itl_p95_ms": 1e3 * percentile(gaps, 95),
            "itl_p99_ms": 1e3 * percentile(gaps, 99),
        }


def percentile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
