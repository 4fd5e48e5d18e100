"""Speculative decoding without loss: which guessed tokens stand (Leviathan et al. 2023, Chen et al. 2023).

The target model's logits after the last token and after every guess are there; the walk below chooses a token
from each row it reaches, and goes on while a guess says the same. At temperature 0 it chooses what plain
decoding would. Above 0 a guess x drawn from odds q stands with probability min(1, p(x) / q(x)); otherwise a
token is drawn from max(0, p - q), normalised: the outcome has distribution p. A guess without odds is certain
(q(x) = 1), for which the rule is to draw from p and see whether x came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_runtime.backends.likeliest import likeliest_of
from edge_runtime.engine.formats import Array
from edge_runtime.errors import NumericError
from edge_runtime.serving.rows import Rows
from edge_runtime.serving.sampling import Choice, Sampler, TopTokens


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses at the tokens after the next one to be run, as a tree in which parents come first.

    tokens[i] follows tokens[parents[i]], or (-1) the sequence's last token. parents None: a chain, each after
    the one before. odds[i] f64 (vocab,): the distribution that tokens[i] was drawn from; chains only.
    hoped: guesses that should stand, by the proposer's own account.
    """

    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    odds: Sequence[Array] | None = None
    hoped: float = 0.0

    def child(self, at: int, token: int) -> int | None:
        """Index of the guess `token` after guess `at` (-1 = the start), None when there is none."""
        if self.parents is None:
            following = at + 1
            return following if following < len(self.tokens) and self.tokens[following] == token else None
        for i in range(at + 1, len(self.tokens)):
            if self.parents[i] == at and self.tokens[i] == token:
                return i
        return None

    def depths(self) -> list[int]:
        """How many guesses lie above each."""
        if self.parents is None:
            return list(range(len(self.tokens)))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths


def walk(rows: Rows, proposal: Proposal | None, sampler: Sampler) -> Iterator[tuple[Choice, int | None]]:
    """Choices in order, each with the guess that it confirms (None: no guess says so, and the walk ends).

    rows f32 (1 + guesses, vocab): logits after the last token, then after each guess; or what the sampler
    needs of them, see `rows.run_step`. Taking fewer choices than there are is allowed. Raises NumericError
    from a row that holds NaN or Inf.
    """
    at = -1
    if sampler.is_plain:
        yield from _walk_plain(_tokens(rows), proposal)
        return
    while True:
        row = rows[at + 1]
        if proposal is not None and proposal.odds is not None and at + 1 < len(proposal.tokens):
            choice = sampler.verify(row, proposal.tokens[at + 1], proposal.odds[at + 1])
        else:
            choice = sampler.choose(row)
        following = None if proposal is None else proposal.child(at, choice.token)
        yield choice, following
        if following is None:
            return
        at = following


def _tokens(rows: Rows) -> Array:
    """The likeliest token of each row, int32 (1 + guesses,); -1 where its logits are not finite."""
    if isinstance(rows, TopTokens):
        return rows.ids[:, 0]
    return rows if rows.ndim == 1 else likeliest_of(rows)


def _walk_plain(best: Array, proposal: Proposal | None) -> Iterator[tuple[Choice, int | None]]:
    """The walk of the likeliest tokens, all of which are found at once."""
    at: int | None = -1
    while at is not None:
        token = int(best[at + 1])
        if token < 0:
            raise NumericError("the logits hold NaN or Inf; no token was emitted")
        at = None if proposal is None else proposal.child(at, token)
        yield Choice(token), at
