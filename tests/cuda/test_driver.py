"""The driver seam through cuda-bindings, on the fake libcuda: the contract of both drivers, and graphs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from driver_contract import DriverContract
from failure_contract import FailureContract
from fake_cuda import FakeCuda
from opened_driver import in_thread, record

from edge_runtime.backends.cuda import bindings_driver, pycuda_driver
from edge_runtime.backends.cuda import driver as driver_module
from edge_runtime.backends.cuda.bindings_driver import BindingsDriver
from edge_runtime.backends.cuda.driver import Driver, open_driver
from edge_runtime.errors import BackendUnavailable, EdgeError

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


class TestBindings(DriverContract, FailureContract):
    api = "cuda-bindings"

    def test_auto_takes_it(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver()
        assert driver.facts.api == self.api and driver.graphs and driver.stream
        driver.close()

    # --- graphs ---

    def test_a_graph_runs_what_was_captured_with_the_values_of_now(
        self, driver: Driver, fake_gpu: FakeCuda
    ) -> None:
        x = np.arange(64, dtype=np.float32)
        at, out = driver.allocate(x.nbytes), driver.allocate(x.nbytes)
        kernel = driver.function(self.kernels(driver), "edge_scaled")
        staged, answer = driver.pinned(x.nbytes), driver.pinned(x.nbytes)
        args = bytearray(record(out, at, 2, 64))
        with driver.capture() as graph:
            driver.upload_async(at, staged.array)
            driver.run(driver.prepare(kernel, (1, 1, 1), 64, 0, bytes(args)))
            driver.copy(at, out, x.nbytes)
            driver.download_async(answer.array, at)
        args[:] = bytes(len(args))
        answer.array[:] = 0
        driver.synchronize()
        assert not answer.array.any(), "a capture runs nothing"
        for turn in range(3):
            staged.array.view(np.float32)[:] = x + turn
            driver.launch_graph(graph)
            driver.synchronize()
            np.testing.assert_array_equal(answer.array.view(np.float32), 2 * (x + turn))

    def test_an_error_within_a_capture_ends_it(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        at = driver.allocate(64)
        with pytest.raises(KeyError), driver.capture():
            driver.fill(at, 64, 1)
            raise KeyError
        driver.fill(at, 64, 2)  # the stream runs again
        found = np.zeros(64, np.uint8)
        driver.download(found, at)
        assert (found == 2).all() and fake_gpu.count("cuGraphInstantiate") == 0
        with (
            pytest.raises(EdgeError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED while waiting for the GPU"),
            driver.capture(),
        ):
            driver.synchronize()
        driver.fill(at, 64, 3)
        driver.download(found, at)
        assert (found == 3).all()

    def test_other_threads_use_the_gpu_while_one_captures(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        at, other = driver.allocate(64), open_driver(self.api)

        def work() -> None:
            mine = other.allocate(64)
            other.upload(mine, np.ones(64, np.uint8))
            other.free(mine)

        with driver.capture() as graph:
            driver.fill(at, 64, 4)
            in_thread(work)
        driver.launch_graph(graph)
        found = np.zeros(64, np.uint8)
        driver.download(found, at)
        assert (found == 4).all()
        other.close()

    def test_graphs_are_destroyed_with_what_they_were_made_of(self, fake_gpu: FakeCuda) -> None:
        driver = open_driver(self.api)
        at = driver.allocate(64)
        made = []
        for _ in range(3):
            with driver.capture() as graph:
                driver.fill(at, 64, 1)
            made.append(graph)
        driver.release_graph(made[0])
        driver.release_graph(made[0])
        with pytest.raises(ValueError, match="the graph is released"):
            driver.launch_graph(made[0])
        driver.close()
        assert fake_gpu.count("cuGraphExecDestroy") == 3 == fake_gpu.count("cuGraphDestroy")
        with pytest.raises(BackendUnavailable, match="closed"):
            driver.launch_graph(made[1])

    def test_no_memory_for_a_graph(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        at = driver.allocate(64)
        fake_gpu.fail("cuGraphInstantiate:1:2")
        said = "CUDA_ERROR_OUT_OF_MEMORY while making a graph"
        with pytest.raises(EdgeError, match=said), driver.capture():
            driver.fill(at, 64, 1)
        assert fake_gpu.count("cuGraphDestroy") == 1

    # --- contexts of others ---

    def test_the_callers_context_is_joined_and_left(self, fake_gpu: FakeCuda) -> None:
        from cuda.bindings import driver as cu

        cu.cuInit(0)
        own = cu.cuCtxCreate(None, 0, 0)[1] if own_takes_parameters() else cu.cuCtxCreate(0, 0)[1]
        driver = open_driver(self.api)
        assert int(cu.cuCtxGetCurrent()[1]) == int(own)
        assert fake_gpu.count("cuDevicePrimaryCtxRetain") == fake_gpu.count("cuDevicePrimaryCtxRelease")
        driver.free(driver.allocate(4))

        def elsewhere() -> None:
            driver.free(driver.allocate(4))
            assert int(cu.cuCtxGetCurrent()[1]) == 0, "a thread is left as it was"

        in_thread(elsewhere)
        driver.close()
        assert int(cu.cuCtxGetCurrent()[1]) == int(own)
        cu.cuCtxDestroy(own)

    def test_a_thread_with_another_context_keeps_it(self, fake_gpu: FakeCuda) -> None:
        from cuda.bindings import driver as cu

        driver = open_driver(self.api)
        own = cu.cuCtxCreate(None, 0, 0)[1] if own_takes_parameters() else cu.cuCtxCreate(0, 0)[1]
        at = driver.allocate(16)
        driver.upload(at, np.ones(16, np.uint8))
        assert int(cu.cuCtxGetCurrent()[1]) == int(own)
        cu.cuCtxDestroy(own)
        driver.close()

    # --- what cuda-bindings itself may fail at ---

    def test_a_code_that_the_bindings_do_not_know(self, driver: Driver, fake_gpu: FakeCuda) -> None:
        fake_gpu.fail("cuMemAlloc:1:12345")
        with pytest.raises(BackendUnavailable, match="unknown to cuda-bindings while allocating 4 bytes"):
            driver.allocate(4)


def own_takes_parameters() -> bool:
    """cuCtxCreate has another signature since CUDA 13."""
    return "ctxCreateParams" in (__import__("cuda.bindings.driver", fromlist=["x"]).cuCtxCreate.__doc__ or "")


CHILD = """
import sys
from edge_runtime.backends.cuda.driver import open_driver
from edge_runtime.errors import EdgeError
try:
    open_driver(*sys.argv[1:])
