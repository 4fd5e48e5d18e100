"""Low-rank adapters in device memory, each in one block, as kernels/cuda/low_rank.cuh reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.backends.protocol import Part
from edge_runtime.engine.adapter import Adapter, check_adapter, free_number, updatable
from edge_runtime.engine.device_code import RANK_PANEL, RANK_UNIT
from edge_runtime.engine.formats import Array
from edge_runtime.engine.memory import device_adapter_regions, low_rank_layout
from edge_runtime.engine.ops import Linear, Logits
from edge_runtime.errors import BadRequest


@dataclass(frozen=True, slots=True)
class _Block:
    address: int
    nbytes: int


class DeviceAdapters:
    """The loaded ones by number. A step tells the device where those of its sequences lie (StagedStep), so
    that launches and graphs outlive them."""

    def __init__(self, driver: Driver, part: Part) -> None:
        self._driver = driver
        self._part = part
        self._loaded: dict[int, _Block] = {}

    def __contains__(self, number: object) -> bool:
        return number in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def nbytes(self) -> int:
        """Bytes held; of each adapter `engine.memory.adapter_nbytes`."""
        return sum(block.nbytes for block in self._loaded.values())

    def add(self, adapter: Adapter) -> int:
        """Copy an adapter to the device; returns the lowest free number.

        Raises BadRequest for one that does not suit the program, DoesNotFit.
        """
        check_adapter(adapter, self._part.program)
        number = free_number(self._loaded)
        ranks = {name: low.rank for name, low in adapter.items()}
        regions = device_adapter_regions(self._part.program, self._part.step, ranks)
        nbytes = sum(regions.values())
        address = self._driver.allocate(nbytes)
        try:
            host = np.zeros(nbytes - regions["u"], np.uint8)  # u comes last
            self._fill(host, adapter, regions, address)
            self._driver.upload(address, host)
            self._driver.fill(address + len(host), regions["u"])
        except BaseException:
            self._driver.free(address)
            raise
        self._loaded[number] = _Block(address, nbytes)
        return number

    def drop(self, number: int) -> None:
        """Give its memory back. Raises BadRequest for a number that is not loaded."""
        if number not in self._loaded:
            raise BadRequest(f"adapter {number} is not loaded")
        self._driver.free(self._loaded.pop(number).address)

    def addresses(self, numbers: Array) -> Array:
        """Where the adapters of sequences (S,) lie, int64; 0 for -1."""
        return np.array([self._loaded[n].address if n >= 0 else 0 for n in numbers.tolist()], np.int64)

    def clear(self) -> None:
        """Forget them: the driver has been closed."""
        self._loaded.clear()

    def _fill(self, host: Array, adapter: Adapter, regions: dict[str, int], address: int) -> None:
        """The bytes of an adapter that will lie at `address`, all but u."""
        program = self._part.program
        ends = np.cumsum(list(regions.values())).tolist()
        at = dict(zip(regions, [0, *ends], strict=False))
        offsets, stride = low_rank_layout(program, {name: low.rank for name, low in adapter.items()})
        for name, low in adapter.items():
            for side, plane in (("a", _padded(low.a)), ("b", _panels(low.b))):
                begin = at[f"{name}.{side}"]
                host[begin : begin + plane.nbytes] = plane.reshape(-1).view(np.uint8)
        places = [offsets.get(i, 0) for i, op in enumerate(program.ops) if isinstance(op, Linear | Logits)]
        updates = (rec.Update * len(places))()
        for i, (op, offset) in enumerate(zip(updatable(program), places, strict=True)):
            if op.weight in adapter:
                updates[i] = rec.Update(
                    a=address + at[f"{op.weight}.a"],
                    b=address + at[f"{op.weight}.b"],
                    scale=adapter[op.weight].scale,
                    rank=adapter[op.weight].rank,
                    offset=offset,
                )
        head = bytes(rec.Adapter(u=address + at["u"], stride=stride)) + bytes(updates)
        host[: len(head)] = np.frombuffer(head, np.uint8)


def _padded(a: Array) -> Array:
    """A (rank, cols) f16 with zeros up to whole units both ways."""
    rank, cols = (-(-n // RANK_UNIT) * RANK_UNIT for n in a.shape)
    out = np.zeros((rank, cols), np.float16)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def _panels(b: Array) -> Array:
    """B (rows, rank) f16 as (rows / 32, rank / 8, 32, 8), padded with zeros."""
    panels, units = -(-b.shape[0] // RANK_PANEL), -(-b.shape[1] // RANK_UNIT)
    out = np.zeros((panels * RANK_PANEL, units * RANK_UNIT), np.float16)
    out[: b.shape[0], : b.shape[1]] = b
    return np.ascontiguousarray(out.reshape(panels, RANK_PANEL, units, RANK_UNIT).transpose(0, 2, 1, 3))
