"""The prefix tree against a plain list of what was stored: the longest beginning, and never a wrong token."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from books import check_pool, check_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.pages import PagePool, PageTable
from edge_runtime.serving.prefix import Match, PrefixTree

SIZE = 4
ROOTS = (None, "tidy")


@dataclass
class User:
    root: str | None
    tokens: list[int]
    table: PageTable


@dataclass
class Cache:
    """Pages with tokens in them, used as a scheduler does; `known` is the plain list of what was stored."""

    pages: int
    parts: bool = True
    users: list[User] = field(default_factory=list)
    known: dict[int, tuple[str | None, tuple[int, ...]]] = field(default_factory=dict)  # page -> root, path

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages, SIZE)
        self.tree = PrefixTree(self.pool, parts=self.parts)
        self.content = np.full((self.pages, SIZE), -1)
        forget = self.pool.forget

        def lost(page: int) -> None:
            root, path = self.known.pop(page)
            assert not any(r == root and p[: len(path)] == path for r, p in self.known.values())
            forget(page)

        self.pool.forget = lost

    def stored(self, root: str | None, tokens: list[int]) -> list[int]:
        """Tokens as they lie in a page: another root's are other numbers."""
        return [token + 100 * ROOTS.index(root) for token in tokens]

    def longest(self, root: str | None, tokens: list[int], most: int) -> tuple[int, int]:
        """Whole pages, and tokens after them, that some stored path has in common with `tokens[:most]`."""
        paths = {path for r, path in self.known.values() if r == root}
        whole = 0
        while (whole + 1) * SIZE <= most and tuple(tokens[: (whole + 1) * SIZE]) in paths:
            whole += 1
        if not self.parts:
            return whole, 0
        part, at = 0, whole * SIZE
        for path in paths:
            if len(path) == at + SIZE and list(path[:at]) == tokens[:at]:
                n = 0
                while n < SIZE and at + n < most and path[at + n] == tokens[at + n]:
                    n += 1
                part = max(part, n)
        return whole, part

    def run(self, root: str | None, tokens: list[int], most: int) -> Match | None:
        """Store tokens in pages, those of the known beginning taken over; None when there is no room."""
        known = self.tree.match(root, tokens, most)
        assert (len(known.nodes), known.part) == self.longest(root, tokens, most)
        assert (known.copy is None) == (known.part == 0)
        table = self.pool.open(len(tokens), len(tokens) // SIZE + 1, known.pages)
        if table is None:
            return None
        if known.copy is not None and (self.pool.references(known.copy.page) or self.pool.available):
            self.pool.share(known.copy.page)
            table.extend(known.part)
            self.content[table.pages[-1]] = self.content[known.copy.page]
            self.pool.drop(known.copy.page)
        user = User(root, tokens, table)
        assert self.read(user) == self.stored(root, tokens[: table.tokens])
        self.write(user)
        self.users.append(user)
        nodes = list(known.nodes)
        for at in range(len(nodes) * SIZE, len(tokens) - SIZE + 1, SIZE):
            path = (root, tuple(tokens[: at + SIZE]))
            fresh = path not in self.known.values()
            own = table.pages[at // SIZE]
            nodes.append(self.tree.add(root, nodes, tuple(tokens[at : at + SIZE]), table))
            assert (nodes[-1].page == own) == fresh
            if fresh:
                self.known[own] = path
        assert self.read(user) == self.stored(root, tokens)
        return known

    def read(self, user: User) -> list[int]:
        rows = [int(token) for page in user.table.pages for token in self.content[page]]
        return rows[: user.table.tokens]

    def write(self, user: User) -> None:
        begin = user.table.tokens
        user.table.extend(len(user.tokens) - begin)
        pages = user.table.pages
        for at, token in enumerate(self.stored(user.root, user.tokens[begin:]), begin):
            assert self.pool.references(pages[at // SIZE]) == 1  # nobody else's page is written
            self.content[pages[at // SIZE], at % SIZE] = token

    def close(self, at: int) -> None:
        self.users.pop(at).table.close()

    def drop(self, root: str | None) -> None:
        self.tree.drop(root)
        self.known = {page: known for page, known in self.known.items() if known[0] != root}

    def check(self) -> None:
        check_pool(self.pool, [user.table for user in self.users])
        paths = check_tree(self.tree, self.pool)
        assert {
            page: (root, tuple(t for node in path for t in node.tokens))
            for page, (root, path) in paths.items()
        } == self.known
        for page, (root, path) in self.known.items():
            assert self.content[page].tolist() == self.stored(root, list(path[-SIZE:]))
        for user in self.users:
            assert self.read(user) == self.stored(user.root, user.tokens)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "run", "close", "close", "drop"]),
        st.sampled_from(ROOTS),
        st.lists(st.integers(0, 1), min_size=1, max_size=22),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(2, 16), st.booleans())
def test_random_use_finds_the_longest_beginning_and_never_a_wrong_token(
    operations: list[tuple[str, str | None, list[int], int]], pages: int, parts: bool
) -> None:
    cache = Cache(pages, parts)
    for what, root, tokens, pick in operations:
        if what == "run":
            cache.run(root, tokens, min(pick, len(tokens) - 1))
        elif what == "close" and cache.users:
            cache.close(pick % len(cache.users))
        elif what == "drop" and not any(user.root == root for user in cache.users):
            cache.drop(root)
        cache.check()
    while cache.users:
        cache.close(0)
    cache.check()
    assert cache.pool.available == pages
    for root in ROOTS:
        cache.drop(root)
    cache.check()
    assert cache.pool.kept == 0 and len(cache.tree) == 0


def test_a_prompt_takes_whole_pages_and_a_copy_of_the_page_it_leaves_in_its_middle() -> None:
    cache = Cache(8)
    cache.run(None, [1, 2, 3, 4, 5, 6, 7, 8, 9], 8)
    found = cache.run(None, [1, 2, 3, 4, 5, 6, 0, 0, 0], 8)
    assert found is not None and (len(found.nodes), found.part) == (1, 2)
    first, second = (user.table.pages for user in cache.users)
    assert first[0] == second[0] and first[1] != second[1]
    assert cache.pool.references(first[0]) == 2
    cache.check()
    # The page's last token is left to be run when that is all there is: a token must be chosen after it
    found = cache.run(None, [1, 2, 3, 4, 5, 6, 7, 8], 7)
    assert found is not None and (len(found.nodes), found.part) == (1, 3)


def test_pages_in_part_are_not_copied_where_a_page_depends_on_all_its_tokens() -> None:
    cache = Cache(8, parts=False)
    cache.run(None, [1, 2, 3, 4, 5, 6, 7, 8], 7)
    found = cache.run(None, [1, 2, 3, 4, 5, 6, 7, 9], 7)
    assert found is not None and (len(found.nodes), found.copy) == (1, None)


def test_what_one_adapter_stored_is_nothing_to_another() -> None:
    cache = Cache(8)
    cache.run(None, [1, 2, 3, 4, 5], 4)
    assert cache.tree.match("tidy", [1, 2, 3, 4, 5], 4) == Match()
    cache.run("tidy", [1, 2, 3, 4, 5], 4)
    cache.close(0)
    cache.drop(None)
    cache.check()
    assert len(cache.tree) == 1 and cache.tree.match("tidy", [1, 2, 3, 4, 5], 4).nodes


def test_those_who_computed_the_same_at_the_same_time_end_up_with_one_page() -> None:
    pool = PagePool(4, SIZE)
    tree = PrefixTree(pool)
    tables = [pool.open(8, 2), pool.open(8, 2)]
    for table in tables:
        assert table is not None
        table.extend(6)
    nodes = [tree.add(None, [], (1, 2, 3, 4), table) for table in tables if table is not None]
    assert nodes[0] is nodes[1] and pool.references(nodes[0].page) == 2 and pool.used == 3
    assert [int(table.row[0]) for table in tables if table is not None] == [nodes[0].page] * 2


def test_the_end_of_a_prefix_is_lost_before_its_beginning() -> None:
    cache = Cache(4)
    cache.run(None, list(range(12)), 0)
    cache.run(None, [*range(8), 20, 21, 22, 23], 11)
    cache.close(0)
    cache.close(0)
    kept = [len(cache.known[page][1]) for page in cache.pool._kept]
    assert kept == [12, 12, 8, 4]
    cache.run("tidy", list(range(8)), 7)
    assert sorted(len(path) for root, path in cache.known.values() if root is None) == [4, 8]
    found = cache.tree.match(None, list(range(12)), 11)
    assert len(found.nodes) == 2 and found.part == 0
