"""Page tables under random use: invariants after each operation, everything free at the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.pages import PagePool, PageTable

WIDTH = 8


def check(pool: PagePool, tables: list[PageTable]) -> None:
    held: dict[int, int] = {}
    for table in tables:
        pages = [int(p) for p in table.row if p >= 0]
        assert len(pages) == pool.pages_for(table.tokens)
        assert all(p == -1 for p in table.row[len(pages) :])
        assert len(set(pages)) == len(pages)
        for page in pages:
            held[page] = held.get(page, 0) + 1
    assert {p: pool.references(p) for p in range(pool.pages)} == {
        p: held.get(p, 0) for p in range(pool.pages)
    }
    assert pool.used == len(held)
    assert 0 <= pool.available <= pool.pages - pool.used


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "extend", "trim", "fork", "close"]),
        st.integers(0, 2**16),
        st.integers(0, 40),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.sampled_from([1, 4, 16]), st.integers(1, 24))
def test_random_operations_keep_the_invariants(
    operations: list[tuple[str, int, int]], page_tokens: int, pages: int
) -> None:
    pool = PagePool(pages, page_tokens)
    tables: list[PageTable] = []
    limits: dict[int, int] = {}  # tokens that each table was promised
    shared: dict[int, int] = {}  # tokens below which it must not be trimmed
    for what, pick, amount in operations:
        if what == "open":
            table = pool.open(amount, WIDTH)
            if table is not None:
                tables.append(table)
                limits[id(table)], shared[id(table)] = amount, 0
            else:
                assert pool.pages_for(amount) > min(pool.available, WIDTH)
        elif tables:
            table = tables[pick % len(tables)]
            if what == "extend":
                # What was promised must always be there, whatever others did
                table.extend(min(amount, limits[id(table)] - table.tokens))
            elif what == "trim":
                table.trim(max(shared[id(table)], table.tokens - amount))
            elif what == "fork":
                before = pool.available
                made = table.fork(table.tokens + amount)
                if made is not None:
                    other, copies = made
                    whole = table.tokens // page_tokens
                    assert list(other.row[:whole]) == list(table.row[:whole])
                    assert len(copies) == (table.tokens % page_tokens > 0)
                    assert all(pool.references(t) == 1 for _, t in copies)
                    tables.append(other)
                    limits[id(other)] = table.tokens + amount
                    shared[id(other)] = whole * page_tokens
                    shared[id(table)] = max(shared[id(table)], whole * page_tokens)
                else:
                    assert pool.available == before
            else:
                table.close()
                table.close()
                tables.remove(table)
        check(pool, tables)
    for table in tables:
        table.close()
    check(pool, [])
    assert pool.available == pool.pages


def test_growing_beyond_the_reservation_is_refused_and_changes_nothing() -> None:
    pool = PagePool(8, 4)
    table = pool.open(8, WIDTH)
    assert table is not None
    table.extend(8)
    with pytest.raises(ValueError, match="9 tokens need 3 pages, 2 were reserved"):
        table.extend(1)
    assert table.tokens == 8 and pool.used == 2


def test_shared_pages_cannot_be_trimmed() -> None:
    pool = PagePool(8, 4)
    table = pool.open(16, WIDTH)
    assert table is not None
    table.extend(9)
    assert table.fork(12) is not None
    table.trim(8)
    with pytest.raises(ValueError, match="2 pages shared"):
        table.trim(7)


def test_a_promise_keeps_others_out() -> None:
    pool = PagePool(4, 16)
    first = pool.open(48, WIDTH)
    assert first is not None and pool.used == 0 and pool.available == 1
    assert pool.open(17, WIDTH) is None
    first.close()
    assert pool.open(64, WIDTH) is not None
