"""What must be true of a session between any two operations: who holds which page, and what stands in it."""

from __future__ import annotations

from collections import Counter

import numpy as np
from history_model import HistoryExecutor, adapted

from edge_runtime.serving.pages import PagePool, PageTable
from edge_runtime.serving.prefix import Node, PrefixTree
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.session import Session


def check_pool(pool: PagePool, tables: list[PageTable]) -> None:
    """A page is free, kept or held, by as many tables as it has references; promises are kept track of."""
    held = Counter(page for table in tables for page in table.pages)
    for table in tables:
        pages = table.pages
        assert len(pages) == len(set(pages)) == pool.pages_for(table.tokens)
        assert (table.row[len(pages) :] == -1).all()
        assert table.tokens <= table.room
    assert [pool.references(page) for page in range(pool.pages)] == [held[p] for p in range(pool.pages)]
    free, kept = pool._free, list(pool._kept)
    assert sorted([*free, *kept, *held]) == list(range(pool.pages))
    assert (pool.used, pool.kept) == (len(held), len(kept))
    assert set(kept) <= pool._known and not set(free) & pool._known
    assert pool._promised == sum(table.promised for table in tables)
    assert pool.available == len(free) + len(kept) - pool._promised >= 0


def check_tree(tree: PrefixTree, pool: PagePool) -> dict[int, tuple[str | None, list[Node]]]:
    """Known pages are nodes, once each; whoever holds one holds those above it, and leaves are lost first.

    Returns page -> the root it is under and the nodes down to it.
    """
    found: dict[int, tuple[str | None, list[Node]]] = {}
    stack: list[tuple[str | None, Node, list[Node]]] = [
        (name, root, []) for name, root in tree._roots.items()
    ]
    age = {page: i for i, page in enumerate(pool._kept)}
    while stack:
        name, above, path = stack.pop()
        for tokens, node in above.children.items():
            assert node.tokens == tokens and len(tokens) == pool.page_tokens
            assert node.parent is above and node.page not in found
            assert not path or pool.references(node.page) <= pool.references(above.page)
            if node.page in age and above.page in age:
                assert age[node.page] < age[above.page]
            found[node.page] = (name, [*path, node])
            stack.append((name, node, [*path, node]))
    assert found.keys() == tree._by_page.keys() == pool._known
    return found


def check_books(session: Session, executor: HistoryExecutor, draft: HistoryExecutor | None = None) -> None:
    """Pages, slots and the cache's content of a session over fakes; `draft`: of its draft model."""
    scheduler, pool = session._scheduler, session._pool
    tables = []
    for s in scheduler.running:
        assert s.pages is not None
        tables.append(s.pages)
        _check_sequence(s, s.pages, executor, draft, pool.page_tokens)
    for s in scheduler.waiting:
        assert (s.pages, s.slot, s.nodes, s.computed, s.draft_computed, s.hidden) == (
            None,
            -1,
            [],
            0,
            0,
            None,
        )
    check_pool(pool, tables)
    slots = [s.slot for s in scheduler.running]
    assert sorted([*slots, *scheduler._slots]) == list(range(session.step_shape.sequences))
    assert {s.id for s in (*scheduler.running, *scheduler.waiting)} == set(session._traffic.live)
    numbers: dict[str | None, int] = {None: -1}
    numbers |= {name: session._adapters.get(name).number for name in session.adapters}
    for page, (name, path) in check_tree(session._tree, pool).items():
        node = path[-1]
        assert executor.cache[page].tolist() == adapted(node.tokens, numbers[name])
        if draft is not None and node.drafted:
            assert draft.cache[page].tolist() == list(node.tokens)


def _check_sequence(
    s: Sequence, table: PageTable, executor: HistoryExecutor, draft: HistoryExecutor | None, size: int
) -> None:
    assert s.finish_reason is None and 0 <= s.computed < len(s.tokens)
    assert table.tokens == s.computed and len(s.nodes) == s.computed // size
    assert table.pages[: len(s.nodes)] == [node.page for node in s.nodes]
    assert len(s.tokens) - 1 <= s.reach <= table.room
    held = np.concatenate([executor.cache[page] for page in table.pages] or [[]])
    assert held[: s.computed].tolist() == adapted(s.tokens[: s.computed], s.adapter)
    if draft is not None:
        assert s.draft_computed <= s.computed
        held = np.concatenate([draft.cache[page] for page in table.pages] or [[]])
        assert held[: s.draft_computed].tolist() == s.tokens[: s.draft_computed]
