"""KV pages of a part moved as they are: copied, read out, written; rows of a verified tree put in place."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.backends.cuda.launcher import Launcher
from edge_runtime.backends.cuda.placement import Placement
from edge_runtime.backends.protocol import Part
from edge_runtime.engine.formats import Array
from edge_runtime.engine.launches import Lowered
from edge_runtime.errors import BadRequest


class Mover:
    """Copies on the driver's stream, in order with the steps."""

    def __init__(
        self, driver: Driver, part: Part, lowered: Lowered, place: Placement, launcher: Launcher
    ) -> None:
        self._driver = driver
        self._part = part
        self._lowered = lowered
        self._place = place
        self._launcher = launcher

    def copy_page(self, source: int, target: int) -> None:
        """Every array's page `source` to page `target`."""
        if source == target:
            return
        for i, nbytes in enumerate(self._place.page_nbytes()):
            self._driver.copy(self._place.page(i, target), self._place.page(i, source), nbytes)

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Rows at places `sources` of a sequence to `targets`; both ascend, none moves up.

        Raises BadRequest for a place that no token of the longest sequence has.
        """
        apart = sources != targets
        sources, targets = sources[apart], targets[apart]
        count = len(sources)
        if not count:
            return
        context = min(self._part.step.context, self._part.program.max_context)
        if sources[-1] >= context:
            raise BadRequest(f"place {int(sources[-1])} is beyond the context of {context}")
        pages = pages[: int(sources[-1]) // self._part.kv.page_tokens + 1]
        rows = [np.ascontiguousarray(a, np.int32) for a in (pages, sources, targets)]
        at = self._place.region("move")
        addresses = [at, at + rows[0].nbytes, at + rows[0].nbytes + rows[1].nbytes]
        self._driver.upload(at, np.concatenate(rows))
        for layer, kernel in enumerate(self._lowered.moves):
            heads = self._part.program.cache[layer].kv_heads
            record = rec.Move(
                self._place.kv(layer, "k"),
                self._place.kv(layer, "v"),
                *addresses,
                count=count,
                kv_heads=heads,
                page_tokens=self._part.kv.page_tokens,
            )
            function = self._launcher.function(kernel)
            self._driver.launch(function, (2 * heads, 1, 1), kernel.threads, 0, bytes(record))

    def read_page(self, page: int) -> Array:
        """Its bytes in all arrays, u8."""
        out = np.empty(sum(self._place.page_nbytes()), np.uint8)
        at = 0
        for i, nbytes in enumerate(self._place.page_nbytes()):
            self._driver.download(out[at : at + nbytes], self._place.page(i, page))
            at += nbytes
        return out

    def write_page(self, page: int, data: Array) -> None:
        """What `read_page` gave."""
        at = 0
        for i, nbytes in enumerate(self._place.page_nbytes()):
            self._driver.upload(self._place.page(i, page), np.ascontiguousarray(data[at : at + nbytes]))
            at += nbytes
