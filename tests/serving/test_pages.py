"""Pages and tables under random use: invariants after each operation, everything free at the end."""

from __future__ import annotations

import pytest
from books import check_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.pages import PagePool, PageTable

WIDTH = 8
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "extend", "extend", "trim", "fix", "share", "close", "unknow"]),
        st.integers(0, 2**16),
        st.integers(0, 40),
    ),
    max_size=80,
)


class Users:
    """Tables that share pages as a prefix tree lets them: the content of a full page is its number here."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pool = PagePool(pages, page_tokens)
        self.pool.forget = self.lost
        self.tables: list[PageTable] = []
        self.least: dict[int, int] = {}  # tokens that a table must keep, by id
        self.paths: dict[int, list[int]] = {}  # a known page -> the pages from the beginning down to it
        self.order: list[int] = []  # known pages that nobody holds, as they were let go

    def lost(self, page: int) -> None:
        assert page == self.order.pop(0), "the page that was let go first is lost first"
        assert not any(page in path[:-1] for path in self.paths.values())
        del self.paths[page]

    def let_go(self, table: PageTable) -> None:
        held = table.pages
        table.close()
        self.order += [p for p in reversed(held) if p in self.paths and self.pool.references(p) == 0]

    def open(self, tokens: int, shared: list[int]) -> None:
        pool, available = self.pool, self.pool.available
        idle = sum(page in self.order for page in shared)
        table = pool.open(len(shared) * pool.page_tokens + tokens, WIDTH, shared)
        need = pool.pages_for(tokens)
        if table is None:
            assert need + idle > available or need + len(shared) > WIDTH
            assert pool.available == available
            return
        assert pool.available == available - need - idle
        self.order = [page for page in self.order if page not in shared]
        assert (table.pages, table.tokens) == (shared, len(shared) * pool.page_tokens)
        self.tables.append(table)
        self.least[id(table)] = table.tokens

    def fix(self, table: PageTable, twin: int | None) -> None:
        """Make the table's next full page known; as `twin`, when there is a known page of the same place."""
        at = self.least[id(table)] // self.pool.page_tokens
        if (at + 1) * self.pool.page_tokens > table.tokens:
            return
        above = table.pages[:at]
        twins = [p for p, path in self.paths.items() if path[:-1] == above and p != table.pages[at]]
        own = table.pages[at]
        page = own if twin is None or not twins else twins[twin % len(twins)]
        if page == own:
            self.pool.know(own)
            self.paths[own] = [*above, own]
        table.fix(at, page)
        if page != own:
            assert self.pool.references(own) == 0
            self.order = [p for p in self.order if p != page]
        self.least[id(table)] += self.pool.page_tokens

    def unknow(self, pick: int) -> None:
        """Forget a known page and all that follows it, as when an adapter is dropped."""
        if not self.paths:
            return
        page = list(self.paths)[pick % len(self.paths)]
        for gone in [p for p, path in self.paths.items() if page in path]:
            del self.paths[gone]
            self.pool.unknow(gone)
            self.order = [p for p in self.order if p != gone]

    def check(self) -> None:
        check_pool(self.pool, self.tables)
        assert list(self.pool._kept) == self.order
        assert self.pool._known == self.paths.keys()


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.sampled_from([1, 4, 16]), st.integers(1, 24))
def test_random_operations_keep_the_invariants(
    operations: list[tuple[str, int, int]], page_tokens: int, pages: int
) -> None:
    users = Users(pages, page_tokens)
    for what, pick, amount in operations:
        table = users.tables[pick % len(users.tables)] if users.tables else None
        if what == "open":
            users.open(amount, [])
        elif what == "share" and users.paths:
            paths = list(users.paths.values())
            users.open(amount, paths[pick % len(paths)])
        elif what == "unknow":
            users.unknow(pick)
        elif table is None:
            continue
        elif what == "extend":
            # What was promised must always be there, whatever others did
            table.extend(min(amount, table.room - table.tokens))
        elif what == "trim":
            table.trim(max(users.least[id(table)], table.tokens - amount))
        elif what == "fix":
            users.fix(table, amount if amount % 2 else None)
        elif what == "close":
            users.tables.remove(table)
            users.let_go(table)
            table.close()
        users.check()
    while users.tables:
        users.let_go(users.tables.pop())
    users.check()
    assert users.pool.available == pages and users.pool.used == 0


def test_growing_beyond_the_reservation_is_refused_and_changes_nothing() -> None:
    pool = PagePool(8, 4)
    table = pool.open(8, WIDTH)
    assert table is not None
    table.extend(8)
    with pytest.raises(ValueError, match="9 tokens need 3 pages, 2 were reserved"):
        table.extend(1)
    assert table.tokens == 8 and pool.used == 2


def test_pages_that_others_may_use_cannot_be_trimmed_nor_fixed_out_of_order() -> None:
    pool = PagePool(8, 4)
    table = pool.open(16, WIDTH)
    assert table is not None
    table.extend(9)
    with pytest.raises(ValueError, match="entry 1 cannot be fixed: 0 are"):
        table.fix(1, table.pages[1])
    table.fix(0, table.pages[0])
    table.fix(1, table.pages[1])
    table.trim(8)
    with pytest.raises(ValueError, match="cannot trim to 7: 8 tokens, 2 pages fixed"):
        table.trim(7)
    with pytest.raises(ValueError, match="entry 2 cannot be fixed: 2 are, 2 are held"):
        table.fix(2, 0)
    with pytest.raises(ValueError, match="cannot trim to 9"):
        table.trim(9)


def test_a_promise_keeps_others_out() -> None:
    pool = PagePool(4, 16)
    first = pool.open(48, WIDTH)
    assert first is not None and pool.used == 0 and pool.available == 1
    assert pool.open(17, WIDTH) is None
    first.close()
    assert pool.open(64, WIDTH) is not None


def test_kept_pages_are_lost_oldest_first_and_only_when_no_page_is_free() -> None:
    pool, lost = PagePool(4, 4), []
    pool.forget = lost.append
    table = pool.open(12, WIDTH)
    assert table is not None
    table.extend(12)
    first, second, third = table.pages
    for i, page in enumerate(table.pages):
        pool.know(page)
        table.fix(i, page)
    table.close()
    assert (pool.kept, pool.used, pool.available) == (3, 0, 4)
    other = pool.open(12, WIDTH)
    assert other is not None
    other.extend(4)
    assert lost == []
    other.extend(8)
    assert lost == [third, second] and other.pages[1:] == lost
    # The page that is left still cannot be promised twice
    assert pool.open(8, WIDTH, [first]) is None
    again = pool.open(4, WIDTH, [first])
    assert again is not None and pool.references(first) == 1 and pool.available == 0
