"""The fake libcuda.so.1 under the real cuda-bindings: what CUDA does, as late as it may; faults are found."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulation import KERNELS, asan_environment, sanitizing
from fake_cuda import FakeCuda, add_module, cubin, environment, ptx

from builders.nvrtc import find_compilers
from edge_runtime.engine.formats.c_header import c_header

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
by_guards = pytest.mark.skipif(bool(sanitizing()), reason="AddressSanitizer ends the process at once")
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


@pytest.fixture
def gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


# --- device ---


def test_without_a_device_there_is_none(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_FAKE_DEVICES")
    assert code(cu.cuInit(0)) == 100
    assert code(cu.cuDeviceGetCount()) == 3, "not initialized"


def test_the_device_is_the_environments(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(cu.cuInit(0))
    monkeypatch.setenv("EDGE_FAKE_DEVICES", "2")
    monkeypatch.setenv("EDGE_FAKE_NAME", "Orin, or so")
    monkeypatch.setenv("EDGE_FAKE_CC", "9.0")
    monkeypatch.setenv("EDGE_FAKE_DRIVER", "13000")
    monkeypatch.setenv("EDGE_FAKE_MEMORY", "123456789")
    monkeypatch.setenv("EDGE_FAKE_INTEGRATED", "1")
    assert ok(cu.cuDeviceGetCount()) == 2 and code(cu.cuDeviceGet(2)) == 101
    assert ok(cu.cuDeviceGetName(32, 0)).rstrip(b"\0 ").split(b"\0")[0] == b"Orin, or so"
    assert ok(cu.cuDriverGetVersion()) == 13000 and int(ok(cu.cuDeviceTotalMem(0))) == 123456789
    which = cu.CUdevice_attribute
    for name, wanted in {
        "COMPUTE_CAPABILITY_MAJOR": 9,
        "COMPUTE_CAPABILITY_MINOR": 0,
        "INTEGRATED": 1,
        "WARP_SIZE": 32,
        "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
    }.items():
        attribute = getattr(which, f"CU_DEVICE_ATTRIBUTE_{name}")
        assert ok(cu.cuDeviceGetAttribute(attribute, 0)) == wanted


def test_errors_have_names_and_words() -> None:
    for value in (0, 1, 2, 100, 201, 209, 700, 719, 900):
        assert ok(cu.cuGetErrorName(cu.CUresult(value))).decode() == cu.CUresult(value).name
        assert ok(cu.cuGetErrorString(cu.CUresult(value)))


def test_calls_need_a_context(fake_gpu: FakeCuda) -> None:
    ok(cu.cuInit(0))
    assert code(cu.cuMemAlloc(16)) == 201
    context = ok(cu.cuDevicePrimaryCtxRetain(0))
    ok(cu.cuCtxPushCurrent(context))
    ok(cu.cuMemFree(ok(cu.cuMemAlloc(16))))
    found = []
    thread = threading.Thread(target=lambda: found.append(code(cu.cuMemAlloc(16))))
    thread.start()
    thread.join()
    assert found == [201], "another thread has no context"
    ok(cu.cuDevicePrimaryCtxRelease(0))
    assert code(cu.cuMemAlloc(16)) == 201, "the context has ended"
    ok(cu.cuCtxPopCurrent())


def test_another_process_sees_the_fake_by_its_name(tmp_path: Path) -> None:
    script = "from cuda.bindings import driver as d; d.cuInit(0); print(d.cuDeviceGetName(64, 0)[1])"
    settings = environment(tmp_path, name="Elsewhere", cc="8.9")
    done = subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=60
    )
    assert "Elsewhere" in done.stdout, done.stderr


# --- memory ---


def test_new_memory_is_no_number(gpu: Gpu) -> None:
    address = int(ok(cu.cuMemAlloc(4 * 10 + 3)))
    assert address % 256 == 0
    assert np.isnan(gpu.read(address, 10)).all()


def test_memory_runs_out(gpu: Gpu, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FAKE_MEMORY", "10000")
    a = ok(cu.cuMemAlloc(6000))
    assert [int(v) for v in ok(cu.cuMemGetInfo())] == [4000, 10000] and fake_gpu.used == 6000
    assert code(cu.cuMemAlloc(4001)) == 2
    ok(cu.cuMemFree(a))
    monkeypatch.setenv("EDGE_FAKE_LARGEST", "5000")
    assert code(cu.cuMemAlloc(5001)) == 2
    ok(cu.cuMemAlloc(5000))
    ok(cu.cuMemAlloc(5000))
    assert code(cu.cuMemFree(int(a) + 1)) == 1


def test_copies_stay_within_allocations(gpu: Gpu) -> None:
    host = np.arange(8, dtype=np.float32)
    address = gpu.array(host)
    assert code(cu.cuMemcpyHtoD(address + 4, host.ctypes.data, 32)) == 1
    assert code(cu.cuMemcpyDtoHAsync(host.ctypes.data, address - 4, 8, gpu.stream)) == 1
    assert code(cu.cuMemsetD8Async(address, 0, 33, gpu.stream)) == 1
    other = gpu.array(host)
    assert code(cu.cuMemcpyDtoD(other + 28, address, 8)) == 1
    ok(cu.cuMemcpyDtoDAsync(other + 4, address, 28, gpu.stream))
    ok(cu.cuMemsetD32Async(other, 0x40400000, 1, gpu.stream))
    np.testing.assert_array_equal(gpu.read(other, 8), [3, 0, 1, 2, 3, 4, 5, 6])


def test_a_context_ends_with_all_that_is_its(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    ok(cu.cuMemAlloc(100))
    ok(cu.cuMemAlloc(100))
    ok(cu.cuDevicePrimaryCtxRelease(0))
    assert fake_gpu.count("leaked allocations") == 2 and fake_gpu.used == 0


@by_guards
@pytest.mark.parametrize("at", [-1, 10, 10 + 1023, -1024])
def test_a_kernel_that_writes_beside_memory_is_named(gpu: Gpu, faulty_gpu: FakeCuda, at: int) -> None:
    address = gpu.array(np.zeros(10, np.float32))
    assert gpu.launch("write", Args(address, at, 1), threads=1) == 0
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 700
    assert (
        "of an allocation of 40 bytes was written" in faulty_gpu.fault and "kernel write" in faulty_gpu.fault
    )
    assert code(cu.cuMemAlloc(4)) == 700, "the context is lost"
    ok(cu.cuDevicePrimaryCtxRelease(0))
    ok(cu.cuDevicePrimaryCtxRetain(0))
    ok(cu.cuMemAlloc(4))


@by_guards
def test_a_write_beside_memory_is_found_when_asked(
    gpu: Gpu, faulty_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_FAKE_PROTECT", "0")
    address = gpu.array(np.zeros(10, np.float32))
    assert faulty_gpu.check() == ""
    ctypes.memset(address + 40, 0, 1)
    assert "byte 40 of an allocation of 40 bytes" in faulty_gpu.check()
    faulty_gpu.reset()


@by_guards
def test_a_write_into_freed_memory_is_found(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    address = gpu.array(np.zeros(10, np.float32))
    ok(cu.cuMemFree(address))
    assert gpu.launch("write", Args(address, 3, 1), threads=1) == 0
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert "byte 12 of 40 bytes was written after they were freed" in faulty_gpu.check()


SCRIPT = """
import sys
from fake_cuda import load_fake
load_fake()
from test_fake_driver import *

