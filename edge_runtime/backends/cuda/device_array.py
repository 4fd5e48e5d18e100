"""Arrays in device memory, given and taken without a copy: `__cuda_array_interface__`, version 3.

https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import BadRequest


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """`shape` items of `dtype` in C order at a device address. `owner` is kept alive with it.

    stream: handle of the stream whose queued work the values come from; who reads them waits for it.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None
    stream: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }


def as_address(
    array: object, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | type[Any] | None = None
) -> int:
    """The device address of anything with `__cuda_array_interface__` (cupy, pycuda, torch, DeviceArray).

    Given a shape or dtype, it must be that. Raises BadRequest, also for a layout other than C order.
    """
    face = interface_of(array)
    given, item = tuple(face["shape"]), np.dtype(face["typestr"])
    if shape is not None and given != tuple(shape):
        raise BadRequest(f"the device array has shape {given}, expected {tuple(shape)}")
    if dtype is not None and item != np.dtype(dtype):
        raise BadRequest(f"the device array has dtype {item}, expected {np.dtype(dtype)}")
    if face.get("mask") is not None:
        raise BadRequest("the device array has a mask; give the values alone")
    strides = face.get("strides")
    if strides is not None and math.prod(given) and tuple(strides) != _c_strides(given, item.itemsize):
        raise BadRequest(
            f"the device array of shape {given} has strides {tuple(strides)}; make it contiguous (C order)"
        )
    return int(face["data"][0])


def interface_of(array: object) -> Mapping[str, Any]:
    """Its `__cuda_array_interface__`. Raises BadRequest where there is none or it lacks a key."""
    face = getattr(array, "__cuda_array_interface__", None)
    if not isinstance(face, Mapping):
        raise BadRequest(
            f"a {type(array).__name__} is no array in device memory: it has no __cuda_array_interface__"
        )
    missing = {"shape", "typestr", "data"} - set(face)
    if missing:
        raise BadRequest(f"the device array's __cuda_array_interface__ lacks {', '.join(sorted(missing))}")
    return face


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
