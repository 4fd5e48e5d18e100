"""The schedule: within the step's shape, decoding first, nobody starves, no page is ever missing."""

from __future__ import annotations

from time import perf_counter

import pytest
from history_model import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import QueueFull
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.prefix import PrefixTree
from edge_runtime.serving.request import Request
from edge_runtime.serving.sampling import Choice
from edge_runtime.serving.scheduler import Item, Scheduler
from edge_runtime.serving.sequence import Sequence

TOKENIZER = make_tokenizer()


def make(step: StepShape, pages: int, max_waiting: int = 64) -> tuple[Scheduler, PagePool]:
    pool = PagePool(pages, 16)
    scheduler = Scheduler(
        step,
        pool,
        PrefixTree(pool),
        Pace(),
        width=-(-step.context // 16),
        max_waiting=max_waiting,
        copy_page=lambda source, target: None,
        clock=perf_counter,
    )
    return scheduler, pool


def sequence(number: int, prompt: int, limit: int) -> Sequence:
    return Sequence(number, Request(prompt=[5] * prompt, max_tokens=limit), [5] * prompt, limit, TOKENIZER)


def commit(scheduler: Scheduler, items: list[Item]) -> None:
    for item in items:
        item.sequence.computed += item.count
        if item.choose and item.sequence.commit(Choice(9)).finish_reason is not None:
            scheduler.remove(item.sequence)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(4, 12),
)
def test_every_request_ends_and_no_step_is_too_large(
    requests: list[tuple[int, int]], sequences: int, tokens: int, logits: int, pages: int
) -> None:
    step = StepShape(context=64, sequences=sequences, tokens=tokens, logits=logits)
    scheduler, pool = make(step, pages)
    all_of_them = [sequence(i, prompt, limit) for i, (prompt, limit) in enumerate(requests)]
    for s in all_of_them:
        scheduler.submit(s)
    work = sum(prompt + limit for prompt, limit in requests)
    for _ in range(4 * work):
        items = scheduler.schedule()
        if not items:
            break
        assert sum(i.count for i in items) <= tokens
        assert sum(i.choose for i in items) <= logits
        assert len({i.sequence.id for i in items}) == len(items) <= sequences
        for i in items:
            assert i.start == i.sequence.computed and 0 < i.count <= i.sequence.pending
            assert i.choose == (i.start + i.count == len(i.sequence.tokens))
        commit(scheduler, items)
    assert [s.finish_reason for s in all_of_them] == ["length"] * len(requests)
    assert pool.used == 0 and pool.available == pages


def test_a_long_prompt_is_cut_and_others_go_on_decoding() -> None:
    scheduler, _ = make(StepShape(context=64, sequences=2, tokens=8, logits=2), 8)
    short, long = sequence(1, 3, 20), sequence(2, 30, 2)
    scheduler.submit(short)
    commit(scheduler, scheduler.schedule())
    scheduler.submit(long)
    chunks = []
    while long.pending > 1:
        items = scheduler.schedule()
        assert items[0].sequence is short and items[0].count == 1 and items[0].choose
        chunks.append(items[1].count)
        commit(scheduler, items)
    assert chunks == [7, 7, 7, 7, 2]


def test_a_step_of_one_token_alternates() -> None:
    scheduler, _ = make(StepShape(context=64, sequences=2, tokens=1, logits=1), 8)
    scheduler.submit(sequence(1, 1, 6))
    commit(scheduler, scheduler.schedule())
    scheduler.submit(sequence(2, 4, 1))
    order = []
    for _ in range(6):
        items = scheduler.schedule()
        order.append(items[0].sequence.id)
        commit(scheduler, items)
    assert order == [2, 1, 2, 1, 2, 1]


def test_admission_reserves_all_pages_and_keeps_the_order() -> None:
    scheduler, pool = make(StepShape(context=64, sequences=4, tokens=64, logits=4), 4)
    first, big, small = sequence(1, 17, 17), sequence(2, 30, 20), sequence(3, 1, 1)
    for s in (first, big, small):
        scheduler.submit(s)
    commit(scheduler, scheduler.schedule())
    # 33 positions take 3 pages of 4; the next needs 4 and waits; the small one does not overtake it
    assert scheduler.running == [first] and pool.used == 2 and pool.available == 1
    while first.finish_reason is None:
        commit(scheduler, scheduler.schedule())
    commit(scheduler, scheduler.schedule())
    assert scheduler.running == [big]


def test_the_line_is_bounded() -> None:
    scheduler, _ = make(StepShape(context=64, sequences=1, tokens=8, logits=1), 4, max_waiting=2)
    scheduler.submit(sequence(1, 1, 1))
    scheduler.submit(sequence(2, 1, 1))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        scheduler.submit(sequence(3, 1, 1))
