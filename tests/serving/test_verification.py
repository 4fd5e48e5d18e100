"""The rejection rule: guesses change the time that an answer takes and not its distribution.

Every draw goes through Sampler.guess, verify and walk. Independent reference: numpy's softmax of the
target's row. Bounds: total variation 0.01 of 100,000 draws over 32 tokens (a perfect sampler is expected to
have 0.007 at most), chi-square p above 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from draws import p_value, variation

from edge_runtime.errors import NumericError
from edge_runtime.serving.sampling import Choice, Sampler, Sampling, draw, probabilities
from edge_runtime.serving.verification import Proposal, walk

VOCAB, DRAWS = 32, 100_000
TEMPERATURE = 0.8


def softmax(logits: np.ndarray) -> np.ndarray:
    scaled = logits.astype(np.float64) / TEMPERATURE
    odds = np.exp(scaled - scaled.max())
    return odds / odds.sum()


def rows(seed: int) -> np.ndarray:
    """Logits f32 (3, VOCAB) of three steps: spread, sharp, and with half of the vocabulary ruled out."""
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 1, (3, VOCAB)) * np.array([[0.5], [3.0], [1.0]])
    found[2, : VOCAB // 2] = -1e4
    return found.astype(np.float32)


def drafts(seed: int) -> np.ndarray:
    """What a draft model says there: much the same; quite another thing; only what the target rules out."""
    rng = np.random.default_rng(seed + 1)
    found = rows(seed).astype(np.float64)
    found[0] += rng.normal(0, 0.3, VOCAB)
    found[1] = rng.normal(0, 1, VOCAB)
    found[2] = np.where(np.arange(VOCAB) < VOCAB // 2, 0.0, -1e4)
    return found.astype(np.float32)


def speculate(sampler: Sampler, target: np.ndarray, draft: np.ndarray) -> Iterator[tuple[Choice, int | None]]:
    """One verification of a guess from each of the draft's rows."""
    guesses = [sampler.guess(row, None) for row in draft]
    odds = [o for _, o in guesses if o is not None]
    assert len(odds) == len(draft)
    last = np.zeros((1, VOCAB), np.float32)
    return walk(np.concatenate([target, last]), Proposal([t for t, _ in guesses], None, odds), sampler)


def sampled(seed: int, pair: int, draws: int = DRAWS) -> tuple[np.ndarray, int]:
    """Counts (VOCAB,) of what a walk over one pair drew first, and how many guesses stood."""
    sampler = Sampler(Sampling(temperature=TEMPERATURE, seed=seed), [], VOCAB)
    target, draft = rows(seed)[pair : pair + 1], drafts(seed)[pair : pair + 1]
    counts, stood = np.zeros(VOCAB, np.int64), 0
    for _ in range(draws):
        choice, following = next(speculate(sampler, target, draft))
        counts[choice.token] += 1
        stood += following is not None
    return counts, stood


@pytest.mark.parametrize("pair", [0, 1, 2], ids=["alike", "unlike", "disjoint"])
def test_guesses_with_odds_leave_the_targets_distribution(pair: int) -> None:
    counts, stood = sampled(5, pair)
    p, q = softmax(rows(5)[pair]), softmax(drafts(5)[pair])
    assert counts.sum() == DRAWS
    assert variation(counts, p) <= 0.01
    assert p_value(counts, p) > 0.001
    # A guess stands with probability sum(min(p, q)): Leviathan et al. 2023, theorem 3.5
    acceptance = float(np.minimum(p, q).sum())
    assert abs(stood / DRAWS - acceptance) <= 4 * math.sqrt(acceptance * (1 - acceptance) / DRAWS)
    assert (acceptance < 1e-9) == (pair == 2)


def test_each_token_of_an_accepted_run_has_its_own_distribution() -> None:
    """Walks over a chain of four, until the third row has been reached often enough."""
    sampler = Sampler(Sampling(temperature=TEMPERATURE, seed=3), [], VOCAB)
    target, draft = rows(7)[[0, 0, 1, 2]], drafts(7)[[0, 0, 1, 2]]
    target[1] = target[1, ::-1]
    draft[1] = draft[1, ::-1]
    counts = np.zeros((5, VOCAB), np.int64)
    while counts[2].sum() < DRAWS // 10:
        for i, (choice, _) in enumerate(speculate(sampler, target, draft)):
            counts[i, choice.token] += 1
    for i in range(3):
        assert p_value(counts[i], softmax(target[i])) > 0.001
        assert variation(counts[i], softmax(target[i])) <= 0.01 * math.sqrt(DRAWS / counts[i].sum())
    assert counts[0].sum() > counts[1].sum() > counts[2].sum() > counts[3].sum() > 0