gpu = Gpu(Path(sys.argv[1]))
symbol, at, freed = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "freed"
address = gpu.array(np.zeros(10, np.float32))
if freed:
    ok(cu.cuMemFree(address))
assert gpu.launch(symbol, Args(address, at, 1), threads=1) == 0
ok(cu.cuStreamSynchronize(gpu.stream))
print("ran to its end")
"""


@pytest.mark.parametrize(
    ("symbol", "at", "state"),
    [
        ("read", 9, "allocated"),
        ("read", 10, "allocated"),
        ("read", -1, "allocated"),
        ("write", 10, "allocated"),
        ("read", 0, "freed"),
    ],
)
def test_address_sanitizer_sees_reads_too(tmp_path: Path, symbol: str, at: int, state: str) -> None:
    settings = environment(tmp_path) | asan_environment() | {"LD_LIBRARY_PATH": ""}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), symbol, str(at), state]
    here = Path(__file__).resolve().parent
    done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=here)
    if at == 9:
        assert done.stdout == "ran to its end\n", done.stderr[-2000:]
    else:
        assert done.returncode != 0 and "use-after-poison" in done.stderr, done.stderr[-2000:]


def test_the_host_cannot_take_a_device_address_for_its_own(tmp_path: Path) -> None:
    script = (
        "import ctypes, sys\n"
        "import numpy as np\n"
        "from cuda.bindings import driver as d\n"
        "d.cuInit(0); c = d.cuDevicePrimaryCtxRetain(0)[1]; d.cuCtxPushCurrent(c)\n"
        "x = np.arange(4, dtype=np.float32); a = int(d.cuMemAlloc(16)[1])\n"
        "d.cuMemcpyHtoD(a, x.ctypes.data, 16); y = x * 0; d.cuMemcpyDtoH(y.ctypes.data, a, 16)\n"
        "print(y[3], flush=True)\n"
        "print(ctypes.c_float.from_address(a).value)\n"
    )
    assert in_process(script, environment(tmp_path, protect=0)).stdout == "3.0\n0.0\n"
    done = in_process(script, environment(tmp_path, protect=1))
    assert done.returncode != 0 and done.stdout == "3.0\n"


# --- device code ---


@pytest.mark.parametrize(
    ("image", "cc", "driver", "wanted"),
    [
        (cubin(87), "8.7", 12060, 209),  # fits, but there is no such module
        (cubin(86), "8.9", 12060, 209),
        (cubin(87), "8.6", 12060, 209),
        (cubin(86), "8.7", 12060, 209),
        (cubin(90), "8.9", 12060, 209),
        (cubin(87, cuda=13), "8.7", 12060, 200),
        (cubin(87, cuda=13), "8.7", 13000, 209),
        (ptx(87, "8.5"), "8.7", 12060, 218),  # fits
        (ptx(90, "8.5"), "8.7", 12060, 218),
        (ptx(87, "9.0"), "8.7", 12090, 222),
        (ptx(87, "8.8"), "8.7", 12080, 222),
        (b"no code at all\0", "8.7", 12060, 200),
        (b"\x7fELF" + bytes(60), "8.7", 12060, 200),
    ],
)
def test_images_that_do_not_run_here(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capfd: Any, image: bytes, cc: str, driver: int, wanted: int
) -> None:
    monkeypatch.setenv("EDGE_FAKE_CC", cc)
    monkeypatch.setenv("EDGE_FAKE_DRIVER", str(driver))
    assert code(cu.cuModuleLoadData(image)) == wanted
    assert "fake driver: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("image", "cc", "driver"),
    [
        (cubin(86), "8.9", 12060),
        (cubin(80), "8.6", 12060),
        (cubin(120, cuda=13), "12.1", 13000),
        (ptx(80, "8.5"), "9.0", 12060),
        (ptx(87, "8.8"), "11.0", 13000),
    ],
)
def test_images_of_other_devices_that_run_here(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: bytes, cc: str, driver: int
) -> None:
    monkeypatch.setenv("EDGE_FAKE_CC", cc)
    monkeypatch.setenv("EDGE_FAKE_DRIVER", str(driver))
    add_module(tmp_path, image, SOURCE)
    module = ok(cu.cuModuleLoadDataEx(image, 0, [], []))
    ok(cu.cuModuleGetFunction(module, b"total"))
    assert code(cu.cuModuleGetFunction(module, b"nothing")) == 500
    ok(cu.cuModuleUnload(module))
    assert code(cu.cuModuleUnload(module)) == 400


def test_what_nvrtc_compiles_is_loaded_and_runs(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread_order: str
) -> None:
    """Cubin and PTX of each compiler here, made of the source that the emulator runs too."""
    compilers = find_compilers()
    if not compilers:
        pytest.skip("no NVRTC here (pip install nvidia-cuda-nvrtc)")
    headers = {"edge_formats.h": c_header()}
    headers |= {p.name: p.read_text() for p in KERNELS.iterdir() if p.suffix in (".h", ".cuh")}
    x = np.random.default_rng(5).integers(-9, 9, 301).astype(np.float32)
    for compiler in compilers:
        sm = 87 if 87 in compiler.sms else compiler.sms[-1]
        monkeypatch.setenv("EDGE_FAKE_CC", f"{sm // 10}.{sm % 10}")
        monkeypatch.setenv("EDGE_FAKE_DRIVER", str(compiler.cuda[0] * 1000 + compiler.cuda[1] * 10))
        made = compiler.compile(SOURCE, headers, sm)
        for image in (made.cubin, made.ptx):
            add_module(tmp_path, image, SOURCE)
            gpu.module = ok(cu.cuModuleLoadData(image))
            address = gpu.array(np.append(x, np.float32(0)))
            assert gpu.launch("total", Args(address, 301, 0)) == 0
            assert gpu.read(address, 302)[301] == x.sum()


# --- launches ---


def test_launches_that_cuda_refuses(gpu: Gpu, capfd: Any) -> None:
    args = Args(gpu.array(np.zeros(64, np.float32)), 64, 1)
    assert gpu.launch("add", args, grid=(0, 1, 1)) == 1
    assert gpu.launch("add", args, grid=(1, 65536, 1)) == 1
    assert gpu.launch("add", args, threads=32) == 1
    assert "made for blocks of 64 threads" in capfd.readouterr().err
    assert gpu.launch("add", args, shared=(48 << 10) + 1) == 1
    kernel, which = gpu.kernel("add"), cu.CUfunction_attribute
    largest = which.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert code(cu.cuFuncSetAttribute(kernel, largest, (163 << 10) + 1)) == 1
    ok(cu.cuFuncSetAttribute(kernel, largest, 100 << 10))
    assert ok(cu.cuFuncGetAttribute(largest, kernel)) == 100 << 10
    assert ok(cu.cuFuncGetAttribute(which.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, kernel)) == 64
    assert gpu.launch("add", args, shared=100 << 10) == 0
    assert gpu.read(args.x, 64).sum() == 64
    ok(cu.cuModuleUnload(gpu.module))
    record = (ctypes.c_void_p * 1)(ctypes.addressof(args))
    result = cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, ctypes.addressof(record), 0)
    assert code(result) == 400


def test_what_the_emulator_finds_is_a_launch_failure(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    assert gpu.launch("half_a_block", Args(0, 0, 0)) == 0, "found when it runs"
    assert code(cu.cuCtxSynchronize()) == 719
    assert "kernel half_a_block: emulator: " in faulty_gpu.fault and "__syncthreads" in faulty_gpu.fault
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 719


def test_a_write_behind_shared_memory_is_a_launch_failure(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    assert gpu.launch("shared", Args(0, 128, 0), threads=32, shared=128) == 0
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 719
    assert "behind 128 bytes of dynamic shared memory" in faulty_gpu.fault


def test_a_record_may_come_as_one_buffer(gpu: Gpu) -> None:
    """CU_LAUNCH_PARAM_BUFFER_POINTER, as pycuda launches."""
    args = Args(gpu.array(np.zeros(64, np.float32)), 64, 3)
    size = ctypes.c_size_t(ctypes.sizeof(args))
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(args), 2, ctypes.addressof(size), 0)
    kernel, at = gpu.kernel("add"), ctypes.addressof(extra)
    ok(cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, 0, at))
    assert (gpu.read(args.x, 64) == 3).all()
    size.value = 8
    assert code(cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, 0, at)) == 1


# --- order ---


def test_work_runs_when_it_is_waited_for(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host, back = gpu.pinned(64), gpu.pinned(64)
    host[:], back[:] = 1, -1
    address = gpu.array(np.zeros(64, np.float32))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, gpu.stream))
    host[:] = 5  # too early: the copy has yet to read it
    assert fake_gpu.count("kernels") == 0 and (back == -1).all()
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert (back == 6).all() and fake_gpu.count("kernel add") == 1


def test_pageable_memory_is_read_at_once_and_written_after_a_wait(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host = np.ones(64, np.float32)
    address = gpu.array(np.zeros(64, np.float32))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    host[:] = 5
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    before = fake_gpu.count("syncs")
    ok(cu.cuMemcpyDtoHAsync(host.ctypes.data, address, 256, gpu.stream))
    assert (host == 2).all() and fake_gpu.count("syncs") == before + 1


def test_the_legacy_stream_does_not_wait_for_non_blocking_ones(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    blocking, back = ok(cu.cuStreamCreate(0)), np.zeros(64, np.float32)
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    assert gpu.launch("add", Args(address, 64, 10), stream=blocking) == 0
    ok(cu.cuMemcpyDtoH(back.ctypes.data, address, 256))
    assert (back == 10).all()
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert (gpu.read(address, 64) == 11).all()


def test_events_order_streams_and_measure(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    other, first, last = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(0)), ok(cu.cuEventCreate(0))
    ok(cu.cuEventRecord(first, gpu.stream))
    assert gpu.launch("add", Args(address, 64, 2)) == 0
    ok(cu.cuEventRecord(last, gpu.stream))
    ok(cu.cuStreamWaitEvent(other, last, 0))
    back = gpu.pinned(64)
    back[:] = 0
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, other))
    assert code(cu.cuEventElapsedTime(first, last)) == 600
    ok(cu.cuStreamSynchronize(other))
    assert (back == 2).all()
    assert code(cu.cuEventQuery(last)) == 0 and ok(cu.cuEventElapsedTime(first, last)) >= 0
    turns = 0
    for _ in range(3):
        assert gpu.launch("add", Args(address, 64, 1)) == 0
    while code(cu.cuStreamQuery(gpu.stream)) == 600:
        turns += 1
    assert turns == 3 and (gpu.read(address, 64) == 5).all()


# --- graphs ---


def test_a_capture_runs_nothing_and_a_replay_reads_what_is_there_then(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host, back = gpu.pinned(64), gpu.pinned(64)
    host[:], back[:] = 1, -1
    address = gpu.array(np.zeros(64, np.float32))
    args = Args(address, 64, 3)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_GLOBAL)))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    assert gpu.launch("add", args) == 0
    args.by = 1000  # the record was copied
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, gpu.stream))
    graph = ok(cu.cuStreamEndCapture(gpu.stream))
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert fake_gpu.count("kernels") == 0 and (back == -1).all()
    assert ok(cu.cuGraphGetNodes(graph))[1] == 3
    exec_graph = ok(cu.cuGraphInstantiate(graph, 0))
    ok(cu.cuGraphDestroy(graph))
    waits = fake_gpu.count("syncs")
    for turn in range(3):
        host[:] = turn
        ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
        assert fake_gpu.count("syncs") == waits + turn
        ok(cu.cuStreamSynchronize(gpu.stream))
        assert (back == turn + 3).all()
    assert fake_gpu.count("cuGraphLaunch") == 3 == fake_gpu.count("kernel add")
    assert fake_gpu.count("cuLaunchKernel") == 1
    ok(cu.cuGraphExecDestroy(exec_graph))
    assert code(cu.cuGraphLaunch(exec_graph, gpu.stream)) == 400


def captured(gpu: Gpu, args: Args, times: int = 1) -> Any:
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    for _ in range(times):
        assert gpu.launch("add", args) == 0
    return ok(cu.cuStreamEndCapture(gpu.stream))


def test_a_graph_is_updated_by_one_of_its_shape(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    exec_graph = ok(cu.cuGraphInstantiate(captured(gpu, Args(address, 64, 1)), 0))
    ok(cu.cuGraphExecUpdate(exec_graph, captured(gpu, Args(address, 64, 100))))
    assert code(cu.cuGraphExecUpdate(exec_graph, captured(gpu, Args(address, 64, 1), times=2))) == 910
    ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
    assert (gpu.read(address, 64) == 100).all()


def test_another_stream_joins_a_capture_by_an_event(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    other, event = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(0))
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_RELAXED)))
    ok(cu.cuEventRecord(event, gpu.stream))
    ok(cu.cuStreamWaitEvent(other, event, 0))
    assert gpu.launch("add", Args(address, 64, 7), stream=other) == 0
    assert code(cu.cuStreamEndCapture(other)) == 903
    graph = ok(cu.cuStreamEndCapture(gpu.stream))
    ok(cu.cuGraphLaunch(ok(cu.cuGraphInstantiate(graph, 0)), gpu.stream))
    assert (gpu.read(address, 64) == 7).all()


@pytest.mark.parametrize("call", ["sync", "alloc", "free", "pageable", "device", "legacy copy"])
def test_what_a_capture_cannot_hold_breaks_it(gpu: Gpu, call: str) -> None:
    host = np.zeros(4, np.float32)
    address = gpu.array(host)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    found = {
        "sync": lambda: cu.cuStreamSynchronize(gpu.stream),
        "alloc": lambda: cu.cuMemAlloc(16),
        "free": lambda: cu.cuMemFree(address),
        "pageable": lambda: cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 16, gpu.stream),
        "device": lambda: cu.cuCtxSynchronize(),
        "legacy copy": lambda: cu.cuMemcpyHtoD(address, host.ctypes.data, 16),
    }[call]()
    assert code(found) == 900
    assert gpu.launch("add", Args(address, 4, 1)) == 901
    assert code(cu.cuStreamEndCapture(gpu.stream)) == 901
    assert gpu.launch("add", Args(address, 4, 1)) == 0, "the stream serves on"


def test_a_capture_of_another_thread_disturbs_nobody(gpu: Gpu) -> None:
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    found: list[int] = []

    def work() -> None:
        ok(cu.cuCtxPushCurrent(gpu.context))
        found.append(code(cu.cuMemAlloc(16)))
        found.append(code(cu.cuStreamEndCapture(gpu.stream)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, 908]
    ok(cu.cuStreamEndCapture(gpu.stream))


def test_a_graph_whose_memory_is_gone_faults(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    host = gpu.pinned(64)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    exec_graph = ok(cu.cuGraphInstantiate(ok(cu.cuStreamEndCapture(gpu.stream)), 0))
    ok(cu.cuMemFree(address))
    ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 700 and "where no allocation is" in faulty_gpu.fault


# --- failures on demand ---


def test_failures_come_when_planned(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    args = Args(gpu.array(np.zeros(64, np.float32)), 64, 1)
    faulty_gpu.fail("cuLaunchKernel:3:700,cuMemAlloc:1:2")
    assert code(cu.cuMemAlloc(4)) == 2 and code(cu.cuMemAlloc(4)) == 0
    assert [gpu.launch("add", args) for _ in range(2)] == [0, 0]
    params = (ctypes.c_void_p * 1)(ctypes.addressof(args))
    at = ctypes.addressof(params)
    kernel = gpu.kernel("add")
    assert code(cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, at, 0)) == 700
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 700, "a fault lasts"
    with pytest.raises(ValueError):
        faulty_gpu.fail("cuLaunchKernel")


def test_failures_of_another_process_and_its_end_on_a_fault(tmp_path: Path) -> None:
    script = (
        "from cuda.bindings import driver as d\n"
        "d.cuInit(0); c = d.cuDevicePrimaryCtxRetain(0)[1]; d.cuCtxPushCurrent(c)\n"
        "print([int(d.cuMemAlloc(4)[0]) for _ in range(3)], flush=True)\n"
        "d.cuCtxSynchronize()\n"
        "print('went on')\n"
    )
    settings = environment(tmp_path, fail="cuMemAlloc:2:2,cuCtxSynchronize:1:719", abort=1)
    done = subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[0, 2, 0]\n" and done.returncode != 0
    assert "cuCtxSynchronize fails with 719, as asked for" in done.stderr
