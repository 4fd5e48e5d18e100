"""Logits to a token: pure functions, and the options they take.

Order, as in Hugging Face transformers: repetition, frequency and presence penalties, temperature, top-k,
top-p, min-p. Ties go to the lowest id. Everything is float64, so that a seed gives one text on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox  # here rather than lazily in the first request

from edge_runtime.backends.likeliest import top_indices
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadRequest, GrammarError, NumericError
from edge_runtime.serving.constraint import Constraint

MAX_LOGPROBS = 20
_SHORT = 4096  # tokens of a vocabulary that is sooner looked at whole than for its likeliest
_CANDIDATES = 1024  # top-p nearly always ends among these; sorting a whole vocabulary takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. The default is greedy: temperature 0, the same text every time.

    temperature: 0 is greedy, 1 the model's own distribution.
    top_k: keep the k likeliest (0 = all). top_p: keep the fewest whose probability reaches it (Holtzman et
    al. 2020). min_p: keep those with at least min_p times the top probability (Nguyen et al. 2024).
    repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer
    (Keskar et al. 2019; 1 = off). frequency_penalty, presence_penalty: subtracted per occurrence and once per
    token of the answer (-2 to 2; 0 = off).
    seed: same seed, same text; None draws a fresh one. logprobs: None, or how many of the likeliest tokens to
    report beside the chosen one; natural logs of the model's own distribution, before any of the above.

    Raises BadRequest naming the option when a value is not valid.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token. logprob, and top (token id, logprob; likeliest first), when they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Of one or more rows of logits the k likeliest tokens alone, in descending order, equals by their lowest
    id: ids int32 and logits f32 (rows, k), or (k,) of one row.
    """

    ids: Array
    logits: Array

    def __getitem__(self, at: int | slice) -> TopTokens:
        return TopTokens(self.ids[at], self.logits[at])

    def copy(self) -> TopTokens:
        return TopTokens(self.ids.copy(), self.logits.copy())