@pytest.mark.parametrize("tree", [True, False])
def test_certain_guesses_leave_the_targets_distribution(tree: bool) -> None:
    """Look-up and heads give no odds: q(x) = 1. A tree has several children of one token."""
    sampler = Sampler(Sampling(temperature=TEMPERATURE, seed=11), [], VOCAB)
    target = rows(11)[0]
    likely = np.argsort(-target)[:3].tolist()
    proposal = Proposal(likely, [-1, -1, -1]) if tree else Proposal(likely[:1])
    block = np.repeat(target[None], 4, axis=0)
    counts, stood = np.zeros(VOCAB, np.int64), 0
    for _ in range(DRAWS):
        choice, following = next(walk(block, proposal, sampler))
        counts[choice.token] += 1
        stood += following is not None
    p = softmax(target)
    assert variation(counts, p) <= 0.01 and p_value(counts, p) > 0.001
    hit = float(p[list(proposal.tokens)].sum())
    assert abs(stood / DRAWS - hit) <= 4 * math.sqrt(hit * (1 - hit) / DRAWS)


def test_filters_and_penalties_hold_for_guesses_too() -> None:
    """Top-k, top-p and a repetition penalty: the distribution is that of `choose` under the same options."""
    options = Sampling(temperature=TEMPERATURE, top_k=9, top_p=0.9, repetition_penalty=1.7, seed=2)
    target, draft = rows(13)[0] * 3, drafts(13)[0]
    prompt = np.argsort(-target)[:2].tolist()
    draws = DRAWS // 5
    counts = np.zeros(VOCAB, np.int64)
    sampler = Sampler(options, prompt, VOCAB)
    fresh = sampler._seen.copy()
    p = probabilities(sampler._scores(target, None), options)
    for _ in range(draws):
        guess, odds = sampler.guess(draft, None)
        assert odds is not None and odds[guess] > 0
        counts[sampler.verify(target, guess, odds).token] += 1
        sampler._seen[:] = fresh  # each draw is a first one
    assert 2 <= np.count_nonzero(p) <= 9
    assert variation(counts, p) <= 0.01 * math.sqrt(DRAWS / draws) and p_value(counts, p) > 0.001


def without_residual(self: Sampler, logits: np.ndarray, guess: int, odds: np.ndarray) -> Choice:
    """The common mistake: after a rejection it draws from p again, not from what p has over q."""
    p = probabilities(self._scores(logits, None), self.sampling)
    if float(self._random().random()) * odds[guess] < p[guess]:
        return Choice(guess)
    return Choice(draw(p, float(self._random().random())))


def always(self: Sampler, logits: np.ndarray, guess: int, odds: np.ndarray) -> Choice:
    """Another: the guess stands whenever the target thinks it possible."""
    p = probabilities(self._scores(logits, None), self.sampling)
    return Choice(guess if p[guess] > 0 else draw(p, float(self._random().random())))


@pytest.mark.parametrize("mistake", [without_residual, always])
def test_the_bounds_would_notice_a_wrong_rule(
    mistake: Callable[..., Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse: a rule that is nearly right fails both bounds, with a tenth of the draws."""
    monkeypatch.setattr(Sampler, "verify", mistake)
    counts, _ = sampled(5, 0, DRAWS // 10)
    p = softmax(rows(5)[0])
    assert variation(counts, p) > 0.03 and p_value(counts, p) < 1e-6


def test_at_temperature_zero_the_choice_is_the_plain_one() -> None:
    sampler = Sampler(Sampling(), [], VOCAB)
    target, draft = rows(17), drafts(17)
    odds = [softmax(row) for row in draft]
    greedy = target.argmax(axis=1).tolist()
    block = np.concatenate([target, target[:1]])
    assert sampler.guess(draft[0], None) == (int(draft[0].argmax()), None)
    for right in range(4):
        tokens = [*greedy[:right], *((t + 1) % VOCAB for t in greedy[right:])]
        for proposal in (Proposal(tokens), Proposal(tokens, None, odds)):
            found = [choice.token for choice, _ in walk(block, proposal, sampler)]
            assert found == [*greedy, greedy[0]][: right + 1]


def test_odds_and_target_alike_up_to_rounding_still_draw_a_token() -> None:
    """Then p - q has nothing left, or dust."""
    sampler = Sampler(Sampling(temperature=TEMPERATURE, seed=1), [], VOCAB)
    row = rows(19)[0]
    p = probabilities(sampler._scores(row, None), sampler.sampling)
    for odds in (p, np.nextafter(p, 1), np.where(np.arange(VOCAB) == 3, 1.0, p)):
        for _ in range(200):
            assert 0 <= sampler.verify(row, 3, odds).token < VOCAB


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_choose_and_guess_nothing(bad: float) -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=1), [], VOCAB)
    target, odds = rows(23), softmax(rows(23)[0])
    block = np.concatenate([target, target[:1]])
    block[1, 7] = bad
    found = walk(block, Proposal([5, 5], None, [odds, odds]), sampler)
    with pytest.raises(NumericError, match="no token was emitted"):
        for _ in range(2000):
            if next(found)[1] is None:
                found = walk(block, Proposal([5, 5], None, [odds, odds]), sampler)
    with pytest.raises(NumericError, match="draft model's logits"):
        sampler.guess(block[1], None)
