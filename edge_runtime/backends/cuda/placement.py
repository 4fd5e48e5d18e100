"""Where a part lies in device memory: weights, KV pages, buffers and scratch, in one arena."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.backends.cuda.memory import DeviceArena, Region
from edge_runtime.backends.packed_planes import check_planes, in_packing, tensor_of
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.backends.stored_indices import check_order
from edge_runtime.engine.device_memory import device_regions
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.kv import CacheArray, cache_arrays
from edge_runtime.engine.launches import LOGITS, ROWS
from edge_runtime.engine.layout import ALIGN, lay_out, round_up
from edge_runtime.engine.ops import Gather
from edge_runtime.engine.packing import cuda_packing, plane_items, unpack

# Fields of rec.Matrix by plane; the first plane of codes is `codes` whatever it is called
_FIELDS = {
    "high": "high",
    "scale": "scale",
    "scale_min": "scale",
    "zero": "shift",
    "min": "shift",
    "scale2": "second",
    "super": "second",
    "super_min": "super_min",
    "offset": "offset",
}


class Placement:
    """The arena of a part, its weights uploaded, everything else zero."""

    def __init__(self, driver: Driver, part: Part) -> None:
        """Raises DoesNotFit before any plane is read, BadEngineFile for planes that are not the program's."""
        self._driver = driver
        self._part = part
        program = part.program
        self.regions = device_regions(program, part.kv, part.step)
        self.cache: list[CacheArray] = cache_arrays(program, part.kv)
        self._buffers = lay_out(program, part.step).offsets
        weights = [
            Region(f"{name}#{plane}", count * np.dtype(dtype).itemsize, ALIGN)
            for name in program.tensors
            for plane, (count, dtype) in self._items(name).items()
        ]
        pages = [Region(f"@kv{i}", a.nbytes, ALIGN) for i, a in enumerate(self.cache)]
        scratch = [Region(f"@{name}", nbytes, ALIGN) for name, nbytes in self.regions.items()]
        self.weights_nbytes = sum(round_up(r.nbytes) for r in weights)
        self._arena = DeviceArena(driver, [*weights, *pages, *scratch])
        try:
            for region in (*pages, *scratch):
                if region.nbytes:
                    driver.fill(self._arena.addresses[region.name], region.nbytes)
            for name in program.tensors:
                self._upload(name)
        except BaseException:
            self.release()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes held, with alignment."""
        return self._arena.nbytes

    @property
    def blocks(self) -> int:
        return self._arena.blocks

    def region(self, name: str) -> int:
        """Address of a scratch region; 0 for one that this part does not need."""
        return self._arena.addresses.get(f"@{name}", 0)

    def buffer(self, name: str) -> int:
        """Address of a buffer of the program, or of the rows or results of its logits op."""
        if name in (ROWS, LOGITS):
            return self.region(name[1:])
        return self.region("buffers") + self._buffers[name]

    def vector(self, name: str | None) -> int | None:
        return None if name is None else self._arena.addresses[f"{name}#w"]

    def matrix(self, name: str) -> rec.Matrix:
        """The record of a matrix, with no outputs yet."""
        tensor = self._part.weights[name]
        fields = {"codes": self._arena.addresses[f"{name}#{get_format(tensor.format).codes[0].name}"]}
        for plane, field in _FIELDS.items():
            address = self._arena.addresses.get(f"{name}#{plane}")
            if address is not None:
                fields[field] = address
        return rec.Matrix(**fields, scale_all=1.0, add_scale=1.0, rows=tensor.rows)

    def kv(self, layer: int, which: str) -> rec.Kv:
        """The planes of one side of a cache slot."""
        at = {a.plane: self.page(i) for i, a in enumerate(self.cache) if (a.layer, a.which) == (layer, which)}
        codes = next(iter(at.values()))
        return rec.Kv(codes=codes, scale=at.get("scale"), zero=at.get("zero"))

    def page(self, array: int, page: int = 0) -> int:
        """Address of a page in one of the cache's arrays."""
        a = self.cache[array]
        return self._arena.addresses[f"@kv{array}"] + page * (a.nbytes // a.shape[0])

    def page_nbytes(self) -> Iterator[int]:
        """Bytes of a page in each array, in arena order."""
        return (a.nbytes // a.shape[0] for a in self.cache)

    def release(self) -> None:
        self._arena.release()

    def _items(self, name: str) -> dict[str, tuple[int, str]]:
        """Planes of a tensor as they lie on the device."""
        tensor, spec = tensor_of(self._part, name), self._part.program.tensors[name]
        if spec.role == "vector":
            return {"w": (spec.cols, "<f4")}
        return plane_items(tensor.format, cuda_packing(tensor.format), spec.rows, spec.cols)

    def _upload(self, name: str) -> None:
        tensor = self._part.weights[name]
        check_planes(name, tensor)
        for plane, data in self._planes(name, tensor).items():
            self._driver.upload(self._arena.addresses[f"{name}#{plane}"], np.ascontiguousarray(data))

    def _planes(self, name: str, tensor: PackedTensor) -> dict[str, Array]:
        if self._part.program.tensors[name].role != "vector":
            return in_packing(tensor, cuda_packing(tensor.format))
        two_d = unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
        values = get_format(tensor.format).decode(two_d, tensor.rows, tensor.cols).reshape(-1)
        for op in self._part.program.ops:
            if isinstance(op, Gather) and op.order == name:
                check_order(name, values, self._part.program.buffers[op.x])
        return {"w": values}
