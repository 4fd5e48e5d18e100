"""The exactness contract through whole sessions: the logits of every token are equal to the bit, whatever
shares its step, however its prompt was cut, wherever its beginning came from and whoever guessed ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real_engines import MODELS, Answer, Engines, Recorder, prompts, same

from edge_runtime import Request, Session, open_engine
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.kv import K_FORMATS, KV_FORMATS

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

PAIRS = [f"{k},{v}" for k in K_FORMATS for v in KV_FORMATS]
SAME = [f"{k},{v}" for k in K_FORMATS for v in KV_FORMATS if k.rstrip("c") == v]
TOKENS = 10  # of an answer
WAYS = ("draft", "lookup", "medusa")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def asked(session: Session, model: str, count: int = 8) -> list[Request]:
    return [Request(prompt=p, max_tokens=TOKENS, ignore_eos=True) for p in prompts(session, model, count)]


def long_one(session: Session, model: str) -> list[int]:
    """A prompt over several pages, whatever it means."""
    return [token for p in prompts(session, model, 4) for token in p][:75]


# Every pair on the small model, whose heads are narrower than a vector; the others with K as V.
CASES = [("stories260K", pair) for pair in PAIRS] + [
    (m, pair) for m in ("planner", "llama2xs") for pair in SAME
]
every_cache = pytest.mark.parametrize(("model", "kv"), CASES)


@every_cache
def test_batch_threads_and_chunks(engines: Engines, recorder: Recorder, model: str, kv: str) -> None:
    """1 request = 8, 1 thread = 2, prompt in one step = in pieces of 64, 7 and 1."""
    with open_engine(engines.build(model), kv=kv, speculate="off", threads=1) as session:
        requests = asked(session, model)
        want = recorder.alone(session, requests)
        assert all(len(a.rows) == TOKENS for a in want)
        session._tree.drop(None)
        assert same(recorder.together(session, requests), want)
    for size, count in ((64, 8), (7, 4), (1, 1)):
        words = ("--step-tokens", str(size), "--sequences", str(count))
        path = engines.build(model, *words, name=f"chunk{size}")
        with open_engine(path, kv=kv, speculate="off", threads=2) as session:
            assert session.step_shape.tokens == size
            assert same(recorder.together(session, requests[:count]), want[:count])


@every_cache
def test_a_prefix_found_is_a_prefix_computed(
    engines: Engines, recorder: Recorder, model: str, kv: str, tmp_path: Path
) -> None:
    """Whole pages and a copied part of one from the tree, and pages out of a file."""
    path = engines.build(model)
    with open_engine(path, kv=kv, speculate="off", threads=2) as session:
        text = long_one(session, model)
        other = [*text[:40], *text[30:55]]  # leaves the first in the middle of its third page
        requests = [Request(prompt=ids, max_tokens=TOKENS, ignore_eos=True) for ids in (text, other)]
        want = recorder.alone(session, requests)
        session._tree.drop(None)
        first = recorder.together(session, requests[:1])
        again = recorder.together(session, requests)
        assert same(first + again, want[:1] + want)
        whole = 64 if session.kv.per_channel else 74  # a page per channel counts as a whole
        assert [a.cached for a in again] == [whole, 32 if session.kv.per_channel else 40]
        saved = tmp_path / "some.prefix"
        assert session.save_prefix(text, saved) == 64
    with open_engine(path, kv=kv, speculate="off", threads=1, prefix=saved) as session:
        restored = recorder.together(session, requests)
        assert same(restored, want)
        assert restored[0].cached == 64


@pytest.mark.parametrize(("model", "kv"), [case for case in CASES if case[1] in SAME])
def test_a_request_pushed_back_goes_on_as_if_it_never_was(
    engines: Engines, recorder: Recorder, model: str, kv: str
) -> None:
    path = engines.build(model, "--context", "128", "--kv-tokens", "160", name="tight")
    with open_engine(path, kv=kv, speculate="off", threads=2) as session:
        text = long_one(session, model)
        low = Request(prompt=text[:60], max_tokens=30, ignore_eos=True)
        high = Request(prompt=text[5:70], max_tokens=30, ignore_eos=True, priority=1)
        want = recorder.alone(session, [low, high])
        session._tree.drop(None)
        victim = session._traffic.live[session.submit(low)]
        while len(victim.answer) < 9:
            session.step()
        urgent = session._traffic.live[session.submit(high)]
        while session.in_flight:
            session.step()
        assert session._scheduler.preempted == 1
        assert same([recorder.answer(victim), recorder.answer(urgent)], want)


@every_cache
def test_guesses_change_nothing(engines: Engines, recorder: Recorder, model: str, kv: str) -> None:
    """Chains of a draft and of look-up, trees of Medusa heads, with roll-backs, several requests at once.

    All of them where K is as V; the other pairs take turns.
    """
    path = engines.full(model)
    with open_engine(path, kv=kv, speculate="off", threads=1) as session:
        texts = [[*ids, *ids[:-3]] for ids in prompts(session, model, 4)]  # which look-up finds again
        requests = [Request(prompt=ids, max_tokens=2 * TOKENS, ignore_eos=True) for ids in texts]
        want = recorder.alone(session, requests)
    for way in WAYS if kv in SAME else WAYS[PAIRS.index(kv) % 3 :][:1]:
        with open_engine(path, kv=kv, speculate=way, gated=False, threads=2) as session:
            got = recorder.together(session, requests)
            assert same(got, want), way
            assert sum(a.drafted for a in got) > sum(a.accepted for a in got) > 0, way  # with roll-backs


# --- the comparison can fail -------------------------------------------------------------------------------


def test_sums_in_another_order_are_seen(engines: Engines, recorder: Recorder) -> None:
    """numpy's products round as the shape of the step says: the comparison above finds that."""
    with open_engine(engines.build("planner"), backend="reference", kv="f32", speculate="off") as session:
        requests = asked(session, "planner")
        want = recorder.alone(session, requests)
        session._tree.drop(None)
        got = recorder.together(session, requests)
    assert [a.tokens for a in got] == [a.tokens for a in want]  # near, so that tokens alone would not tell
    assert not same(got, want)


