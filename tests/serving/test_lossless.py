"""Speculation changes no answer, on real models: greedy to the token, sampled to the text where guesses are
certain, and to the distribution where they are drawn. The whole matrix is bench/lossless.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import msgspec
import numpy as np
import pytest
from draws import p_value
from real_engines import Engines, Recorder, prompts

from edge_runtime import Request, Sampling, Session, open_engine
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.sampling import Choice, Sampler, probabilities

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

MODELS = ("planner", "stories260K")
WAYS = ("draft", "lookup", "medusa")
PROMPTS, TOKENS = 20, 24


def answers(session: Session, requests: list[Request]) -> tuple[list[tuple[int, ...]], int, int]:
    """Tokens of every answer, as many at once as there is room for; guesses, and those that stood."""
    served = [session._traffic.live[session.submit(request)] for request in requests]
    while session.in_flight:
        session.step()
    assert all(s.finish_reason == "length" for s in served)
    records = [s.record for s in served]
    found = [tuple(s.answer) for s in served]
    return found, sum(r.drafted for r in records), sum(r.accepted for r in records)


@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_the_same(engines: Engines, model: str, kv: str) -> None:
    path = engines.full(model)
    with open_engine(path, kv=kv, speculate="off") as session:
        texts = prompts(session, model, PROMPTS)
        requests = [Request(prompt=ids, max_tokens=TOKENS, ignore_eos=True) for ids in texts]
        want, drafted, _ = answers(session, requests)
        assert drafted == 0
    for way, length in product(WAYS, (1, 3, 8)):
        with open_engine(path, kv=kv, speculate=way, draft_length=length, gated=False) as session:
            got, drafted, accepted = answers(session, requests)
            assert got == want, (way, length)
            assert drafted > accepted > 0, (way, length)  # some stood, some were rolled back


def test_a_draft_with_a_shorter_context_stops_where_it_ends(engines: Engines) -> None:
    path = engines.full("planner")
    with open_engine(path, speculate="off") as session:
        texts = prompts(session, "planner", 4)
        requests = [Request(prompt=ids, max_tokens=60, ignore_eos=True) for ids in texts]
        want, _, _ = answers(session, requests)
    with open_engine(path, speculate="draft", gated=False) as session:
        draft = session.speculation.proposer
        assert isinstance(draft, DraftModel)
        draft._step = msgspec.structs.replace(draft._step, context=48)
        got, drafted, _ = answers(session, requests)
        assert got == want
        assert drafted > 0 and session.speculation.failures == 0
        assert all(s < 48 for s in map(len, texts))  # it began to guess for each of them


@pytest.mark.parametrize("way", ["lookup", "medusa"])
@pytest.mark.parametrize("model", MODELS)
def test_sampled_answers_are_the_same_where_guesses_are_certain(
    engines: Engines, model: str, way: str
) -> None:
    """A guess without odds is compared with what is drawn anyway: one seed, one text."""
    path = engines.full(model)
    with open_engine(path, kv="int8", speculate="off") as session:
        requests = [
            Request(
                prompt=ids, sampling=Sampling(temperature=1.0, seed=i), max_tokens=TOKENS, ignore_eos=True
            )
            for i, ids in enumerate(prompts(session, model, PROMPTS))
        ]
        want, _, _ = answers(session, requests)
    with open_engine(path, kv="int8", speculate=way, gated=False) as session:
        got, drafted, accepted = answers(session, requests)
        assert got == want
        assert drafted > accepted > 0


# --- guesses that are drawn -------------------------------------------------------------------------------

KEPT = 6  # tokens that each draw may bring
SEEDS = 800
WARM = {"temperature": 3.0, "top_k": KEPT}  # spread, so that a draft is often wrong


@pytest.fixture
def exact(engines: Engines, recorder: Recorder) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A prompt, and from the model's own logits the odds of every three tokens after it, (n, 3) and (n + 1,):
    the last is that of all others, 0.
    """
    with open_engine(engines.full("stories260K"), kv="f16", speculate="off") as session:
        start = prompts(session, "stories260K", 3)[2]

        def odds(more: tuple[int, ...]) -> np.ndarray:
            request = Request(prompt=[*start, *more], max_tokens=1, ignore_eos=True)
            logits = recorder.together(session, [request])[0].rows[0]
            return probabilities(logits.astype(np.float64), Sampling(**WARM))

        paths = {(): 1.0}
        for _ in range(3):
            paths = {
                (*path, int(token)): chance * p[token]
                for path, chance in paths.items()
                for p in [odds(path)]
                for token in np.flatnonzero(p)
            }
    return start, np.array(list(paths)), np.array([*paths.values(), 0.0])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def drawn(engines: Engines, start: list[int], paths: np.ndarray) -> tuple[np.ndarray, int, int]:
    """How often each path came under a draft, of SEEDS, and (last) others; guesses, and those that stood."""
    where = {tuple(path): i for i, path in enumerate(paths.tolist())}
    counts = np.zeros(len(paths) + 1, np.int64)
    drafted = accepted = 0
    with open_engine(engines.full("stories260K"), kv="f16", speculate="draft", gated=False) as session:
        for first in range(0, SEEDS, 50):
            requests = [
                Request(prompt=start, sampling=Sampling(seed=seed, **WARM), max_tokens=4, ignore_eos=True)
                for seed in range(first, first + 50)
            ]
            found, more, stood = answers(session, requests)
            drafted, accepted = drafted + more, accepted + stood
            for tokens in found:
                counts[where.get(tokens[:3], len(paths))] += 1
    return counts, drafted, accepted


Exact = tuple[list[int], np.ndarray, np.ndarray]


def test_a_draft_leaves_the_distribution_as_it_is(engines: Engines, exact: Exact) -> None:
    """Chi-square of three tokens together, the last two of which went through the rejection rule."""
    start, paths, odds = exact
    assert len(paths) == KEPT**3 and abs(odds.sum() - 1) < 1e-9
    counts, drafted, accepted = drawn(engines, start, paths)
    assert counts.sum() == SEEDS
    assert drafted > SEEDS and 0.1 * drafted < accepted < 0.9 * drafted  # or the rule had nothing to do
    assert p_value(counts, odds) > 0.001


def take_all(sampler: Sampler, row: np.ndarray, guess: int, odds: np.ndarray) -> Choice:
    return Choice(guess)


def draw_anew(sampler: Sampler, row: np.ndarray, guess: int, odds: np.ndarray) -> Choice:
    """The right chance to stand, but else a token from p itself, not from what p has beyond the odds."""
    p = probabilities(row.astype(np.float64), sampler.sampling)
    return Choice(guess) if sampler._random().random() * odds[guess] < p[guess] else sampler.choose(row)


@pytest.mark.parametrize("rule", [take_all, draw_anew])
def test_a_wrong_rule_is_seen(
    engines: Engines,
    exact: Exact,
    monkeypatch: pytest.MonkeyPatch,
    rule: Callable[[Sampler, np.ndarray, int, np.ndarray], Choice],
) -> None:
    start, paths, odds = exact
    monkeypatch.setattr(Sampler, "verify", rule)
    counts, _, _ = drawn(engines, start, paths)
    assert p_value(counts, odds) < 1e-6
