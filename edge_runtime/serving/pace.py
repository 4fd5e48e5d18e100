"""How long a step takes, learned from the steps that were run: for deadlines and for speculation."""

from __future__ import annotations

from bisect import bisect_left

_KEEP = 0.8  # of the old figure when a new one comes in
_OUTLIER = 4.0  # a step this many times slower than expected says more about the machine than about the step
_DOUBT = 3  # outliers in a row that are believed


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
        self._doubts: dict[int, int] = {}

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return bool(self._sizes)

    def knows(self, tokens: int) -> bool:
        """Whether a step of so many tokens was measured."""
        return tokens in self._seconds

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        old = self._seconds.get(tokens)
        if old is None:
            self._sizes.insert(bisect_left(self._sizes, tokens), tokens)
            self._seconds[tokens] = seconds
            return
        if seconds > _OUTLIER * old:
            self._doubts[tokens] = self._doubts.get(tokens, 0) + 1
            if self._doubts[tokens] < _DOUBT:
                return
        self._doubts.pop(tokens, None)
        self._seconds[tokens] = _KEEP * old + (1 - _KEEP) * seconds

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
