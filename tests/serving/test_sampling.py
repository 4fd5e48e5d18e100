"""Sampling against transformers' logits processors, and against the distribution it should draw from."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.backends.likeliest import top_indices
from edge_runtime.errors import BadRequest, GrammarError
from edge_runtime.serving import sampling as module
from edge_runtime.serving.sampling import (
    Sampler,
    Sampling,
    draw,
    log_softmax,
    masked,
    penalize,
    probabilities,
)

VOCAB = 200


def logits_of(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.6, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8, "top_k": 500},
    ],
)
def test_equals_transformers_processors(options: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prompt = [3, 17, 17, 99]
    chain = transformers.LogitsProcessorList()
    if "repetition_penalty" in options:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    chain.append(transformers.TemperatureLogitsWarper(float(options["temperature"])))
    if "top_k" in options:
        chain.append(transformers.TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        chain.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        chain.append(transformers.MinPLogitsWarper(options["min_p"]))
    sampling = Sampling(**options)  # type: ignore[arg-type]
    seen = np.zeros(VOCAB, bool)
    seen[prompt] = True
    for seed in range(20):
        logits = logits_of(seed)
        wanted = chain(torch.tensor([prompt]), torch.tensor(logits)[None])
        want = torch.softmax(wanted.double(), dim=-1)[0].numpy()
        scores = penalize(logits.astype(np.float64), sampling, seen, np.zeros(VOCAB, np.int32))
        got = probabilities(scores, sampling)
        assert (got > 0).tolist() == (want > 0).tolist(), seed
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_frequency_and_presence_follow_the_published_formula() -> None:
    # platform.openai.com: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    scores, counts = np.zeros(4), np.array([0, 1, 2, 5], np.int32)
    s = Sampling(temperature=1, frequency_penalty=0.5, presence_penalty=1.5)
    assert penalize(scores, s, counts > 0, counts).tolist() == [0.0, -2.0, -2.5, -4.0]


def test_penalties_count_the_answer_but_repetition_counts_the_prompt_too() -> None:
    logits = np.array([1.0, 0.9, 0.8], np.float32)
    # Greedy: the repeated token falls behind once its penalty has grown
    sampler = Sampler(Sampling(frequency_penalty=0.06), [0, 0, 0], 3)
    assert [sampler.choose(logits).token for _ in range(4)] == [0, 0, 1, 0]
    assert Sampler(Sampling(repetition_penalty=2.0), [0], 3).choose(logits).token == 1


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(5, 32)
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=11)
    p = probabilities(logits.astype(np.float64), sampling)
    sampler = Sampler(sampling, [], 32)
    n = 20_000
    counts = np.bincount([sampler.choose(logits).token for _ in range(n)], minlength=32)
    assert (counts[p == 0] == 0).all()
    likely = p * n >= 5
    chi2 = float((((counts - p * n) ** 2) / np.where(p > 0, p * n, 1))[likely].sum())
    degrees = int(likely.sum()) - 1
    # Wilson-Hilferty: chi2 at 99.9% for that many degrees of freedom
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi2 < limit


def test_same_seed_same_tokens_other_seed_others() -> None:
    logits = np.zeros(1000, np.float32)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], 1000)
        return [sampler.choose(logits).token for _ in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_seed_gives_these_tokens_on_every_machine() -> None:
    # Golden: recomputed here from numpy's documented Philox stream, by inverting the uniform distribution
    u = np.random.Generator(np.random.Philox(42)).random(8)
    sampler = Sampler(Sampling(temperature=1.0, seed=42), [], 1000)
    assert [sampler.choose(np.zeros(1000, np.float32)).token for _ in range(8)] == (u * 1000).astype(
        int
    ).tolist()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.array([0, 2, 1, 2, 2], np.float32)
    assert Sampler(Sampling(), [], 5).choose(logits).token == 1
    assert Sampler(Sampling(temperature=1e-8, seed=1, top_k=1, top_p=1e-9), [], 5).choose(logits).token == 1


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = np.array([1e30, -1e30, 3], np.float32)
    with np.errstate(all="raise"):
        p = probabilities(logits.astype(np.float64), Sampling(temperature=1e-300))
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_logprobs_are_the_models_own_and_sorted() -> None:
    logits = logits_of(9)
    choice = Sampler(Sampling(temperature=0.3, top_k=2, seed=1, logprobs=4), [], VOCAB).choose(logits)
    want = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert choice.logprob == pytest.approx(want[choice.token], abs=1e-12)
    assert [i for i, _ in choice.top] == np.argsort(-want, kind="stable")[:4].tolist()
    assert [v for _, v in choice.top] == pytest.approx(sorted(want, reverse=True)[:4], abs=1e-12)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1.0, abs=1e-12)
    assert Sampler(Sampling(), [], VOCAB).choose(logits).logprob is None


def test_nucleus_beyond_the_sorted_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.random.default_rng(3).dirichlet(np.ones(300))
    whole = module._nucleus(p, 0.97)
    monkeypatch.setattr(module, "_CANDIDATES", 4)
    assert (module._nucleus(p, 0.97) == whole).all()


def test_top_indices_break_ties_by_index() -> None:
    values = np.array([1.0, 5, 5, 0, 5])
    assert [top_indices(values, n).tolist() for n in (0, 1, 2, 4, 9)] == [
        [], [1], [1, 2], [1, 2, 4, 0], [1, 2, 4, 0, 3],
    ]  # fmt: skip


def test_draw_never_gives_an_impossible_token() -> None:
    p = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert [draw(p, u) for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)] == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_k": -1}, "top_k is -1, expected an integer from 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0 to 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": float("inf")}, "min_p is inf"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1"),
        ({"presence_penalty": None}, "presence_penalty is None"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"logprobs": 21}, "logprobs is 21, expected an integer from 0 to 20"),
        ({"top_k": 10**5000}, "a huge number"),
    ],
)
def test_bad_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message.replace("(", r"\(")):
        Sampling(**options)  # type: ignore[arg-type]


OPTIONS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1e-6},
    {"temperature": 1.5, "top_k": 3, "repetition_penalty": 1.5},
    {"temperature": 0.9, "top_p": 0.5, "frequency_penalty": 1.0},
    {"temperature": 1.0, "min_p": 0.2, "presence_penalty": -1.0},
    {"repetition_penalty": 0.5, "logprobs": 3},
]


class Fixed:
    """A grammar that always allows the same tokens, or none."""

    is_done = False

    def __init__(self, mask: np.ndarray) -> None:
        self._mask = mask

    def mask(self) -> np.ndarray:
        return self._mask

    def advance(self, token: int) -> None:
        assert self._mask[token]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mask_draws_as_if_the_other_tokens_were_not_there(options: dict[str, float]) -> None:
    sampling = Sampling(seed=5, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(6)
    kept = np.sort(rng.choice(VOCAB, 7, replace=False))
    mask = np.zeros(VOCAB, bool)
    mask[kept] = True
    prompt = [int(kept[2]), int(np.flatnonzero(~mask)[0])]
    whole = Sampler(sampling, prompt, VOCAB, Fixed(mask))
    small = Sampler(sampling, [2], len(kept))  # a vocabulary of the allowed tokens alone
    for seed in range(50):
        logits = logits_of(seed)
        logits[~mask] += 20
        choice = whole.choose(logits)
        assert choice.token == kept[small.choose(logits[kept]).token]
        if sampling.logprobs is not None:
            logs = log_softmax(logits)
            assert choice.logprob == logs[choice.token]
            assert [i for i, _ in choice.top] == list(top_indices(logs, 3))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mask_of_everything_changes_nothing_and_of_nothing_is_an_error(options: dict[str, float]) -> None:
    sampling = Sampling(seed=5, **options)  # type: ignore[arg-type]
    one = Sampler(sampling, [3], VOCAB, Fixed(np.ones(VOCAB, bool)))
    other = Sampler(sampling, [3], VOCAB)
    nothing = Fixed(np.zeros(VOCAB, bool))
    for seed in range(20):
        everything = one.choose(logits_of(seed))
        other.constraint = nothing
        with pytest.raises(GrammarError, match="allows none of the model's tokens"):
            other.choose(logits_of(seed))
        other.constraint = None
        assert everything == other.choose(logits_of(seed))


def test_masked_keeps_allowed_scores_bit_for_bit() -> None:
    scores, mask = logits_of(1), np.arange(VOCAB) % 3 == 0
    found = masked(scores, mask)
    assert (found[mask] == scores[mask]).all() and np.isneginf(found[~mask]).all()
