"""edge-bench: what guessing ahead wins over plain decoding, beside what a formula says it should.

All sides are one session's, in turn: plain decoding, each draft length whether it pays or not, and the gate's
own choice. Leviathan et al. 2023 (Theorem 3.8): with a chance a that a guess stands when all before it did, n
guesses bring (1 - a^(n+1)) / (1 - a) tokens for the time of making and verifying them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_runtime.errors import BadConfig, NumericError
from edge_runtime.serving.gate import expected
from edge_runtime.serving.request import Completion, Request
from edge_runtime.serving.session import Session

PLAIN, GATED = "plain", "gated"


@dataclass(slots=True)
class Side:
    """guesses: of each step, 0 = plain decoding, None = the gate decides.

    decoding, whole: seconds of a round from first tokens to ends, and from submitting; step: seconds that a
    step takes by the session's own account. drafted, accepted, tried, verified: as in Metrics, of all rounds.
    brought: tokens after the first ones.
    """

    name: str
    guesses: int | None
    decoding: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    tried: int = 0
    verified: int = 0
    brought: int = 0
    formula: float | None = None

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        steps = self.brought - self.accepted
        return self.brought / steps if steps else 0.0


@dataclass(frozen=True, slots=True)
class Speedup:
    """sides[0] is plain decoding, the last the gate's choice. chance: of a guess to stand, over all draft
    lengths. different: answers that were not the same tokens as plain decoding's.
    """

    way: str
    source: str
    sides: tuple[Side, ...]
    chance: float
    different: int
    answers: int

    def ratios(self, side: Side, whole: bool = False) -> list[float]:
        """Of each round: plain decoding's seconds over the side's."""
        plain = self.sides[0]
        pairs = (
            zip(plain.whole, side.whole, strict=True)
            if whole
            else zip(plain.decoding, side.decoding, strict=True)
        )
        return [a / b for a, b in pairs]

    def as_dict(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "prompts": self.source,
            "answers": self.answers,
            "same_tokens": self.different == 0,
            "chance": self.chance,
            "plain_tokens_per_s": self.sides[0].brought / sum(self.sides[0].decoding),
            "sides": [self._describe(side) for side in self.sides[1:]],
        }

    def _describe(self, side: Side) -> dict[str, Any]:
        ratios = self.ratios(side)
        return {
            "name": side.name,
            "draft_length": side.guesses,
            "speedup": statistics.median(ratios),
            "slowest": min(ratios),
            "fastest": max(ratios),
            "formula": side.formula,
            "whole_request_speedup": statistics.median(self.ratios(side, whole=True)),
            "drafted": side.drafted,
            "accepted": side.accepted,
            "acceptance": side.acceptance,
            "tokens_per_step": side.tokens_per_step,
            "step_ms": 1e3 * statistics.median(side.step) if side.step else None,
        }


def measure_speedup(
    session: Session, source: str, asked: Sequence[Request], lengths: Sequence[int], repeat: int
) -> Speedup:
    """Each side answers all requests, one after the other, once a round; a first round is not counted."""
    policy = session.speculation
    sides = [
        Side(PLAIN, 0),
        *(Side(str(n), n) for n in lengths),
        Side(GATED, None),
    ]
    different = 0
    try:
        for turn in range(repeat + 1):
            want: list[tuple[int, ...]] = []
            for side in sides:
                policy.fixed = side.guesses
                got = _play(session, side, asked, counts=turn > 0)
                if side.guesses == 0:
                    want = got
                different += sum(a != b for a, b in zip(got, want, strict=True)) if turn else 0
    finally:
        policy.fixed = None
    if not sides[0].brought:
        raise BadConfig("every answer ended at its first token, which guesses cannot speed up; see --text")
    fixed = sides[1:-1]
    tried = sum(side.tried for side in fixed)
    chance = sum(side.accepted for side in fixed) / tried if tried else 0.0
    for side in fixed:
        side.formula = _formula(session, sides[0], side, chance)
    return Speedup(
        session.speculate, source, tuple(sides), chance, different, (len(sides) - 1) * repeat * len(asked)
    )


def _play(session: Session, side: Side, asked: Sequence[Request], *, counts: bool) -> list[tuple[int, ...]]:
    """Tokens of every answer; the side's figures grow when it counts."""
    session.forget_prefixes()  # each side reads every prompt itself, the draft model too
    session.metrics.reset()
    answers = []
    for request in asked:
        answers.append(_answer(session, replace(request, speculate=side.guesses != 0)))
        if counts and side.guesses is not None:
            metrics = session.metrics
            guesses = _guesses(session.speculate, side.guesses, metrics.drafted, metrics.verified)
            side.step.append(session.speculation.step_seconds(guesses))
    if counts:
        metrics = session.metrics
        side.whole.append(sum(a.timing.total_ms for a in answers) / 1e3)
        side.decoding.append(sum(a.timing.total_ms - a.timing.ttft_ms for a in answers) / 1e3)
        side.drafted += metrics.drafted
        side.accepted += metrics.accepted
        side.tried += metrics.tried
        side.verified += metrics.verified
        side.brought += metrics.tokens - len(answers)
    return [a.tokens for a in answers]


def _answer(session: Session, request: Request) -> Completion:
    done = session.answer(request)
    if done.finish_reason == "error":
        raise NumericError(f"a request ended by an error: {done.error}")
    return done


def _guesses(way: str, asked: int, drafted: int, verified: int) -> int:
    """Guesses of a step that had some: a draft model makes as many as asked for, others what they can."""
    return asked if way == "draft" or not verified else round(drafted / verified)


def _formula(session: Session, plain: Side, side: Side, chance: float) -> float | None:
    """Speed-up that is to be expected of a side, from measured step times.

    A draft model guesses `side.guesses` tokens at every step, of which the pooled chance says how many stand.
    Look-up guesses only where it finds something, and a tree's tokens follow from no single chance: for them
    the tokens of a step are the measured ones, and the formula speaks of the times alone.
    """
    one, step = statistics.median(plain.step), statistics.median(side.step)
    if not side.verified or not side.guesses or one <= 0 or step <= 0:
        return None
    if session.speculate == "draft":
        return expected(chance, side.guesses) * one / step
    share = side.verified / max(side.verified, side.brought - side.accepted)
    return side.tokens_per_step * one / (share * step + (1 - share) * one)
