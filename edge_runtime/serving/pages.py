"""Which KV page belongs to whom: tables, reference counts, trim. The pages' bytes are a backend's.

A table reserves, when it is opened, every page it may ever need; so a running sequence never runs out. Pages
hold `page_tokens` tokens (Kwon et al. 2023, PagedAttention); only full pages are shared, so none is written
while two tables hold it.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import Array


class PagePool:
    """`pages` pages of `page_tokens` tokens each. A page promised to a table is free but not available."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._promised = 0

    @property
    def used(self) -> int:
        """Pages that some table holds."""
        return self.pages - len(self._free)

    @property
    def available(self) -> int:
        """Pages neither held nor promised."""
        return len(self._free) - self._promised

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def open(self, tokens: int, width: int) -> PageTable | None:
        """A table that may grow to `tokens` tokens; its row has `width` entries. None when it must wait."""
        need = self.pages_for(tokens)
        if need > self.available or need > width:
            return None
        self._promised += need
        return PageTable(self, need, width)

    def references(self, page: int) -> int:
        """How many tables hold the page."""
        return self._references[page]

    def take(self) -> int:
        """A promised page, now held once."""
        page = self._free.pop()
        self._references[page] = 1
        self._promised -= 1
        return page

    def share(self, page: int) -> None:
        """Hold a page once more."""
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """Hold a page once less; at zero it is free."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def promise(self, change: int) -> None:
        """Promise more free pages, or (negative) fewer."""
        self._promised += change


class PageTable:
    """The pages of one sequence, in order. `row` (width,) int32 is what a StepBatch takes, -1 = none."""

    def __init__(self, pool: PagePool, limit: int, width: int) -> None:
        self._pool = pool
        self._limit = limit  # pages it may hold
        self._held = 0
        self._shared = 0  # leading pages that were shared at some time: never written or trimmed again
        self.row: Array = np.full(width, -1, np.int32)
        self.tokens = 0

    def extend(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises ValueError beyond what was reserved (a scheduler's mistake)."""
        need = self._pool.pages_for(self.tokens + tokens)
        if need > self._limit:
            raise ValueError(f"{self.tokens + tokens} tokens need {need} pages, {self._limit} were reserved")
        while self._held < need:
            self.row[self._held] = self._pool.take()
            self._held += 1
        self.tokens += tokens

    def trim(self, tokens: int) -> None:
        """Forget everything from position `tokens` on; the table may grow again to what was reserved.

        Raises ValueError inside the pages that were shared.
        """
        if not self._shared * self._pool.page_tokens <= tokens <= self.tokens:
            raise ValueError(f"cannot trim to {tokens}: {self.tokens} tokens, {self._shared} pages shared")
        keep = self._pool.pages_for(tokens)
        while self._held > keep:
            self._pool.promise(1)
            self._release_last()
        self.tokens = tokens

    def fork(self, tokens: int) -> tuple[PageTable, list[tuple[int, int]]] | None:
        """A table over the same full pages that may grow to `tokens` tokens, and (source, target) copies.

        The page that is filled in part is copied rather than shared: copy it before the next step. None when
        there are not enough pages.
        """
        whole = self.tokens // self._pool.page_tokens
        limit = self._pool.pages_for(max(tokens, self.tokens))
        if limit - whole > self._pool.available or limit > len(self.row):
            return None
        self._pool.promise(limit - whole)
        other = PageTable(self._pool, limit, len(self.row))
        other.row[:whole] = self.row[:whole]
        for page in self.row[:whole]:
            self._pool.share(int(page))
        other._held = other._shared = whole
        self._shared = max(self._shared, whole)
        other.tokens = whole * self._pool.page_tokens
        other.extend(self.tokens - other.tokens)
        copies = [(int(self.row[i]), int(other.row[i])) for i in range(whole, self._held)]
        return other, copies

    def close(self) -> None:
        """Give everything back, promises too. A second close does nothing."""
        self._pool.promise(self._held - self._limit)
        while self._held:
            self._release_last()
        self._limit = self._shared = self.tokens = 0

    def _release_last(self) -> None:
        self._held -= 1
        self._pool.drop(int(self.row[self._held]))
        self.row[self._held] = -1
