"""Where runs of tokens stood before in a growing text."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that must agree


class NgramIndex:
    """Where the last occurrence of each run of tokens ends, over a list that only grows."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # runs that end before this are in

    def find(self, tokens: Sequence[int]) -> int | None:
        """Where the tokens' end stood before: the index after that place. The longest run wins."""
        for end in range(self._indexed + 1, len(tokens)):  # not the end itself, which would find itself
            for n in range(_SHORTEST, _LONGEST + 1):
                if end >= n:
                    self._ends[tuple(tokens[end - n : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for n in range(_LONGEST, _SHORTEST - 1, -1):
            if len(tokens) >= n and (found := self._ends.get(tuple(tokens[-n:]))) is not None:
                return found
        return None
