"""The cuda backend: an engine's own kernels, compiled at build time, on an NVIDIA GPU.

A token's numbers do not depend on what shares its step, on how a prompt is cut or on the run: every sum has
an order that is a function of shapes alone (kernels/cuda/linear.cuh, attention.cuh). They differ from the
other backends' by stated bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from edge_runtime.backends.cuda.device_check import check_device
from edge_runtime.backends.cuda.driver import DeviceFacts, Driver, device_facts, open_driver
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.cuda.tuning import Tuning, identity, read_tuning, tuning_path
from edge_runtime.backends.kernel_support import kernel_support
from edge_runtime.backends.protocol import DeviceCode, Part, Support
from edge_runtime.engine.device_code import CACHES, has_kernels
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.launches import kernels_of
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.manifest import DeviceCodeEntry
from edge_runtime.engine.packing import cuda_packing
from edge_runtime.engine.program import Program
from edge_runtime.errors import EdgeError, Unsupported


class CudaBackend:
    """Through cuda-bindings or pycuda, on GPU 0 or the context that is current in the calling thread."""

    name = "cuda"
    packing: Mapping[str, str] = {fmt: cuda_packing(fmt) for fmt in FORMATS}
    exact = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: Driver | None = None  # opened by `memory`, for the next `load`

    def available(self) -> Support:
        try:
            device_facts()
        except EdgeError as error:
            return Support(False, str(error))
        return Support(True)

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        return kernel_support(self.name, program, formats, has_kernels)

    def check_code(self, code: DeviceCode) -> None:
        """Raises DeviceMismatch naming the code's side and the device's; Unsupported where there is none."""
        _entry_for(code)

    def memory(self) -> tuple[int, str]:
        """What a context on the GPU leaves free; the context is kept for the next `load`, or `release`."""
        with self._lock:
            if self._waiting is not None:
                try:
                    return self._waiting.free_bytes()
                except EdgeError:  # lost since then
                    self._waiting.close()
                    self._waiting = None
            self._waiting = open_driver()
            return self._waiting.free_bytes()

    def release(self) -> None:
        """Leave the context that waits for a `load`, if one does."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.close()
                self._waiting = None

    def load(self, part: Part, *, threads: int = 0) -> CudaExecutor:
        """`threads` has no effect.

        Raises BackendUnavailable, DeviceMismatch, DoesNotFit, BadEngineFile; Unsupported where the device
        code lacks a kernel that the part needs.
        """
        part.program.check()
        formats = {name: t.format for name, t in part.weights.items()}
        answer = self.supports(part.program, formats)
        if not answer.ok:
            raise Unsupported(f"the cuda backend cannot run this engine: {answer.why}")
        lowered = lower(part.program, formats, part.kv)
        code = part.code or DeviceCode((), lambda name: memoryview(b""))
        entry = _entry_for(code)
        for kernel in kernels_of(lowered):
            if kernel.symbol not in entry.kernels:
                raise Unsupported(
                    f"the engine's device code has no kernel {kernel.symbol!r}: it was built for another KV "
                    f"format or program than K,V = {part.kv.k},{part.kv.v} (the backend's caches: "
                    f"{', '.join(CACHES)}); build it again with --kv {part.kv.k},{part.kv.v}"
                )
        with self._lock:
            driver, self._waiting = self._waiting, None
        driver = driver or open_driver()
        try:
            with driver.current:
                image = bytes(code.read(entry.blob))
                module = driver.load_module(image, f"sm_{entry.sm}, CUDA {entry.cuda}")
                tuning = _tuning(driver.facts, image, code)
                return CudaExecutor(driver, module, lowered, part, tuning)
        except BaseException:
            driver.close()
            raise


def _entry_for(code: DeviceCode) -> DeviceCodeEntry:
    """The entry that the device here loads. Raises as `check_code`."""
    if not code.entries:
        raise Unsupported(
            "the engine has no device code; build it with a cuda profile (edge-build --profile auto on "
            "this machine, without --no-device-code)"
        )
    return check_device(device_facts(), code.entries)


def _tuning(facts: DeviceFacts, image: bytes, code: DeviceCode) -> Tuning:
    """What was measured for the engine on this device; an empty one where nothing was."""
    device, digest = identity(facts, image)
    found = None if code.engine is None else read_tuning(tuning_path(code.engine), device, digest)
    return found or Tuning(device=device, code=digest)


BACKEND = CudaBackend()
