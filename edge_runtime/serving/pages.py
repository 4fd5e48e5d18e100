"""Which KV page belongs to whom: tables, reference counts, trim. The pages' bytes are a backend's.

A table reserves, when it is opened, every page it may ever need; so a running sequence never runs out. Pages
hold `page_tokens` tokens (Kwon et al. 2023, PagedAttention); only full pages are shared, so none is written
while two tables hold it. A page that nobody holds but whose content is known is kept as long as there is
room: it is free to whoever needs one, oldest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.engine.formats import Array


class PagePool:
    """`pages` pages of `page_tokens` tokens each. A page promised to a table is free but not available.

    forget: called with a kept page whose content is about to be lost.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.forget: Callable[[int], None] = lambda page: None
        self._free = list(range(pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, content known; oldest first
        self._known: set[int] = set()  # pages that are kept rather than freed when nobody holds them
        self._references = [0] * pages
        self._promised = 0

    @property
    def used(self) -> int:
        """Pages that some table holds."""
        return self.pages - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds, whose content may be used again."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages neither held nor promised."""
        return len(self._free) + len(self._kept) - self._promised

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def open(self, tokens: int, width: int, shared: Sequence[int] = ()) -> PageTable | None:
        """A table that may grow to `tokens` tokens and begins with the full pages `shared`; its row has
        `width` entries. None when it must wait.
        """
        need = self.pages_for(tokens) - len(shared)
        idle = sum(page in self._kept for page in shared)  # they are no longer there for others
        if need + idle > self.available or need + len(shared) > width:
            return None
        for page in shared:
            self.share(page)
        self._promised += need
        return PageTable(self, need + len(shared), width, shared)

    def references(self, page: int) -> int:
        """How many tables hold the page."""
        return self._references[page]

    def take(self) -> int:
        """A promised page, now held once."""
        if not self._free:
            self._free.append(self._lose_oldest())
        page = self._free.pop()
        self._references[page] = 1
        self._promised -= 1
        return page

    def share(self, page: int) -> None:
        """Hold a page once more: one that is held, or kept."""
        self._kept.pop(page, None)
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """Hold a page once less; at zero it is free, or kept while its content is known."""
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self._known:
                self._kept[page] = None
            else:
                self._free.append(page)

    def know(self, page: int) -> None:
        """The content of a held page may be used again once nobody holds it."""
        self._known.add(page)

    def unknow(self, page: int) -> None:
        """Its content is of no use to anybody else any more."""
        self._known.discard(page)
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def promise(self, change: int) -> None:
        """Promise more free pages, or (negative) fewer."""
        self._promised += change

    def _lose_oldest(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._known.discard(page)
        self.forget(page)
        return page


class PageTable:
    """The pages of one sequence, in order. `row` (width,) int32 is what a StepBatch takes, -1 = none."""

    def __init__(self, pool: PagePool, limit: int, width: int, shared: Sequence[int] = ()) -> None:
        self._pool = pool
        self._limit = limit  # pages it may hold
        self._held = len(shared)
        self._fixed = len(shared)  # leading pages whose content others may use: never written or trimmed
        self.row: Array = np.full(width, -1, np.int32)
        self.row[: len(shared)] = shared
        self.tokens = len(shared) * pool.page_tokens

    @property
    def pages(self) -> list[int]:
        """The pages that it holds, in order."""
        return [int(page) for page in self.row[: self._held]]

    @property
    def promised(self) -> int:
        """Pages that it may still take."""
        return self._limit - self._held

    @property
    def room(self) -> int:
        """Tokens that it may grow to."""
        return self._limit * self._pool.page_tokens

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

        Raises ValueError inside the pages that others may use.
        """
        if not self._fixed * self._pool.page_tokens <= tokens <= self.tokens:
            raise ValueError(f"cannot trim to {tokens}: {self.tokens} tokens, {self._fixed} pages fixed")
        keep = self._pool.pages_for(tokens)
        while self._held > keep:
            self._pool.promise(1)
            self._release_last()
        self.tokens = tokens

    def fix(self, index: int, page: int) -> None:
        """Entry `index`, the next that is not fixed, is for others to use as well, as `page`.

        Another page than the table's own holds the same content: it takes that one's place.
        """
        own = int(self.row[index])
        if index != self._fixed or index >= self._held:
            raise ValueError(f"entry {index} cannot be fixed: {self._fixed} are, {self._held} are held")
        if page != own:
            self._pool.share(page)
            self.row[index] = page
            self._pool.drop(own)
        self._fixed += 1

    def close(self) -> None:
        """Give everything back, promises too, last page first. A second close does nothing."""
        self._pool.promise(self._held - self._limit)
        while self._held:
            self._release_last()
        self._limit = self._fixed = self.tokens = 0

    def _release_last(self) -> None:
        self._held -= 1
        self._pool.drop(int(self.row[self._held]))
        self.row[self._held] = -1
