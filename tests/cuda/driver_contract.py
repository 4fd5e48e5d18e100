"""What both drivers must do, on the fake libcuda: the tests of test_driver.py and test_pycuda_driver.py.

A subclass says which API is opened (`api`). Kernels of these tests run in the emulator.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, add_module, ptx

from edge_runtime.backends.cuda.device_array import DeviceArray
from edge_runtime.backends.cuda.driver import Driver, Module, device_facts, open_driver
from edge_runtime.backends.cuda.memory import DeviceArena
from edge_runtime.errors import (
    BackendUnavailable,
    BadEngineFile,
    BadRequest,
    DeviceMismatch,
    DoesNotFit,
    EdgeError,
)

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


class DriverContract:
    """`api`: the driver under test."""

    api = ""

    @pytest.fixture
    def driver(self, fake_gpu: FakeCuda) -> Iterator[Driver]:
        made = open_driver(self.api)
        yield made
        made.close()
        assert fake_gpu.used == 0, "memory is left after close"

    def kernels(self, driver: Driver) -> Module:
        image = ptx(content="// the kernels of driver_contract.py")
        add_module(Path(os.environ["EDGE_FAKE_MODULES"]), image, SOURCE)
        return driver.load_module(image, "sm_87, CUDA 12.6")

    # --- what it says ---

    def test_facts_are_the_devices(self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGE_FAKE_CC", "12.0")
        monkeypatch.setenv("EDGE_FAKE_NAME", "NVIDIA Something")
        monkeypatch.setenv("EDGE_FAKE_DRIVER", "13020")
        monkeypatch.setenv("EDGE_FAKE_MEMORY", str(3 << 30))
        facts = device_facts(self.api)
        assert (facts.name, facts.sm, facts.driver) == ("NVIDIA Something", 120, "13.2")
        assert (facts.total_bytes, facts.integrated, facts.multiprocessors) == (3 << 30, False, 16)
        assert (facts.shared_bytes, facts.l2_bytes, facts.api) == (99 << 10, 4 << 20, self.api)
        assert fake_gpu.count("cuDevicePrimaryCtxRetain") == 0, "facts cost no context"

    def test_free_memory_of_a_discrete_gpu_is_cudas(
        self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, driver: Driver
    ) -> None:
        monkeypatch.setenv("EDGE_FAKE_MEMORY", str(1 << 24))
        before, source = driver.free_bytes()
        assert "CUDA driver" in source and before <= 1 << 24
        at = driver.allocate(1 << 20)
        assert driver.free_bytes()[0] == before - (1 << 20) and driver.memory_used == 1 << 20
        driver.free(at)
        assert driver.free_bytes()[0] == before and driver.memory_used == 0

    def test_free_memory_of_an_integrated_gpu_is_the_systems(
        self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGE_FAKE_INTEGRATED", "1")
        driver = open_driver(self.api)
        asked = fake_gpu.count("cuMemGetInfo")
        _, source = driver.free_bytes()
        assert "MemAvailable" in source or "cgroup" in source
        assert fake_gpu.count("cuMemGetInfo") == asked, "CUDA's own figure leaves out the page cache"
        driver.close()

    # --- memory ---

    def test_bytes_go_there_and_back(self, driver: Driver) -> None:
        x = np.arange(1000, dtype=np.float32)
        at = driver.allocate(x.nbytes)
        assert at % 256 == 0
        driver.upload(at, x)
        driver.upload(at + 40, x[10:20] * 2)
        driver.upload(at + 400, np.arange(200, dtype=np.float32)[100:200:2])  # copied first, as it has gaps
        found = np.zeros_like(x)
        driver.download(found, at)
        wanted = x.copy()
        wanted[10:20] *= 2
        wanted[100:150] = np.arange(100, 200, 2)
        np.testing.assert_array_equal(found, wanted)

    def test_an_upload_has_happened_when_it_returns(self, driver: Driver) -> None:
        x = np.ones(64, np.float32)
        at = driver.allocate(x.nbytes)
        driver.upload(at, x)
        x[:] = 7
        found = np.zeros_like(x)
        driver.download(found, at)
        assert (found == 1).all()

    def test_copies_and_fills_keep_the_order_of_the_stream(self, driver: Driver) -> None:
        a, b = driver.allocate(256), driver.allocate(256)
        driver.fill(a, 256, 3)
        driver.copy(b, a, 256)
        driver.fill(a + 16, 16, 255)
        driver.copy(b + 128, a, 128)
        found = np.zeros(256, np.uint8)
        driver.download(found, b)
        assert (found[:144] == 3).all() and (found[144:160] == 255).all() and (found[160:] == 3).all()

    def test_nothing_is_copied_for_no_bytes(self, driver: Driver) -> None:
        none = np.empty(0, np.uint8)
        driver.upload(0, none)
        driver.download(none, 0)
        driver.copy(0, 0, 0)
        driver.fill(0, 0)
        driver.synchronize()

    def test_pinned_memory_is_copied_in_order_and_outlives_the_driver(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        memory = driver.pinned(5000)
        assert memory.pinned and memory.nbytes == 5000 == driver.pinned_used
        assert memory.address % 4096 == 0 and memory.array.ctypes.data == memory.address
        at = driver.allocate(5000)
        memory.array[:] = np.arange(5000) % 251
        driver.upload_async(at, memory.array[:4000])
        driver.upload_async(at + 4000, memory.array[4000:])
        driver.synchronize()
        kept = memory.array.copy()
        memory.array[:] = 0
        driver.download_async(memory.array, at)
        driver.synchronize()
        np.testing.assert_array_equal(memory.array, kept)
        view = memory.array[100:200]
        driver.close()
        assert driver.pinned_used == 0 and not memory.pinned
        del memory, driver
        gc.collect()
        assert (view == kept[100:200]).all()

    def test_pinned_memory_can_be_given_back(self, driver: Driver) -> None:
        memory = driver.pinned(100)
        driver.release_pinned(memory)
        driver.release_pinned(memory)
        assert driver.pinned_used == 0 and not memory.pinned
        memory.array[:] = 1

    def test_memory_that_cannot_be_pinned_is_used_all_the_same(
        self, driver: Driver, fake_gpu: FakeCuda
    ) -> None:
        fake_gpu.fail("cuMemHostRegister:1:801")
        memory = driver.pinned(64)
        assert not memory.pinned and driver.pinned_used == 0
        at = driver.allocate(64)
        memory.array[:] = 5
        driver.upload_async(at, memory.array)
        driver.synchronize()
        found = np.zeros(64, np.uint8)
        driver.download(found, at)
        assert (found == 5).all()

    def test_misuse_of_memory_is_refused(self, driver: Driver) -> None:
        at = driver.allocate(64)
        driver.free(at)
        with pytest.raises(ValueError, match="is free already"):
            driver.free(at)
        with pytest.raises(ValueError, match="cannot be allocated"):
            driver.allocate(0)
        with pytest.raises(ValueError, match="contiguous"):
            driver.download(np.zeros((4, 4), np.uint8)[:, 0], at)
        frozen = np.zeros(4, np.uint8)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            driver.download(frozen, at)

    def test_memory_that_runs_out(
        self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, driver: Driver
    ) -> None:
        monkeypatch.setenv("EDGE_FAKE_MEMORY", "100000")
        with pytest.raises(DoesNotFit, match=r"CUDA_ERROR_OUT_OF_MEMORY while allocating 100001") as caught:
            driver.allocate(100001)
        assert caught.value.need == 100001 and 0 < caught.value.have <= 100000
        assert caught.value.source == "free memory of the CUDA driver" and driver.memory_used == 0
        driver.free(driver.allocate(1000))  # nothing is broken by it

    def test_an_arena_comes_in_blocks_where_one_is_refused(
        self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, driver: Driver
    ) -> None:
        monkeypatch.setenv("EDGE_FAKE_LARGEST", "4096")
        arena = DeviceArena(driver, [(f"r{i}", 1024, 256) for i in range(16)])
        assert arena.blocks == 4 and arena.nbytes == 16384 == driver.memory_used == fake_gpu.used
        arena.fill(9)
        found = np.zeros(1024, np.uint8)
        driver.download(found, arena.addresses["r15"])
        assert (found == 9).all()
        arena.release()
        assert driver.memory_used == 0 == fake_gpu.used
        with pytest.raises(DoesNotFit) as caught:
            DeviceArena(driver, [("small", 16, 64), ("large", 4097, 256)])
        assert caught.value.need == 4097 and fake_gpu.used == 0

    # --- kernels ---

    def test_kernels_run_with_their_record(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        x = np.arange(100, dtype=np.float32)
        out, source = driver.allocate(x.nbytes), driver.allocate(x.nbytes)
        driver.upload(source, x)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        launch = driver.prepare(kernel, (2, 1, 1), 64, 0, record(out, source, 3, 100))
        driver.run(launch)
        found = np.zeros_like(x)
        driver.download(found, out)
        np.testing.assert_array_equal(found, x * 3)
        driver.fill(out, x.nbytes)
        with driver.current:
            driver.run(launch)  # the same again, on the fast way
            driver.launch(kernel, (1, 1, 1), 64, 0, record(source, out, 2, 10))
        driver.download(found, source)
        np.testing.assert_array_equal(found, np.r_[x[:10] * 6, x[10:]])

    def test_dynamic_shared_memory_beyond_the_default(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        x = np.arange(128, dtype=np.float32)
        at = driver.allocate(x.nbytes)
        driver.upload(at, x)
        module = self.kernels(driver)
        kernel = driver.function(module, "edge_reversed", shared=100 << 10)
        driver.launch(kernel, (2, 1, 1), 64, 100 << 10, record(at, at, 0, 0))
        found = np.zeros_like(x)
        driver.download(found, at)
        np.testing.assert_array_equal(found, x.reshape(2, 64)[:, ::-1].reshape(-1))
        with pytest.raises(BackendUnavailable, match="CUDA_ERROR_INVALID_VALUE while allowing kernel"):
            driver.function(module, "edge_scaled", shared=driver.facts.shared_bytes + 1)

    def test_a_kernel_that_is_not_there_is_named(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        with pytest.raises(BadEngineFile, match=r"CUDA_ERROR_NOT_FOUND while looking up kernel edge_absent"):
            driver.function(self.kernels(driver), "edge_absent")

    @pytest.mark.parametrize(
        ("made_for", "isa", "name"),
        [
            ("90", "8.5", "CUDA_ERROR_INVALID_PTX"),
            ("87", "9.0", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        ],
    )
    def test_device_code_for_another_gpu_or_driver(
        self, driver: Driver, fake_gpu: FakeCuda, made_for: str, isa: str, name: str
    ) -> None:
        image = ptx(int(made_for), isa)
        says = rf"{name} while loading .*for sm_{made_for} does not run on .*sm_87, driver for CUDA 12\.6"
        with pytest.raises(DeviceMismatch, match=says):
            driver.load_module(image, f"sm_{made_for}")

    def test_an_image_that_is_no_code(self, driver: Driver) -> None:
        with pytest.raises(DeviceMismatch, match="CUDA_ERROR_INVALID_IMAGE while loading 100 bytes"):
            driver.load_module(b"x" * 99 + b"\0")

    # --- time and order ---

    def test_events_measure(self, driver: Driver) -> None:
        first, last = driver.event(), driver.event()
        driver.record(first)
        driver.fill(driver.allocate(1 << 20), 1 << 20, 1)
        driver.record(last)
        assert 0 <= driver.elapsed_ms(first, last) < 10_000

    def test_another_streams_work_is_waited_for(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        waits = fake_gpu.count("cuStreamSynchronize") + fake_gpu.count("cuCtxSynchronize")
        array = DeviceArray(driver.allocate(4), (1,), np.dtype("f4"))
        driver.follow(array)
        assert fake_gpu.count("cuStreamSynchronize") + fake_gpu.count("cuCtxSynchronize") == waits
        driver.follow(DeviceArray(array.address, (1,), np.dtype("f4"), stream=driver.stream))
        assert fake_gpu.count("cuStreamSynchronize") + fake_gpu.count("cuCtxSynchronize") == waits + 1
        with pytest.raises(BadRequest, match="no array in device memory"):
            driver.follow(np.zeros(1))

    def test_any_thread_may_call(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        x = np.arange(64, dtype=np.float32)
        at = driver.allocate(x.nbytes)
        driver.upload(at, x)
        found = np.zeros_like(x)

        def work() -> None:
            driver.launch(kernel, (1, 1, 1), 64, 0, record(at, at, 2, 64))
            with driver.current:
                driver.launch(kernel, (1, 1, 1), 64, 0, record(at, at, 2, 64))
            driver.download(found, at)
            driver.free(driver.allocate(16))

        for _ in range(3):
            in_thread(work)
        np.testing.assert_array_equal(found, x * 4**3)

    def test_python_goes_on_while_the_gpu_is_waited_for(self, driver: Driver) -> None:
        if lets_nobody_else_run(driver):
            pytest.skip("cuda-bindings before 12.9 keeps Python's lock while it waits")
        kernel = driver.function(self.kernels(driver), "edge_waiting")
        flag, out = np.zeros(1, np.float32), driver.allocate(4)
        timer = threading.Timer(0.02, lambda: flag.fill(7))
        timer.start()
        driver.launch(kernel, (1, 1, 1), 1, 0, record(out, flag.ctypes.data, 0, 0))
        found = np.zeros(1, np.float32)
        driver.synchronize()
        driver.download(found, out)
        timer.join()
        assert found[0] == 7, "the timer's thread could not run before the wait ended"

    # --- failures ---

    @pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet"])
    def test_no_device(self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
        if function == "cuInit":
            monkeypatch.setenv("EDGE_FAKE_DEVICES", "0")
            with pytest.raises(BackendUnavailable, match=r"CUDA_ERROR_NO_DEVICE while .*no GPU is visible"):
                open_driver(self.api)
        else:
            with pytest.raises(BackendUnavailable, match=r"CUDA_ERROR_INVALID_DEVICE while opening GPU 3"):
                open_driver(self.api, 3)

    def test_no_memory_for_a_context(self, fake_gpu: FakeCuda) -> None:
        fake_gpu.fail("cuDevicePrimaryCtxRetain:1:2")
        with pytest.raises(DoesNotFit, match=r"CUDA_ERROR_OUT_OF_MEMORY while joining the GPU's primary"):
            open_driver(self.api)

    def test_a_failure_while_opening_leaves_nothing(self, fake_gpu: FakeCuda) -> None:
        fake_gpu.fail("cuStreamCreate:1:999")
        with pytest.raises(BackendUnavailable, match="CUDA_ERROR_UNKNOWN while making a stream"):
            open_driver(self.api)
        assert fake_gpu.count("cuDevicePrimaryCtxRetain") == fake_gpu.count("cuDevicePrimaryCtxRelease") > 0

    @pytest.mark.parametrize("code", [700, 719])
    def test_a_lost_context_says_so_at_every_call(self, faulty_gpu: FakeCuda, code: int) -> None:
        driver = open_driver(self.api)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        at = driver.allocate(256)
        launch = driver.prepare(kernel, (1, 1, 1), 64, 0, record(at, at, 1, 0))
        name = {700: "CUDA_ERROR_ILLEGAL_ADDRESS", 719: "CUDA_ERROR_LAUNCH_FAILED"}[code]
        faulty_gpu.fail(f"cuLaunchKernel:1:{code}")
        said = f"{name} while launching .*edge_scaled: the CUDA context is lost; close the engine and open it"
        with pytest.raises(BackendUnavailable, match=said):
            driver.run(launch)
        calls = (
            lambda: driver.run(launch),
            lambda: driver.allocate(4),
            lambda: driver.free(at),
            lambda: driver.fill(at, 4),
            driver.synchronize,
            lambda: driver.pinned(4),
            driver.event,
        )
        for call in calls:
            with pytest.raises(BackendUnavailable, match=name):
                call()
        driver.close()
        again = open_driver(self.api)  # a new context works
        again.free(again.allocate(4))
        again.close()

    def test_a_fault_of_a_kernel_is_found_where_it_is_waited_for(self, faulty_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        at = driver.allocate(64)
        x = driver.allocate(128)
        driver.fill(x, 128)
        driver.launch(kernel, (1, 1, 1), 64, 0, record(at, x, 1, 17))  # one float too many
        with pytest.raises(BackendUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS while waiting for the GPU"):
            driver.synchronize()
        driver.close()

    @pytest.mark.parametrize(
        ("function", "act"),
        [
            ("cuMemcpyHtoDAsync", lambda d, at: d.upload(at, np.zeros(4, np.uint8))),
            ("cuMemcpyDtoHAsync", lambda d, at: d.download(np.zeros(4, np.uint8), at)),
            ("cuMemcpyDtoDAsync", lambda d, at: d.copy(at, at + 16, 4)),
            ("cuMemsetD8Async", lambda d, at: d.fill(at, 4)),
            ("cuStreamSynchronize", lambda d, at: d.synchronize()),
            ("cuMemFree", lambda d, at: d.free(at)),
            ("cuEventCreate", lambda d, at: d.event()),
            ("cuEventRecord", lambda d, at: d.record(d.event())),
            ("cuMemGetInfo", lambda d, at: d.free_bytes()),
        ],
    )
    def test_every_call_names_its_failure(
        self, driver: Driver, fake_gpu: FakeCuda, function: str, act: Any
    ) -> None:
        at = driver.allocate(64)
        fake_gpu.fail(f"{function}:1:400")
        if function == "cuMemFree" and self.api == "pycuda":
            pytest.skip("pycuda only warns of it")
        with pytest.raises(EdgeError, match=r"CUDA_ERROR_INVALID_HANDLE while \w+"):
            act(driver, at)

    # --- the end ---

    def test_close_gives_everything_back_and_twice_does_nothing(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        at = driver.allocate(1000)
        driver.allocate(2000)
        memory = driver.pinned(3000)
        event = driver.event()
        launch = driver.prepare(kernel, (1, 1, 1), 64, 0, record(at, at, 1, 0))
        assert fake_gpu.used == 3000 == driver.memory_used
        driver.close()
        driver.close()
        modules = "cuModuleLoadDataEx" if self.api == "pycuda" else "cuModuleLoadData"
        assert fake_gpu.used == 0 == driver.memory_used == driver.pinned_used
        for made, ended in (
            ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
            ("cuStreamCreate", "cuStreamDestroy"),
            ("cuEventCreate", "cuEventDestroy"),
            ("cuMemHostRegister", "cuMemHostUnregister"),
            (modules, "cuModuleUnload"),
            ("cuCtxPushCurrent", "cuCtxPopCurrent"),
        ):
            assert fake_gpu.count(made) == fake_gpu.count(ended) > 0, f"{made} without {ended}"
        for call in (
            lambda: driver.run(launch),
            lambda: driver.allocate(4),
            lambda: driver.record(event),
            lambda: driver.prepare(kernel, (1, 1, 1), 64, 0, b""),
            lambda: driver.free(at),
            lambda: driver.pinned(4),
            driver.synchronize,
        ):
            with pytest.raises(BackendUnavailable, match="this CUDA driver is closed"):
                call()
        driver.release_pinned(memory)

    def test_close_in_another_thread(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        driver.allocate(100)
        driver.pinned(100)
        in_thread(driver.close)
        assert fake_gpu.used == 0
        assert fake_gpu.count("cuDevicePrimaryCtxRetain") == fake_gpu.count("cuDevicePrimaryCtxRelease")

    def test_a_driver_that_is_forgotten_gives_back_too(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        driver.allocate(100)
        del driver
        gc.collect()
        assert fake_gpu.used == 0

    def test_two_drivers_share_the_primary_context(self, fake_gpu: FakeCuda) -> None:
        first, second = open_driver(self.api), open_driver(self.api)
        at = first.allocate(64)
        first.fill(at, 64, 4)
        first.synchronize()
        found = np.zeros(64, np.uint8)
        second.download(found, at)
        assert (found == 4).all()
        first.close()
        second.free(second.allocate(4))
        second.close()


def lets_nobody_else_run(driver: Driver) -> bool:
    if driver.facts.api != "cuda-bindings":
        return False
    return tuple(map(int, version("cuda-bindings").split(".")[:2])) < (12, 9)


def in_thread(work: Any) -> None:
    """Runs it in a thread of its own, and raises what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
