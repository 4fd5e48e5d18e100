"""A driver opened on the fake GPU, with small kernels to launch: what the contracts of drivers begin with."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_cuda import FakeCuda, add_module, ptx

from edge_runtime.backends.cuda.driver import Driver, Module, open_driver

SOURCE = """
#include <unistd.h>
#include "device.cuh"
struct Scaled { float* out; const float* x; float by; int32_t n; };
namespace edge {
EDGE_DEVICE void scaled(const Scaled& a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.n) a.out[i] = a.x[i] * a.by;
}
// Each block's numbers in reverse, by way of shared memory.
EDGE_DEVICE void reversed(const Scaled& a) {
    float* memory = reinterpret_cast<float*>(dynamic_shared());
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    memory[threadIdx.x] = a.x[i];
    __syncthreads();
    a.out[i] = memory[blockDim.x - 1 - threadIdx.x];
}
// Waits for the host to write x, at most 5 s; says what it found.
EDGE_DEVICE void waiting(const Scaled& a) {
    const volatile float* x = a.x;
    for (int i = 0; i < 5000 && *x == 0; ++i) usleep(1000);
    *a.out = *x;
}
}  // namespace edge
EDGE_KERNEL(edge_waiting, 1, Scaled, edge::waiting)
EDGE_KERNEL(edge_scaled, 64, Scaled, edge::scaled)
EDGE_KERNEL(edge_reversed, 64, Scaled, edge::reversed)
"""


class Scaled(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("by", ctypes.c_float),
        ("n", ctypes.c_int32),
    )


def record(out: int, x: int, by: float, n: int) -> bytes:
    return bytes(Scaled(out, x, by, n))


class OpenedDriver:
    """`api`: the driver under test."""

    api = ""

    @pytest.fixture
    def driver(self, fake_gpu: FakeCuda) -> Iterator[Driver]:
        made = open_driver(self.api)
        yield made
        made.close()
        assert fake_gpu.used == 0 == fake_gpu.count("leaked allocations"), "memory is left after close"

    def kernels(self, driver: Driver) -> Module:
        image = ptx(content="// the kernels of opened_driver.py")
        add_module(Path(os.environ["EDGE_FAKE_MODULES"]), image, SOURCE)
        return driver.load_module(image, "sm_87, CUDA 12.6")


class Worker(threading.Thread):
    """Runs work in a thread of its own; `finish` raises what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work
        self._failed: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failed = error

    def finish(self) -> None:
        self.join()
        if self._failed is not None:
            raise self._failed


def in_thread(work: Callable[[], object]) -> None:
    thread = Worker(work)
    thread.start()
    thread.finish()
