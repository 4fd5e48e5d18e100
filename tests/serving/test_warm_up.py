"""warm_up: every shape of step runs, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from history_model import assert_idle, make_session
from speaking_engine import write_speaking

from edge_runtime import BadRequest, NumericError, open_engine
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.serving.request import Request


def shapes(batches: list[StepBatch]) -> set[tuple[int, int, int]]:
    """(tokens, sequences, rows of logits) of each batch."""
    return {(len(b.tokens), len(b.page_tables), len(b.logit_rows)) for b in batches}


def test_every_shape_runs_once_and_nothing_stays() -> None:
    session, executor = make_session(sequences=3, tokens=16, pages=12)
    with session:
        before = session.snapshot()
        session.warm_up()
        ran = shapes(executor.batches)
        assert {(n, 1, 1) for n in (1, 2, 4, 8, 16)} <= ran
        assert {(n, n, n) for n in (1, 2, 3)} <= ran
        after = session.snapshot()
        assert after == before
        assert_idle(session)
        assert session.pages_kept == 0


@pytest.mark.parametrize("speculate", ["lookup", "off"])
@pytest.mark.parametrize("kv", [None, "int8c,int8"])
def test_a_real_engine_answers_the_same_after_it(tmp_path: Path, speculate: str, kv: str | None) -> None:
    write_speaking(tmp_path / "e.edge", sequences=3)
    with open_engine(tmp_path / "e.edge", threads=1, speculate=speculate, kv=kv) as session:
        first = session.complete("Once upon a time", max_tokens=20)
    with open_engine(tmp_path / "e.edge", threads=1, speculate=speculate, kv=kv) as session:
        session.warm_up()
        assert (session.pages_used, session.pages_kept, session.metrics.steps) == (0, 0, 0)
        done = session.complete("Once upon a time", max_tokens=20)
        assert (done.tokens, done.usage.cached_tokens) == (first.tokens, 0)


def test_kept_prefixes_survive_it(tmp_path: Path) -> None:
    write_speaking(tmp_path / "e.edge")
    with open_engine(tmp_path / "e.edge", threads=1) as session:
        session.complete("Once upon a time there was a robot. It went to the kitchen", max_tokens=8)
        kept = session.pages_kept
        assert kept > 0
        session.warm_up()
        assert session.pages_kept == kept


def test_every_size_is_prepared_also_those_that_no_pages_are_free_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, executor = make_session(sequences=3, tokens=16, pages=5)
    prepared: list[tuple[set[int], set[int]]] = []
    monkeypatch.setattr(
        executor, "warm_up", lambda sizes, chains=(): prepared.append((set(sizes), set(chains)))
    )
    with session:
        session.complete(list(range(7, 57)), max_tokens=3)
        assert session.pages_kept >= 3
        executor.batches.clear()
        session.warm_up()
        assert max(tokens for tokens, _, _ in shapes(executor.batches)) <= 16
        assert prepared == [(set(range(1, 17)), set())]


def test_it_is_refused_while_requests_are_in_flight() -> None:
    session, _ = make_session()
    with session:
        session.submit(Request(prompt=[7, 8, 9], max_tokens=4))
        with pytest.raises(BadRequest, match="in flight"):
            session.warm_up()


def test_numbers_that_are_not_finite_end_it_and_leave_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    session, executor = make_session()

    def broken(batch: StepBatch) -> Any:
        raise NumericError("the logits hold NaN or Inf")

    with session:
        monkeypatch.setattr(executor, "forward", broken)
        with pytest.raises(NumericError):
            session.warm_up()
        assert_idle(session)


@pytest.mark.parametrize("way", ["draft", "medusa"])
def test_guesses_are_made_and_verified_and_their_costs_forgotten(engines: Any, way: str) -> None:
    options: dict[str, Any] = {"threads": 1, "speculate": way, "gated": False, "draft_length": 4}
    prompt = [5, 9, 17, 11]
    with open_engine(engines.full("planner"), **options) as session:
        first = session.complete(prompt, max_tokens=12)
    with open_engine(engines.full("planner"), **options) as session:
        proposer: Any = session.speculation.proposer
        asked: list[tuple[int, int]] = []
        propose = proposer.propose

        def recorded(asks: Any) -> Any:
            asked.append((len(asks), asks[0][1]))
            return propose(asks)

        proposer.propose = recorded
        session.warm_up()
        assert {(1, n) for n in proposer.lengths} <= set(asked)
        assert {count for count, _ in asked} == set(range(1, session.step_shape.sequences + 1))
        assert proposer.pace.predict(1) == 0.0
        assert (session.pages_used, session.pages_kept, session.metrics.drafted) == (0, 0, 0)
        assert session.complete(prompt, max_tokens=12).tokens == first.tokens
