"""Stop strings over streamed text: nothing of a stop string, nor of its beginning, is ever shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on, holding back a tail that may become a stop string. How text is cut does not matter."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Text that may be shown. Sets `found`, for good, when a stop string is complete."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            # The one that is complete first, as if the text had come letter by letter; then the longest
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: it did not become a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
