"""Prefix reuse: which full KV pages hold which tokens, so that the same beginning is computed once.

A tree whose nodes are full pages (as Zheng et al. 2024, SGLang's radix attention, cut at pages): a node's
content follows from its tokens and those of all nodes above it. A request adopts the pages of the longest
path that its prompt begins with, and a copy of the page in whose middle it leaves the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.serving.pages import PagePool, PageTable


@dataclass(slots=True, eq=False)
class Node:
    """One full page. drafted: the draft model's keys and values are in it too."""

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    drafted: bool = False
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """What of a prompt is in the cache: whole pages, and the first `part` tokens of page `copy`."""

    nodes: tuple[Node, ...] = ()
    copy: Node | None = None
    part: int = 0

    @property
    def pages(self) -> list[int]:
        return [node.page for node in self.nodes]


class PrefixTree:
    """Known pages of a pool. Several trees may stand beside each other, one for each adapter (`root`).

    A table that holds a node's page holds the pages of all nodes above it, and lets go of them after it. So
    the page that was let go first, and is lost first, is always a leaf's.
    """

    def __init__(self, pool: PagePool, *, parts: bool = True) -> None:
        """parts: pages may be copied in part; not where a page's numbers depend on all its tokens."""
        self._pool = pool
        self._parts = parts
        self._roots: dict[str | None, Node] = {}
        self._by_page: dict[int, Node] = {}
        pool.forget = self._forget

    def __len__(self) -> int:
        return len(self._by_page)

    def match(self, root: str | None, tokens: Sequence[int], most: int) -> Match:
        """The longest known beginning of `tokens`, at most `most` tokens of it."""
        size = self._pool.page_tokens
        node = self._root(root)
        nodes: list[Node] = []
        while (len(nodes) + 1) * size <= most:
            at = len(nodes) * size
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                break
            nodes.append(child)
            node = child
        if not self._parts:
            return Match(tuple(nodes))
        rest = tokens[len(nodes) * size : min(most, (len(nodes) + 1) * size)]
        best, part = None, 0
        for child in node.children.values():
            common = _common(child.tokens, rest)
            if common > part:
                best, part = child, common
        return Match(tuple(nodes), best, part)

    def add(self, root: str | None, above: Sequence[Node], tokens: tuple[int, ...], table: PageTable) -> Node:
        """Make the table's next page known as the one that follows the nodes `above`; returns its node.

        When the content is known already, the table takes the known page in place of its own.
        """
        parent = above[-1] if above else self._root(root)
        found = parent.children.get(tokens)
        if found is None:
            found = Node(tokens, int(table.row[len(above)]), parent)
            parent.children[tokens] = found
            self._by_page[found.page] = found
            self._pool.know(found.page)
        table.fix(len(above), found.page)
        return found

    def drop(self, root: str | None) -> None:
        """Forget all that is known under a root; pages in use stay with those who use them."""
        if root in self._roots:
            self._lose(self._roots.pop(root))

    def distrust(self, nodes: Sequence[Node], copied: Node | None) -> None:
        """Forget what a sequence that failed held, or was given a copy of: its bytes may be why.

        Not what another table holds: that one's numbers prove it right, or it fails as well.
        """
        doubtful = [(node, 1) for node in nodes] + ([] if copied is None else [(copied, 0)])
        for node, holders in doubtful:
            known = self._by_page.get(node.page) is node
            if known and self._pool.references(node.page) == holders and node.parent is not None:
                del node.parent.children[node.tokens]
                self._lose(node)

    def _lose(self, top: Node) -> None:
        """Forget a node that is cut off already, and all below it."""
        stack = [top]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if self._by_page.get(node.page) is node:
                del self._by_page[node.page]
                self._pool.unknow(node.page)
            node.children = {}

    def _root(self, root: str | None) -> Node:
        return self._roots.setdefault(root, Node((), -1, None))

    def _forget(self, page: int) -> None:
        node = self._by_page.pop(page)
        assert not node.children and node.parent is not None  # leaves go first, see the class
        node.parent.children.pop(node.tokens, None)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
