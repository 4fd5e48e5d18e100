"""A context on the fake GPU and kernels of its tests, through the real cuda-bindings."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import add_module, cubin

cu = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

SOURCE = """
#include "device.cuh"

namespace edge {

struct Args {
    float* x;
    int32_t n, by;
};

// x[i] += by for the n values; each thread one.
EDGE_DEVICE void add(const Args& args) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < args.n) args.x[i] += static_cast<float>(args.by);
}
// x[n] = sum of x[0..n).
EDGE_DEVICE void total(const Args& args) {
    EDGE_SHARED float part[2];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < args.n; i += 64) sum += args.x[i];
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAll, sum, i);
    if (lane() == 0) part[warp()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) args.x[args.n] = part[0] + part[1];
}
EDGE_DEVICE void write(const Args& args) { args.x[args.n] = static_cast<float>(args.by); }
EDGE_DEVICE void read(const Args& args) { args.x[0] = args.x[args.n]; }
EDGE_DEVICE void half_a_block(const Args& args) {
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncwarp();
}
EDGE_DEVICE void shared(const Args& args) { dynamic_shared()[args.n] = 1; }

}  // namespace edge

EDGE_KERNEL(add, 64, edge::Args, edge::add)
EDGE_KERNEL(total, 64, edge::Args, edge::total)
EDGE_KERNEL(write, 1, edge::Args, edge::write)
EDGE_KERNEL(read, 1, edge::Args, edge::read)
EDGE_KERNEL(half_a_block, 64, edge::Args, edge::half_a_block)
EDGE_KERNEL(shared, 32, edge::Args, edge::shared)
"""
CAPTURE_GLOBAL, CAPTURE_THREAD, CAPTURE_RELAXED = range(3)


class Args(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint64), ("n", ctypes.c_int32), ("by", ctypes.c_int32))


def ok(result: Any) -> Any:
    """The values of a call that must have worked."""
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else result[1:]


def code(result: Any) -> int:
    return int(result[0])


def in_process(script: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)


class Gpu:
    """What tests do with a context of their own on the fake."""

    def __init__(self, folder: Path) -> None:
        ok(cu.cuInit(0))
        self.context = ok(cu.cuDevicePrimaryCtxRetain(0))
        ok(cu.cuCtxPushCurrent(self.context))
        image = cubin(87, content=b"test_fake_driver")
        add_module(folder, image, SOURCE)
        self.module = ok(cu.cuModuleLoadData(image))
        self.stream = ok(cu.cuStreamCreate(1))  # non-blocking

    def kernel(self, symbol: str) -> Any:
        return ok(cu.cuModuleGetFunction(self.module, symbol.encode()))

    def launch(
        self,
        symbol: str,
        args: Args,
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: int = 64,
        shared: int = 0,
        stream: Any = None,
    ) -> int:
        kernel, params = self.kernel(symbol), (ctypes.c_void_p * 1)(ctypes.addressof(args))
        on = self.stream if stream is None else stream
        address = ctypes.addressof(params)
        return code(cu.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, on, address, 0))

    def array(self, values: np.ndarray) -> int:
        """Device memory with a copy of the values."""
        address = int(ok(cu.cuMemAlloc(values.nbytes)))
        ok(cu.cuMemcpyHtoD(address, values.ctypes.data, values.nbytes))
        return address

    def read(self, address: int, n: int) -> np.ndarray:
        """n f32, once all that is queued has run."""
        ok(cu.cuCtxSynchronize())
        out = np.zeros(n, np.float32)
        ok(cu.cuMemcpyDtoH(out.ctypes.data, address, out.nbytes))
        return out

    def pinned(self, n: int) -> np.ndarray:
        address = int(ok(cu.cuMemHostAlloc(4 * n, 0)))
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (n,))
