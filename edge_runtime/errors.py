"""Every error this project raises on purpose.

An error says what was wrong, what was expected and what to do. The command line maps the class to an
exit code: 1 for bad input, 2 for "does not fit", 3 for a broken quality limit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class EdgeError(Exception):
    """Root of all typed errors; `exit_code` is what a command returns for it."""

    exit_code = 1


class BadConfig(EdgeError):
    """A profile, recipe, model config or option has a wrong key, type or value."""


class BadCheckpoint(EdgeError):
    """A source model folder is incomplete, damaged or of a kind that is never read (pickles)."""


class BadEngineFile(EdgeError):
    """An engine file is damaged, truncated, forged or of an unknown schema version."""


class BadPrefixFile(EdgeError):
    """A saved prefix is damaged, or was saved for another engine, backend or KV format."""


class Unsupported(EdgeError):
    """A well-formed request that this build cannot honour (architecture, op, format, backend)."""


class ValueOutOfRange(EdgeError):
    """Numbers that a format cannot hold (non-finite, or beyond the range of its scale)."""


class NumericError(EdgeError):
    """NaN or Inf appeared during a step; no token was emitted."""


class BadRequest(EdgeError):
    """A request to a session is invalid (empty prompt, token id out of range, bad sampling value)."""


class GrammarError(EdgeError):
    """An answer cannot go on under its grammar: nothing is allowed, or the parser reached a limit."""


class QueueFull(EdgeError):
    """The session's waiting line is full; try again once a request has ended."""


class DeviceMismatch(EdgeError):
    """The engine was planned for another device than the one at hand."""


class BackendUnavailable(EdgeError):
    """A backend cannot run here (library missing, stale or built for another ABI)."""


class BuildError(EdgeError):
    """A build could not finish; nothing was written at the target path."""


class QualityLimit(EdgeError):
    """A quality limit given by the user is broken. `figures`: what was measured, by name; `report`: all of
    it, as the engine would have held it."""

    exit_code = 3

    def __init__(
        self, message: str, figures: Mapping[str, float] | None = None, report: object = None
    ) -> None:
        super().__init__(message)
        self.figures = dict(figures or {})
        self.report = report


class DoesNotFit(EdgeError):
    """The plan needs more memory than there is. `need` and `have` are bytes; `source` says whose figure."""

    exit_code = 2

    def __init__(self, message: str, *, need: int, have: int, source: str) -> None:
        super().__init__(message)
        self.need = need
        self.have = have
        self.source = source


class BudgetNotMet(EdgeError):
    """No plan keeps a budget of speed or bits that the user gave, within the memory there is."""

    exit_code = 2


_SHORT = 2  # letters with which too much begins


def nearest(word: str, valid: Iterable[str]) -> str:
    """A clause that names the nearest valid word, or lists them: ``did you mean 'bandwidth'?``

    A word cut short means one that begins so: of 'int4', 'int4_g64' is nearer than 'int8_g64'.
    """
    options = sorted(set(valid))
    begun = [option for option in options if len(word) > _SHORT and option.startswith(word)]
    close = difflib.get_close_matches(word, begun or options, n=1, cutoff=0.0 if begun else 0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid: " + ", ".join(options) if options else "nothing is valid here"
