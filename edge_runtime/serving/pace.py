"""How long a step takes, learned from the steps that were run: for deadlines and for speculation."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

_LAST = 5  # steps of a size whose median counts: one that was held up says more about the machine


class Pace:
    """Seconds of a forward pass by its number of tokens.

    expected: seconds of a one-token step before anything was measured, such as the plan's prediction; 0 when
    nothing is known. Between measured sizes it is linear; beyond them a step grows with its tokens, and is
    never faster than a smaller one.
    """

    def __init__(self, expected: float = 0.0) -> None:
        self._expected = expected
        self._sizes: list[int] = []  # measured, ascending
        self._seconds: dict[int, float] = {}
        self._last: dict[int, deque[float]] = {}

    def knows(self, tokens: int) -> bool:
        """Whether so many steps of a size were measured that two that were held up do not count."""
        return len(self._last.get(tokens, ())) == _LAST

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        last = self._last.get(tokens)
        if last is None:
            self._sizes.insert(bisect_left(self._sizes, tokens), tokens)
            last = self._last[tokens] = deque(maxlen=_LAST)
        last.append(seconds)
        self._seconds[tokens] = sorted(last)[(len(last) - 1) // 2]

    def predict(self, tokens: int) -> float:
        """Seconds that a step of so many tokens should take."""
        if not self._sizes:
            return self._expected
        if tokens in self._seconds:
            return self._seconds[tokens]
        at = bisect_left(self._sizes, tokens)
        if at == 0:  # smaller than any measured: no slower than the smallest
            return self._seconds[self._sizes[0]]
        low = self._sizes[at - 1]
        below = self._seconds[low]
        if at == len(self._sizes):
            return below + self._slope() * (tokens - low)
        high = self._sizes[at]
        above = self._seconds[high]
        return max(below, below + (above - below) * (tokens - low) / (high - low))

    def _slope(self) -> float:
        """Seconds a token beyond the greatest measured size."""
        last = self._sizes[-1]
        if len(self._sizes) == 1:  # one figure: half of it is taken to be there whatever the size
            return self._seconds[last] / 2 / last
        first = self._sizes[0]
        return max(0.0, (self._seconds[last] - self._seconds[first]) / (last - first))
