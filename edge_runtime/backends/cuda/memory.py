"""The device memory of a loaded part: named regions in one arena, allocated at load and never grown.

One block where the driver gives it; where it refuses a large block although the bytes are free (fragmented
memory, an integrated GPU beside other processes), halves of it, and halves of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.errors import DoesNotFit, EdgeError

ALIGN = 256  # of every block that CUDA allocates


class Region(NamedTuple):
    """Bytes that lie together at an address that is a multiple of `align` (a power of two, at most 256)."""

    name: str
    nbytes: int
    align: int = ALIGN


def place(regions: Iterable[Region]) -> tuple[dict[str, int], int]:
    """(offset of each region, bytes in all) of regions laid one after the other in their order."""
    offsets: dict[str, int] = {}
    end = 0
    for name, nbytes, align in regions:
        offsets[name] = end = -(-end // align) * align
        end += nbytes
    return offsets, end


class DeviceArena:
    """Regions in device memory: their `addresses`, the `nbytes` held with padding, in how many `blocks`."""

    def __init__(self, driver: Driver, regions: Iterable[Region | tuple[str, int, int]]) -> None:
        """Raises DoesNotFit, then nothing is held; ValueError for regions that are none."""
        wanted = [Region(*region) for region in regions]
        _check(wanted)
        self._driver = driver
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._addresses: dict[str, int] = {}
        need = place(wanted)[1]
        have, source = driver.free_bytes()
        if need > have:
            raise DoesNotFit(
                f"the engine needs {need} bytes of GPU memory, {have} are free ({source}); close what else "
                "uses the GPU, or plan for fewer pages, tokens or a smaller context",
                need=need,
                have=have,
                source=source,
            )
        try:
            self._allocate(wanted)
        except EdgeError:
            self.release()
            raise

    def _allocate(self, regions: list[Region]) -> None:
        """In one block, or in two parts that are near in size, each in the same way."""
        offsets, nbytes = place(regions)
        if not nbytes:
            self._addresses.update(dict.fromkeys(offsets, 0))
            return
        try:
            start = self._driver.allocate(nbytes)
        except DoesNotFit:
            if len(regions) == 1:
                raise
            half = _middle(regions)
            self._allocate(regions[:half])
            self._allocate(regions[half:])
            return
        self._blocks[start] = nbytes
        self._addresses.update({name: start + offset for name, offset in offsets.items()})

    @property
    def addresses(self) -> Mapping[str, int]:
        """Device address of each region; 0 for one without bytes that has no block."""
        return self._addresses

    @property
    def nbytes(self) -> int:
        return sum(self._blocks.values())

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def fill(self, value: int = 0) -> None:
        """Queue setting every byte."""
        for start, nbytes in self._blocks.items():
            self._driver.fill(start, nbytes, value)

    def release(self) -> None:
        """Give everything back; does nothing a second time, or once the driver is closed or lost."""
        for start in self._blocks:
            with suppress(EdgeError):
                self._driver.free(start)
        self._blocks, self._addresses = {}, {}


def _middle(regions: list[Region]) -> int:
    """Where to cut so that both parts are as near in bytes as whole regions allow; neither is empty."""
    total = sum(r.nbytes for r in regions)
    sums = list(_running(r.nbytes for r in regions[:-1]))
    return 1 + min(range(len(sums)), key=lambda i: abs(2 * sums[i] - total))


def _running(sizes: Iterable[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


def _check(regions: list[Region]) -> None:
    names: set[str] = set()
    for name, nbytes, align in regions:
        if nbytes < 0 or not 1 <= align <= ALIGN or align & (align - 1):
            raise ValueError(f"region {name!r}: {nbytes} bytes aligned to {align}")
        if name in names:
            raise ValueError(f"two regions are called {name!r}")
        names.add(name)