class SplitHead(HostLogits):
    """An executor whose last product is summed in parts, and then over the parts: `parts(sequences)` of them.

    What a step holds decides the order of sums: the mistake that the exactness contract forbids.
    """

    def __init__(self, executor: Executor, head: np.ndarray, parts: Callable[[int], int]) -> None:
        self._executor, self._head, self._parts = executor, head, parts

    def forward(self, batch: StepBatch) -> np.ndarray:
        self._executor.forward(batch)
        count = self._parts(len(batch.page_tables))
        out = []
        for row in self._executor.hidden:
            products = self._head * row  # (vocabulary, width)
            pieces = np.array_split(products, count, axis=1)
            out.append(np.sum([np.cumsum(p, axis=1, dtype=np.float32)[:, -1] for p in pieces], axis=0))
        return np.array(out, np.float32).reshape(-1, len(self._head))

    def __getattr__(self, name: str) -> object:
        return getattr(self._executor, name)


@pytest.mark.parametrize(
    ("parts", "exact"), [(lambda n: 4, True), (lambda n: n, False)], ids=["fixed", "by batch"]
)
def test_a_sum_that_depends_on_the_batch_is_seen(
    engines: Engines, recorder: Recorder, parts: Callable[[int], int], exact: bool
) -> None:
    path = engines.build("planner")
    with read_engine(path) as engine:
        head = decode(engine.part("language").weights["embed"])
    with open_engine(path, speculate="off", threads=1) as session:
        session._loop._executor = SplitHead(session._executor, head, parts)  # type: ignore[assignment]
        requests = asked(session, "planner")
        want = recorder.alone(session, requests)
        session._tree.drop(None)
        got = recorder.together(session, requests)
    assert [a.tokens for a in got] == [a.tokens for a in want]
    assert same(got, want) is exact


def test_the_comparison_looks_at_every_bit() -> None:
    answer = Answer((1, 2), np.ones((2, 8), np.float32), "length", 0, 0, 0)
    other = answer.rows.copy()
    other[1, 3] = np.nextafter(np.float32(1), np.float32(2))
    assert same([answer], [answer])
    assert not same([replace(answer, rows=other)], [answer])
    assert not same([replace(answer, reason="error")], [replace(answer, reason="error")])
    assert set(MODELS) >= {"planner", "stories260K", "llama2xs"}
