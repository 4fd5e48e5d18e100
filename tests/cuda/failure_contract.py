"""How both drivers fail and how they end: test_driver.py and test_pycuda_driver.py run it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from opened_driver import OpenedDriver, in_thread, record

from edge_runtime.backends.cuda.driver import Driver, open_driver
from edge_runtime.errors import (
    BackendUnavailable,
    DoesNotFit,
    EdgeError,
)


class FailureContract(OpenedDriver):
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

    @pytest.mark.parametrize("code", [700, 719, 999])
    def test_a_lost_context_says_so_at_every_call(self, faulty_gpu: FakeCuda, code: int) -> None:
        driver = open_driver(self.api)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        at = driver.allocate(256)
        launch = driver.prepare(kernel, (1, 1, 1), 64, 0, record(at, at, 1, 0))
        names = {700: "ILLEGAL_ADDRESS", 719: "LAUNCH_FAILED", 999: "UNKNOWN"}
        name = f"CUDA_ERROR_{names[code]}"
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
        if function == "cuMemFree" and self.api == "pycuda":
            pytest.skip("pycuda only warns of it")
        at = driver.allocate(64)
        fake_gpu.fail(f"{function}:1:400")
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
        assert fake_gpu.count("leaked allocations") == 0, "left for the end of the context to free"
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
