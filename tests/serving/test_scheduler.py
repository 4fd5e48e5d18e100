"""The schedule: within the step's shape, decoding first, nobody starves, no page is ever missing."""

from __future__ import annotations

from time import perf_counter

import pytest
from history_model import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import BackendUnavailable, QueueFull
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


def sequence(number: int, prompt: int, limit: int, *, priority: int = 0, token: int = 5) -> Sequence:
    ids = [token] * prompt
    return Sequence(number, Request(prompt=ids, max_tokens=limit, priority=priority), ids, limit, TOKENIZER)


def commit(scheduler: Scheduler, items: list[Item]) -> None:
    for item in items:
        item.sequence.computed += item.count
        if item.choose and item.sequence.commit(Choice(9)).finish_reason is not None:
            scheduler.remove(item.sequence)


def step(scheduler: Scheduler) -> list[Item]:
    """A step after which full pages are known, as a session's are."""
    items = scheduler.schedule()
    for item in items:
        s = item.sequence
        assert s.pages is not None
        size, end = 16, item.start + item.count
        while (len(s.nodes) + 1) * size <= end:
            at = len(s.nodes) * size
            node = scheduler._tree.add(None, s.nodes, tuple(s.tokens[at : at + size]), s.pages)
            s.nodes.append(node)
    commit(scheduler, items)
    return items


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


def test_nobody_is_pushed_back_in_vain() -> None:
    """Pages that an equal holds as well do not come free: the lower one would lose its place for nothing."""
    scheduler, pool = make(StepShape(context=64, sequences=4, tokens=64, logits=4), 6)
    equal, low = sequence(1, 40, 9, priority=5), sequence(2, 40, 9)
    for s in (equal, low):
        scheduler.submit(s)
        step(scheduler)
    assert pool.used == 4 and pool.available == 2  # two pages are both's
    urgent = sequence(3, 60, 4, priority=5, token=6)  # four pages
    scheduler.submit(urgent)
    for _ in range(3):
        step(scheduler)
    assert scheduler.running == [equal, low] and scheduler.preempted == 0
    scheduler.remove(equal)
    step(scheduler)
    assert scheduler.running == [urgent] and scheduler.waiting == [low] and scheduler.preempted == 1


def test_as_few_are_pushed_back_as_need_be_the_lowest_and_youngest_first() -> None:
    scheduler, _ = make(StepShape(context=64, sequences=4, tokens=64, logits=4), 8)
    middle, old, young = sequence(1, 17, 9, priority=1), sequence(2, 17, 9), sequence(3, 18, 9)
    for s in (middle, old, young):
        scheduler.submit(s)
    commit(scheduler, scheduler.schedule())
    urgent = sequence(4, 40, 9, priority=2)
    scheduler.submit(urgent)
    commit(scheduler, scheduler.schedule())
    assert scheduler.running == [middle, old, urgent] and scheduler.waiting == [young]
    assert (young.pages, young.slot, young.computed, young.nodes) == (None, -1, 0, [])
    assert scheduler.preempted == 1
    for _ in range(60):
        commit(scheduler, scheduler.schedule())
    assert [s.finish_reason for s in (middle, old, young, urgent)] == ["length"] * 4


def test_what_one_that_was_pushed_back_finds_again_is_not_counted_as_found() -> None:
    scheduler, _ = make(StepShape(context=64, sequences=1, tokens=16, logits=1), 8)
    low = sequence(1, 40, 9)
    scheduler.submit(low)
    for _ in range(2):
        step(scheduler)
    scheduler.submit(sequence(2, 4, 2, priority=1))
    for _ in range(4):
        step(scheduler)
    assert scheduler.preempted == 1 and scheduler.running == [low]
    assert low.computed >= 32 and low.cached == 0


def test_a_page_copy_that_fails_leaves_nothing_behind() -> None:
    scheduler, pool = make(StepShape(context=64, sequences=2, tokens=64, logits=2), 6)
    first = sequence(1, 20, 4)
    scheduler.submit(first)
    while first.finish_reason is None:
        step(scheduler)
    before = (pool.available, pool.kept, pool.used)

    def broken(source: int, target: int) -> None:
        raise BackendUnavailable("the device is gone")

    scheduler._copy_page, works = broken, scheduler._copy_page
    second = sequence(2, 10, 4)
    scheduler.submit(second)
    for _ in range(3):
        with pytest.raises(BackendUnavailable):
            scheduler.schedule()
        assert (pool.available, pool.kept, pool.used) == before
        assert (scheduler.waiting, scheduler.running, second.slot) == ([second], [], -1)
    scheduler._copy_page = works
    step(scheduler)
    assert second.cached == 9


def test_the_last_idle_page_is_not_copied_from_when_it_is_promised_to_somebody() -> None:
    """There everything is run instead, and the page goes to whom it was promised."""
    scheduler, pool = make(StepShape(context=64, sequences=3, tokens=64, logits=3), 3)
    first = sequence(1, 16, 1)
    scheduler.submit(first)
    step(scheduler)
    assert first.finish_reason == "length" and pool.kept == 1
    other = sequence(2, 9, 9, token=6)  # one page now, and one more later, the kept one
    copier = sequence(3, 12, 3)
    scheduler.submit(other)
    scheduler.submit(copier)
    step(scheduler)
    assert scheduler.running == [other, copier] and copier.cached == 0 and pool.kept == 1
    while other.finish_reason is None or copier.finish_reason is None:
        step(scheduler)
    assert pool.available == 3
