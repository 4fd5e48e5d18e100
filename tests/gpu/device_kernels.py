"""What tests/cuda/emulation.py offers, on a GPU: EDGE_KERNELS_ON=gpu lets the kernels' tests run there.

A launch copies every buffer that its record points to, guards and all, into device memory, runs the kernel
through the driver seam, and copies them back: so what it wrote beside a buffer is found as in the emulator.
Kernels are compiled one by one, when they are launched first, and kept on disk for other processes.
EDGE_DEVICE_BUFFERS=apart gives each buffer an allocation of its bytes alone, for compute-sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Iterator

import gpu_code
import numpy as np
from emulation import Emulated as HostEmulated
from emulation import EmulationError, compile_emulated
from emulation import Guarded as HostGuarded

from edge_runtime.backends.cuda.driver import Driver, Function, open_driver

_APART = os.environ.get("EDGE_DEVICE_BUFFERS") == "apart"
_ALIGN = 256
_LIVE: weakref.WeakValueDictionary[int, Guarded] = weakref.WeakValueDictionary()  # by address


class Guarded(HostGuarded):
    """Memory between two guards, which launches take with them to the device."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        _LIVE[self.address] = self

    front = 4096  # bytes of the guard before the data

    @property
    def whole(self) -> np.ndarray:
        """u8, with its guards."""
        return self._all


def guarded(nbytes: int) -> Guarded:
    return Guarded(nbytes)


def compile_kernels(source: str, *, asan: bool | None = None) -> str:
    """Compiled when something is launched."""
    return source


class Emulated:
    """The kernels of a translation unit, each its own module."""

    def __init__(self, source: str) -> None:
        lines = source.splitlines(keepends=True)
        kernels = gpu_code.kernels_in(source)
        self._threads = kernels
        self._preamble = "".join(line for line in lines if not line.startswith("EDGE_KERNEL"))
        self._lines = {
            next(iter(gpu_code.kernels_in(line))): line for line in lines if line.startswith("EDGE_KERNEL")
        }
        self._source = source
        self._functions: dict[tuple[str, int], Function] = {}

    def record_bytes(self, symbol: str) -> int:
        if gpu_code.EMULATED:
            return HostEmulated(compile_emulated(self._source)).record_bytes(symbol)
        return self._image(symbol).records[symbol]

    def threads(self, symbol: str) -> int:
        return self._threads[symbol]

    def launch(
        self,
        symbol: str,
        grid: int | tuple[int, ...],
        record: ctypes.Structure,
        shared: int = 0,
    ) -> None:
        """Runs a kernel to its end on the device, and brings back what it wrote."""
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        whole = (*sizes, 1, 1)[:3]
        driver = _driver()
        with driver.current:
            _moved(driver, record, lambda data: driver.launch(
                self._function(symbol, shared), whole, self._threads[symbol], shared, data))  # fmt: skip

    def _image(self, symbol: str) -> gpu_code.Image:
        if symbol not in self._threads:
            raise EmulationError(f"there is no kernel {symbol!r}")
        # The emulator's compiler takes long, and has the whole already
        text = self._source if gpu_code.EMULATED else self._preamble + self._lines[symbol]
        return gpu_code.compiler().image(text)

    def _function(self, symbol: str, shared: int) -> Function:
        key = symbol, shared
        if key not in self._functions:
            module = _driver().load_module(self._image(symbol).data)
            self._functions[key] = _driver().function(module, symbol, shared)
        return self._functions[key]


class _Arena:
    """Device memory that every launch places its buffers in anew, and host memory beside it, which grow."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._nbytes = 0
        self.address = 0
        self.host = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        if nbytes > self._nbytes:
            if self.address:
                self._driver.free(self.address)
            self._nbytes = max(nbytes, 1 << 24)
            self.address = self._driver.allocate(self._nbytes)
            self.host = np.empty(self._nbytes, np.uint8)


@functools.lru_cache(1)
def _driver() -> Driver:
    return open_driver()


@functools.lru_cache(1)
def _arena() -> _Arena:
    return _Arena(_driver())


def _moved(driver: Driver, record: ctypes.Structure, run: Callable[[bytes], None]) -> None:
    """`run` with the record whose pointers lead to copies on the device; what these hold then comes back."""
    data = bytearray(bytes(record))
    pointers = {at: (_owner(address), address) for at, address in _pointers(record)}
    buffers = list({id(found): found for found, _ in pointers.values()}.values())
    offsets = {at: (id(found), address - found.address) for at, (found, address) in pointers.items()}
    (_apart if _APART else _together)(driver, buffers, lambda places: run(_patched(data, offsets, places)))


def _patched(data: bytearray, offsets: dict[int, tuple[int, int]], places: dict[int, int]) -> bytes:
    """The record with device addresses. places: where the data of a buffer (by id) lies."""
    for at, (buffer, offset) in offsets.items():
        data[at : at + 8] = (places[buffer] + offset).to_bytes(8, "little")
    return bytes(data)


def _together(driver: Driver, buffers: list[Guarded], run: Callable[[dict[int, int]], None]) -> None:
    """All in one block of memory, with one copy there and one back."""
    arena, at, offsets = _arena(), 0, {}
    for each in buffers:
        offsets[id(each)] = at
        at += -(-each.whole.size // _ALIGN) * _ALIGN
    arena.reserve(max(at, 1))
    for each in buffers:
        start = offsets[id(each)]
        arena.host[start : start + each.whole.size] = each.whole
    driver.upload(arena.address, arena.host[:at])
    run({key: arena.address + start + Guarded.front for key, start in offsets.items()})
    driver.download(arena.host[:at], arena.address)
    for each in buffers:
        start = offsets[id(each)]
        each.whole[:] = arena.host[start : start + each.whole.size]


def _apart(driver: Driver, buffers: list[Guarded], run: Callable[[dict[int, int]], None]) -> None:
    """Each in an allocation of exactly its bytes, which compute-sanitizer watches the ends of."""
    places = {id(each): driver.allocate(max(each.data.size, 1)) for each in buffers}
    try:
        for each in buffers:
            driver.upload(places[id(each)], each.data)
        run(places)
        for each in buffers:
            driver.download(each.data, places[id(each)])
    finally:
        for address in places.values():
            driver.free(address)


def _pointers(record: ctypes.Structure, at: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, address) of every pointer of a record that is not NULL."""
    for name, kind in record._fields_:
        where, value = at + getattr(type(record), name).offset, getattr(record, name)
        if kind is ctypes.c_void_p:
            if value:
                yield where, value
        elif isinstance(value, ctypes.Structure):
            yield from _pointers(value, where)
        elif isinstance(value, ctypes.Array) and len(value) and isinstance(value[0], ctypes.Structure):
            for i, item in enumerate(value):
                yield from _pointers(item, where + i * ctypes.sizeof(item))


def _owner(address: int) -> Guarded:
    """The guarded memory that an address lies in. Raises EmulationError for one of none."""
    for start, found in list(_LIVE.items()):
        if start <= address < start + max(found.data.size, 1):
            return found
    raise EmulationError(f"the record points to {address:#x}, which is in no Guarded memory")
