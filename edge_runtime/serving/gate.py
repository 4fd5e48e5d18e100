"""When speculation pays: it is measured all the time, shortened, switched off when it loses, and on again.

With a chance a that a guess stands when all before it did, k guesses bring 1 + a + ... + a^k tokens on
average (Leviathan et al. 2023, eq. 1) for the time of k drafts and one verification. Both times and the
chance are measured while serving; nothing is assumed of a model. What speculation may lose is bounded by a
credit, which grows with a small share of the time spent decoding: without a gain, that share is all it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

_PRIOR = 4.0  # guesses whose outcome a new sequence takes over from those before it
_FADE = 0.9  # what a verification counts after the next one
_MARGIN = 1.03  # a gain below this is noise
_SHARE = 0.01  # of the time spent that may be lost
_FIRST_CREDIT = 12.0  # plain steps that may be lost before anything was gained
_MOST_CREDIT = 40.0
_SHORTEST_REST = 16  # steps until a gate that is shut looks again; doubles while it stays shut
_LONGEST_REST = 1024
_CHECK = 100  # steps with guesses after which a plain one is timed again
_TRIALS = 4  # steps of a trial at most
PROBE = 4  # guesses of each


@dataclass(slots=True)
class Record:
    """What became of a sequence's guesses. tried, stood: fading counts; a guess counts as tried when all
    before it stood.
    """

    drafted: int = 0
    accepted: int = 0
    tried: float = 0.0
    stood: float = 0.0

    def note(self, guesses: int, accepted: int) -> None:
        """One verification: so many of a chain of guesses stood."""
        self.drafted += guesses
        self.accepted += accepted
        self.tried = _FADE * self.tried + min(accepted + 1, guesses)
        self.stood = _FADE * self.stood + accepted

    def chance(self, prior: float) -> float:
        """Chance that a guess stands, given what is usual."""
        return (self.stood + _PRIOR * prior) / (self.tried + _PRIOR)


@dataclass(frozen=True, slots=True)
class Offer:
    """A way to run the next step: so many tokens brought on average, in so many seconds."""

    length: int  # guesses of each sequence
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def expected(chance: float, length: int) -> float:
    """Tokens that a chain of `length` guesses brings on average, the one after them included."""
    if chance >= 1.0:
        return length + 1.0
    return float((1.0 - chance ** (length + 1)) / (1.0 - chance))


class Gate:
    """Decides on the length of guesses, from offers, and keeps the account of time won and lost."""

    def __init__(self) -> None:
        self.usual = Record()  # over all sequences: what a new one may expect
        self.closed = 0  # times that it was shut after it had been open
        self._credit: float | None = None  # seconds; None until a plain step was timed
        self._plain = 0.0  # seconds of a plain step
        self._rest = 0  # steps until it looks again
        self._next_rest = _SHORTEST_REST
        self._open = False
        self._trials = 0  # steps that the running trial may still have
        self._unchecked = _CHECK  # steps with guesses since a plain one was timed

    @property
    def is_open(self) -> bool:
        return self._open

    def resting(self) -> bool:
        """Whether not even offers are of interest in this step; call once a step."""
        if self._rest > 0:
            self._rest -= 1
            return True
        return False

    def choose(self, plain: Offer, offers: list[Offer], trial: Offer | None) -> int:
        """Length of guesses for the next step, 0 = none.

        trial: an offer to be tried although its outcome is not known, if the credit covers what it may cost.
        Now and then it is 0 so that a plain step is timed: what guesses are worth is no matter of belief.
        """
        if self._unchecked >= _CHECK:
            return 0
        best = max(offers, key=lambda o: o.rate, default=plain)
        if best.rate > plain.rate * _MARGIN and self._can_lose(best):
            self._open, self._trials = True, 0
            return best.length
        if trial is None or not (self._trials > 0 or self._can_lose(trial)):
            self._shut()
            return 0
        if self._trials == 0:
            self._trials = _TRIALS
        self.closed += self._open
        self._open = False
        return trial.length

    @property
    def resting_for(self) -> int:
        """Steps until it looks again."""
        return self._rest

    def note_plain(self, seconds: float, steps: int = 1) -> None:
        """Decoding steps without guesses were run; one takes so long, by all that was measured."""
        self._unchecked = 0
        self._plain = seconds
        if self._credit is None:
            self._credit = _FIRST_CREDIT * seconds
        self._add(_SHARE * seconds * steps)

    def note(self, results: list[tuple[Record, int, int]], seconds: float, plain_seconds: float) -> None:
        """A step with guesses: (record, guesses, accepted) of each sequence, and what it took.

        plain_seconds: of a plain step for the same sequences; all of them bring one token there.
        """
        self._unchecked += 1
        tokens = 0
        for record, guesses, accepted in results:
            tokens += 1 + accepted
            if guesses:
                record.note(guesses, accepted)
                self.usual.note(guesses, accepted)
        worth = plain_seconds * tokens / len(results)
        self._add(worth - seconds + _SHARE * seconds)
        if worth > seconds:
            self._next_rest = _SHORTEST_REST
        if not self._open:
            self._try_on(sum(n for _, n, _ in results), sum(n for _, _, n in results))

    def _try_on(self, guesses: int, accepted: int) -> None:
        """A step of a trial: the first are slow, for much is cold; what stood says more than the time."""
        self._trials -= 1
        if self._trials <= 0 or 2 * accepted < guesses:
            self._shut()

    def note_failure(self) -> None:
        """The guesses could not be made: rest as long as it ever does."""
        self._next_rest = _LONGEST_REST
        self._shut()

    def _can_lose(self, offer: Offer) -> bool:
        """Whether the credit covers an offer that brings nothing but its one token for each sequence."""
        return self._credit is None or self._credit >= min(offer.seconds - self._plain, self._credit_floor())

    def _credit_floor(self) -> float:
        return 4.0 * self._plain

    def _shut(self) -> None:
        if self._open:
            self.closed += 1
            self._open = False
        self._trials = 0
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, _LONGEST_REST)

    def _add(self, seconds: float) -> None:
        if self._credit is not None:
            self._credit = min(self._credit + seconds, _MOST_CREDIT * max(self._plain, 1e-9))
