"""The driver seam through pycuda, on the fake libcuda: the contract of both drivers, contexts of pycuda.

pycuda has no wheels. To run these without a GPU: build its sdist against the toolkit, with an empty library
in place of libcuda (gcc -shared -Wl,--no-as-needed,-soname,libcuda.so.1), into an environment of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import re
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from driver_contract import DriverContract
from emulation import compile_cached
from failure_contract import FailureContract
from fake_cuda import FakeCuda, fake_driver, load_fake
from opened_driver import in_thread

from edge_runtime.backends.cuda.driver import Driver, open_driver
from edge_runtime.errors import BackendUnavailable

if importlib.util.find_spec("pycuda") is None:
    pytest.skip("pycuda is not installed (pip install pycuda needs nvcc)", allow_module_level=True)

NM = re.compile(r"^\s+U (cu[A-Z]\w+)", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def other_symbols() -> None:
    """pycuda links every function of CUDA; those that the fake lacks (textures, arrays) refuse."""
    load_fake()
    library = ctypes.CDLL(str(fake_driver()))
    origin = importlib.util.find_spec("pycuda._driver")
    assert origin is not None and origin.origin is not None
    names = subprocess.run(["nm", "-D", origin.origin], capture_output=True, text=True, check=True).stdout
    lacking = [name for name in sorted(set(NM.findall(names))) if not hasattr(library, name)]
    source = "".join(f'extern "C" int {name}() {{ return 801; }}\n' for name in lacking)
    ctypes.CDLL(str(compile_cached("pycuda_rest", source, ())), mode=ctypes.RTLD_GLOBAL)


def current() -> int:
    """The context that is current in this thread for CUDA, 0 for none."""
    found = ctypes.c_void_p()
    assert not ctypes.CDLL(str(fake_driver())).cuCtxGetCurrent(ctypes.byref(found))
    return found.value or 0


class TestPycuda(DriverContract, FailureContract):
    api = "pycuda"

    @pytest.fixture(autouse=True)
    def quiet(self, recwarn: pytest.WarningsRecorder) -> Iterator[None]:
        yield
        gc.collect()
        said = [str(w.message) for w in recwarn if "out-of-thread" in str(w.message)]
        assert not said, "pycuda leaked something that it could not free in this thread"

    def test_it_has_no_graphs(self, driver: Driver) -> None:
        assert not driver.graphs
        with pytest.raises(BackendUnavailable, match="pycuda has no CUDA graphs; for those pip install"):
            driver.capture()

    def test_the_callers_context_is_joined_and_left(self, fake_gpu: FakeCuda) -> None:
        import pycuda.driver as cu

        cu.init()
        own = cu.Device(0).make_context()
        try:
            retained = fake_gpu.count("cuDevicePrimaryCtxRetain")
            driver = open_driver(self.api)
            assert fake_gpu.count("cuDevicePrimaryCtxRetain") == retained
            at = driver.allocate(16)
            driver.upload(at, np.ones(16, np.uint8))
            theirs = cu.mem_alloc(16)
            driver.copy(int(theirs), at, 16)
            driver.synchronize()
            found = np.zeros(16, np.uint8)
            cu.memcpy_dtoh(found, theirs)
            assert (found == 1).all() and cu.Context.get_current() == own
            in_thread(lambda: driver.fill(at, 16, 3))
            driver.close()
            assert cu.Context.get_current() == own
            theirs.free()
        finally:
            own.pop()
            own.detach()

    def test_a_context_made_later_stays_current(self, fake_gpu: FakeCuda) -> None:
        import pycuda.driver as cu

        driver = open_driver(self.api)
        own = cu.Device(0).make_context()
        driver.free(driver.allocate(16))
        assert cu.Context.get_current() == own
        driver.close()
        assert cu.Context.get_current() == own
        theirs = cu.mem_alloc(16)
        theirs.free()
        own.pop()
        own.detach()
        assert cu.Context.get_current() is None
        assert current() == 0, "CUDA's own stack is empty as well"

    def test_arrays_of_pycuda_are_taken(self, driver: Driver) -> None:
        from pycuda import gpuarray

        from edge_runtime.backends.cuda.device_array import as_address

        with driver.current:
            theirs = gpuarray.to_gpu(np.arange(4, dtype=np.float32))
            found = np.zeros(4, np.float32)
            driver.download(found, as_address(theirs, (4,), np.float32))
            del theirs
        np.testing.assert_array_equal(found, np.arange(4))
