"""The fake libcuda under the real cuda-bindings: its device, memory and device code; planned failures."""

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
from fake_context import SOURCE, Args, Gpu, code, cu, in_process, ok
from fake_cuda import FakeCuda, add_module, cubin, environment, ptx

from builders.nvrtc import find_compilers
from edge_runtime.engine.formats.c_header import c_header

by_guards = pytest.mark.skipif(bool(sanitizing()), reason="AddressSanitizer ends the process at once")


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
from fake_context import *

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
