"""Between the prefix tree and files: the bytes of known pages out of an executor, and back into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_runtime.backends.protocol import Executor
from edge_runtime.errors import BadRequest
from edge_runtime.serving.adapters import LoadedAdapter
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.prefix import Node, PrefixTree
from edge_runtime.serving.prefix_file import Origin, SavedPrefix, read_prefix, write_prefix


@dataclass(frozen=True, slots=True)
class PrefixPages:
    """origin: what the bytes of the session's pages depend on, without an adapter."""

    tree: PrefixTree
    pool: PagePool
    executor: Executor
    origin: Origin

    def save(
        self,
        path: str | os.PathLike[str],
        tokens: Sequence[int],
        name: str | None,
        adapter: LoadedAdapter | None,
    ) -> int:
        """Write the full pages that `tokens` begin with, as far as they are known; returns their tokens.

        name: of the adapter that they were computed with. Raises BadRequest when there is none.
        """
        nodes = self.tree.match(name, tokens, len(tokens)).nodes
        if not nodes:
            raise BadRequest(
                f"the prefix has {len(tokens)} tokens, a page of the KV cache {self.pool.page_tokens}; what "
                "fills no page is not worth a file"
            )
        saved = tuple(token for node in nodes for token in node.tokens)
        pages = np.stack([self.executor.read_page(node.page) for node in nodes])
        write_prefix(path, self._origin(adapter), SavedPrefix(saved, pages))
        return len(saved)

    def read(self, path: str | os.PathLike[str], vocab: int, adapter: LoadedAdapter | None) -> SavedPrefix:
        """Raises BadPrefixFile."""
        return read_prefix(path, self._origin(adapter), vocab)

    def restore(self, prefix: SavedPrefix, name: str | None) -> int:
        """Write the pages and make them known, kept while there is room; returns how many tokens.

        Raises BadRequest when the pages are more than what is free.
        """
        count = len(prefix.pages)
        table = self.pool.open(len(prefix.tokens), count)
        if table is None:
            raise BadRequest(
                f"the prefix needs {count} pages of the KV cache, {self.pool.available} are free; load it "
                "while no requests are in flight, or build the engine with more --kv-tokens"
            )
        try:
            table.extend(len(prefix.tokens))
            nodes: list[Node] = []
            for i, data in enumerate(prefix.pages):
                self.executor.write_page(int(table.row[i]), data)
                at = i * self.pool.page_tokens
                tokens = prefix.tokens[at : at + self.pool.page_tokens]
                nodes.append(self.tree.add(name, nodes, tokens, table))
        finally:
            table.close()
        return len(prefix.tokens)

    def _origin(self, adapter: LoadedAdapter | None) -> Origin:
        return msgspec.structs.replace(self.origin, adapter=None if adapter is None else adapter.digest)