except EdgeError as error:
    print(type(error).__name__, error)
"""


def opened_in_a_process_without_libcuda(*args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *args], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has an NVIDIA driver")
def test_a_missing_libcuda_is_said_with_what_to_install() -> None:
    said = opened_in_a_process_without_libcuda()
    assert said.startswith("BackendUnavailable ") and "libcuda.so.1" in said and "pip install" in said


def test_missing_bindings_are_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(
        BackendUnavailable, match=r"cuda-bindings cannot be used .*pip install 'cuda-bindings"
    ):
        BindingsDriver()


def test_neither_installed_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings_driver, "installed", lambda: False)
    monkeypatch.setattr(pycuda_driver, "installed", lambda: False)
    with pytest.raises(
        BackendUnavailable, match=r"neither .* pip install 'cuda-bindings.* pip install pycuda"
    ):
        driver_module.open_driver()


def test_auto_takes_pycuda_where_the_bindings_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings_driver, "installed", lambda: False)
    monkeypatch.setattr(pycuda_driver, "installed", lambda: True)
    monkeypatch.setattr(pycuda_driver, "PycudaDriver", lambda device: ("pycuda", device))
    assert driver_module.open_driver(device=1) == ("pycuda", 1)


def test_importing_the_backend_loads_neither() -> None:
    code = "import sys, edge_runtime.backends.cuda.driver, edge_runtime.backends.cuda.memory\n"
    code += "from edge_runtime.backends.cuda import bindings_driver, pycuda_driver\n"
    code += "assert not {'cuda', 'pycuda', 'torch'} & {m.split('.')[0] for m in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert importlib.util.find_spec("cuda") is not None