class Sampler:
    """The state of one request: its random stream, which tokens it has seen, and its grammar's state."""

    def __init__(
        self, sampling: Sampling, prompt: list[int], vocab_size: int, constraint: Constraint | None = None
    ) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self._vocab = vocab_size
        self._candidates = _needs(sampling, vocab_size)
        self._drawing: Generator | None = None  # made when something is drawn: a greedy answer never does
        self._guessing: Generator | None = None  # a stream of its own: guesses must not shift the answer's
        # (vocab,) each; only where a penalty needs them
        self._seen = np.zeros(vocab_size if sampling.penalizes else 0, bool)
        self._counts = np.zeros(vocab_size if sampling.penalizes else 0, np.int32)
        if sampling.penalizes:
            self._seen[prompt] = True

    @property
    def is_done(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.constraint is not None and self.constraint.is_done

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token and nothing else is asked of it or remembered."""
        s = self.sampling
        return s.temperature == 0.0 and not s.penalizes and s.logprobs is None and self.constraint is None

    @property
    def candidates(self) -> int | None:
        """How many of the likeliest tokens it must see to choose one (and then ask `settles`); None: all."""
        return None if self.constraint is not None else self._candidates

    def settles(self, top: TopTokens) -> bool:
        """Whether the likeliest tokens alone, of each of the rows, choose what all logits would.

        Top-k keeps every token that equals the last it keeps, so that one below it must be among them.
        """
        t = self.sampling.temperature
        if t == 0.0:
            return True
        ends = top.logits[
            :, [0, self.sampling.top_k - 1, -1]
        ].tolist()  # as f64, scaled as `probabilities` does
        return all((below - most) / t < (last - most) / t for most, last, below in ends)

    def choose(self, logits: Array | TopTokens) -> Choice:
        """Pick from logits f32 (vocab,) and remember the pick. Raises NumericError on NaN or Inf in them.

        From the likeliest tokens of them alone, where they settle it, the pick is the same.
        """
        s = self.sampling
        if isinstance(logits, TopTokens):
            ids, p = self._few(logits)
            return Choice(int(ids[draw(p, float(self._random().random()))]))
        check_finite(logits)
        if s.temperature == 0.0:
            return self._take(logits, self._greedy(logits, self.constraint))
        p = probabilities(self._scores(logits, self.constraint), s)
        return self._take(logits, draw(p, float(self._random().random())))

    def verify(self, logits: Array | TopTokens, guess: int, odds: Array) -> Choice:
        """As `choose`, for a guess drawn from `odds` f64 (vocab,): the exact rejection rule."""
        s = self.sampling
        if s.temperature == 0.0:
            return self.choose(logits)
        if not isinstance(logits, TopTokens):
            check_finite(logits)
        p = self._odds(logits, self.constraint)
        if float(self._random().random()) * odds[guess] < p[guess]:
            return self._take(logits, guess)
        left = np.maximum(p - odds, 0.0)
        if not left.any():  # p and odds are one distribution up to rounding
            left = p
        return self._take(logits, draw(left, float(self._random().random())))

    def guess(self, logits: Array | TopTokens, constraint: Constraint | None) -> tuple[int, Array | None]:
        """A draft model's token after logits f32 (vocab,), and the odds it was drawn from (None: greedy).

        constraint: the grammar's state after the guesses before. Nothing is remembered. Raises NumericError,
        GrammarError.
        """
        s = self.sampling
        if s.temperature == 0.0:
            return self._greedy(logits, constraint), None
        if self._guessing is None:
            self._guessing = Generator(Philox(None if s.seed is None else [s.seed, 1]))
        odds = self._odds(logits, constraint)
        token = draw(odds, float(self._guessing.random()))
        if not math.isfinite(odds[token]):  # one NaN or Inf is one in all of them
            raise NumericError("the draft model's logits hold NaN or Inf")
        return token, odds

    def _random(self) -> Generator:
        if self._drawing is None:
            self._drawing = Generator(Philox(self.sampling.seed))
        return self._drawing

    def _odds(self, logits: Array | TopTokens, constraint: Constraint | None) -> Array:
        """The distribution f64 (vocab,) to draw from."""
        if not isinstance(logits, TopTokens):
            return probabilities(self._scores(logits, constraint), self.sampling)
        ids, p = self._few(logits)
        odds = np.zeros(self._vocab)
        odds[ids] = p
        return odds

    def _few(self, top: TopTokens) -> tuple[Array, Array]:
        """What is not zero of the distribution, to the same bits: ids ascending (k,), and f64 (k,)."""
        order = np.argsort(top.ids)
        ids = top.ids[order]
        whole = np.zeros(self._vocab)

        def total(p: Array) -> float:  # in the order of additions that a sum over all tokens has
            whole[ids] = p
            return float(whole.sum())

        return ids, probabilities(top.logits[order].astype(np.float64), self.sampling, total)

    def _greedy(self, logits: Array | TopTokens, constraint: Constraint | None) -> int:
        if isinstance(logits, TopTokens):
            return int(logits.ids[0])
        if constraint is None and not self.sampling.penalizes:
            return int(logits.argmax())
        return int(self._scores(logits, constraint).argmax())

    def _scores(self, logits: Array, constraint: Constraint | None) -> Array:
        """f64 (vocab,): logits after penalties, -inf where the grammar forbids."""
        scores = logits.astype(np.float64)
        if self.sampling.penalizes:
            scores = penalize(scores, self.sampling, self._seen, self._counts)
        return scores if constraint is None else masked(scores, constraint.mask())

    def _take(self, logits: Array | TopTokens, token: int) -> Choice:
        if self.sampling.penalizes:
            self._seen[token] = True
            self._counts[token] += 1
        if self.constraint is not None:
            self.constraint.advance(token)
        if self.sampling.logprobs is None or isinstance(logits, TopTokens):
            return Choice(token)
        logs = log_softmax(logits)
        top = top_indices(logs, self.sampling.logprobs)
        return Choice(token, float(logs[token]), tuple((int(i), float(logs[i])) for i in top))


def check_finite(logits: Array) -> None:
    """Raises NumericError when logits hold NaN or Inf: nothing may be chosen from them."""
    if not np.isfinite(logits).all():
        raise NumericError("the logits hold NaN or Inf; no token was emitted")


def masked(scores: Array, mask: Array) -> Array:
    """Scores (vocab,) where mask is true, -inf elsewhere. Raises GrammarError when that is everywhere."""
    if not mask.any():
        raise GrammarError("the grammar allows none of the model's tokens here; no token was emitted")
    return np.where(mask, scores, -np.inf)


def penalize(scores: Array, sampling: Sampling, seen: Array, counts: Array) -> Array:
    """Scores f64 (vocab,) after the penalties; seen: in prompt or answer, counts: times in the answer."""
    if sampling.repetition_penalty != 1.0:
        p = sampling.repetition_penalty
        scores = np.where(seen, np.where(scores < 0, scores * p, scores / p), scores)
    if sampling.frequency_penalty or sampling.presence_penalty:
        scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    return scores


def probabilities(
    scores: Array, sampling: Sampling, total: Callable[[Array], float] = lambda p: float(p.sum())
) -> Array:
    """Distribution f64 (vocab,) after temperature, top-k, top-p and min-p; zero where filtered out.

    total: adds up a distribution, for scores that are not all of the vocabulary's.
    """
    scores = _scaled(scores, scores.max(), sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    p = np.exp(scores)
    p /= total(p)
    if sampling.top_p < 1.0:
        p = _nucleus(p, sampling.top_p)
        p /= total(p)
    if sampling.min_p > 0.0:
        p = np.where(p < sampling.min_p * p.max(), 0.0, p)
        p /= total(p)
    return p


def _scaled(scores: Array, most: Array, temperature: float) -> Array:
    scores = scores - most  # before the division: a tiny temperature must not overflow
    with np.errstate(over="ignore"):  # to -inf, which is a probability of zero
        scores /= temperature
    return scores


def _needs(sampling: Sampling, vocab_size: int) -> int | None:
    """See `Sampler.candidates`: the answer without a grammar."""
    if sampling.penalizes or sampling.logprobs is not None:
        return None
    if sampling.temperature == 0.0:
        return 1
    if vocab_size < _SHORT or not 0 < sampling.top_k < vocab_size:
        return None
    return sampling.top_k + 1


def draw(p: Array, u: float) -> int:
    """The token at quantile u in [0, 1) of distribution p; never one of probability zero."""
    sums = np.cumsum(p)
    token = int(np.searchsorted(sums, u * sums[-1], side="right"))
    return min(token, int(np.flatnonzero(p)[-1]))


def log_softmax(logits: Array) -> Array:
    """Natural logs of the softmax, f64 (vocab,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    out: Array = shifted - math.log(float(np.exp(shifted).sum()))
    return out


def _nucleus(p: Array, top_p: float) -> Array:
    """p with only the fewest likeliest whose sum reaches top_p, and at least one."""
    order = top_indices(p, _CANDIDATES)
    if p[order].sum() < top_p:
        order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    keep = order[before < top_p]
    out = np.zeros_like(p)
    out[keep] = p[keep]
    return out


def _real(name: str, value: object, least: float, most: float, above: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not least <= value <= most or (above and value == least):  # type: ignore[operator]
        low = f"above {least:g}" if above else f"from {least:g}"
        raise BadRequest(f"{name} is {_brief(value)}, expected a number {low} to {most:g}")


def _integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadRequest(f"{name} is {_brief(value)}, expected an integer from {least} to {most}")


def _brief(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # an integer too long to print
        return "a huge number"


GREEDY = Sampling()
