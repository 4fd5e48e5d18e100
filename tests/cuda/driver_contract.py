"""What both drivers must do, on the fake libcuda: test_driver.py and test_pycuda_driver.py run it."""

from __future__ import annotations

import gc
import threading
from importlib.metadata import version

import numpy as np
import pytest
from fake_cuda import FakeCuda, ptx
from opened_driver import OpenedDriver, Worker, in_thread, record

from edge_runtime.backends.cuda.device_array import DeviceArray
from edge_runtime.backends.cuda.driver import Driver, device_facts, open_driver
from edge_runtime.backends.cuda.memory import DeviceArena
from edge_runtime.errors import (
    BackendUnavailable,
    BadEngineFile,
    BadRequest,
    DeviceMismatch,
    DoesNotFit,
)


class DriverContract(OpenedDriver):
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

    @pytest.mark.parametrize("pinned", [False, True])
    def test_an_upload_and_a_download_have_happened_when_they_return(
        self, driver: Driver, pinned: bool
    ) -> None:
        x = driver.pinned(256).array if pinned else np.zeros(256, np.uint8)
        at = driver.allocate(256)
        x[:] = 1
        driver.upload(at, x)
        x[:] = 7
        driver.fill(at, 16, 5)
        driver.download(x, at)
        assert (x[:16] == 5).all() and (x[16:] == 1).all()

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

    def test_an_integrated_gpu_refuses_by_the_systems_figure(
        self, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGE_FAKE_INTEGRATED", "1")
        monkeypatch.setenv("EDGE_FAKE_MEMORY", str(1 << 50))  # what CUDA says, were it asked
        driver = open_driver(self.api)
        have, source = driver.free_bytes()
        with pytest.raises(DoesNotFit, match="free") as caught:
            DeviceArena(driver, [("all", 2 * have, 256)])
        assert caught.value.source == source and caught.value.need == 2 * have
        assert fake_gpu.count("cuMemAlloc") == 0, "it would have been given, and the system killed"
        driver.close()

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

    def test_two_drivers_run_in_two_threads(self, fake_gpu: FakeCuda) -> None:
        drivers = [open_driver(self.api) for _ in range(2)]
        kernels = [d.function(self.kernels(d), "edge_scaled") for d in drivers]
        found = [np.zeros(64, np.float32) for _ in drivers]

        def work(i: int) -> None:
            driver, x = drivers[i], np.arange(64, dtype=np.float32)
            at = driver.allocate(x.nbytes)
            driver.upload(at, x)
            for _ in range(10):
                driver.launch(kernels[i], (1, 1, 1), 64, 0, record(at, at, 2 + i, 64))
                driver.synchronize()
            driver.download(found[i], at)

        threads = [Worker(lambda i=i: work(i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.finish()
        for i, driver in enumerate(drivers):
            np.testing.assert_array_equal(found[i], np.arange(64) * np.float32(2 + i) ** 10)
            driver.close()
        assert fake_gpu.used == 0

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


def lets_nobody_else_run(driver: Driver) -> bool:
    if driver.facts.api != "cuda-bindings":
        return False
    return tuple(map(int, version("cuda-bindings").split(".")[:2])) < (12, 9)
