"""CUDA's driver API through pycuda: for images that have it (JetPack) and code that lives in its context.

pycuda has no graphs. It keeps its own stack of contexts beside CUDA's, and frees only what belongs to a
context that is current in the thread; hence the care in `close`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import mmap
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np

from edge_runtime.backends.cuda.current import CurrentContext
from edge_runtime.backends.cuda.device_array import interface_of
from edge_runtime.backends.cuda.driver import (
    PYCUDA,
    DeviceFacts,
    Event,
    Function,
    Graph,
    Handle,
    Launch,
    Module,
    Pinned,
    host_bytes,
)
from edge_runtime.backends.cuda.failures import CLOSED, OUT_OF_MEMORY, PIP, failure, is_lost
from edge_runtime.engine.formats import Array
from edge_runtime.engine.probe import available_memory
from edge_runtime.errors import BackendUnavailable, EdgeError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
# What came late to pycuda, or depends on the CUDA that it was built for
_NEEDED = {
    "Device": ("retain_primary_context",),
    "Function": ("set_attribute", "_launch_kernel"),
    "device_attribute": ("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", "L2_CACHE_SIZE"),
    "function_attribute": ("MAX_DYNAMIC_SHARED_SIZE_BYTES", "LOCAL_SIZE_BYTES"),
}
_MAX_CODE = 1000  # result codes end at 999, CUDA_ERROR_UNKNOWN


def installed() -> bool:
    """Whether pycuda can be found; importing it needs libcuda as well."""
    return importlib.util.find_spec("pycuda") is not None


def _api() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycuda's guess at why; the error below has the reason itself
            api = importlib.import_module("pycuda.driver")
    except ImportError as error:
        what = "the NVIDIA driver (libcuda.so.1) is missing" if "libcuda" in str(error) else PIP
        raise BackendUnavailable(f"pycuda cannot be used ({error}): {what}") from error
    for owner, names in _NEEDED.items():
        lacking = [name for name in names if not hasattr(getattr(api, owner, None), name)]
        if lacking:
            raise BackendUnavailable(
                f"this pycuda is too old or was built for an old CUDA: {owner} has no {', '.join(lacking)}; "
                "build pycuda 2024.1 or newer against CUDA 12 or newer, or install cuda-bindings"
            )
    return api


@functools.lru_cache(1)
def _libcuda() -> ctypes.CDLL:
    """The library that pycuda has loaded, for the two things that pycuda does not offer."""
    return ctypes.CDLL("libcuda.so.1")


@functools.lru_cache(1)
def _codes() -> dict[str, int]:
    """CUDA's descriptions of its result codes: pycuda's errors have the description, and no code."""
    found: dict[str, int] = {}
    text = ctypes.c_char_p()
    for code in range(1, _MAX_CODE):
        if not _libcuda().cuGetErrorString(code, ctypes.byref(text)) and text.value:
            found.setdefault(text.value.decode("utf-8", "replace"), code)
    return found


def _name(code: int) -> str:
    text = ctypes.c_char_p()
    if _libcuda().cuGetErrorName(code, ctypes.byref(text)) or not text.value:
        return f"CUDA error {code}"
    return text.value.decode("utf-8", "replace")


def code_of(message: str, codes: dict[str, int]) -> int:
    """The result code in a message of pycuda ("cuMemAlloc failed: out of memory - log"); 0 if it has none."""
    said = message.partition(" failed: ")[2]
    fits = [text for text in codes if said == text or said.startswith(f"{text} - ")]
    return codes[max(fits, key=len)] if fits else 0


def _ask(api: Any, doing: str, function: Callable[..., Any], *args: object) -> Any:
    try:
        return function(*args)
    except api.Error as error:
        code = code_of(str(error), _codes())
        raise (
            failure(code, _name(code), doing) if code else BackendUnavailable(f"{error} while {doing}")
        ) from error


def _quiet(api: Any, function: Callable[..., Any], *args: object) -> bool:
    """Call on the way out, where nothing can be done about a failure; whether it worked."""
    try:
        function(*args)
    except api.Error:
        return False
    return True


def _never_free(held: object) -> None:
    """Keep pycuda from destroying an object of its own, which would fail in a way that cannot be caught."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


class PycudaDriver:
    """See `Driver`."""

    graphs = False
    overlaps = False

    def __init__(self, device: int = 0) -> None:
        self._trouble: str | None = None  # why no call can be made any more
        self._closed = True
        self._lock = threading.RLock()
        self._cu = cu = _api()
        self.facts = self.facts_of(device)
        here = cu.Context.get_current()
        self._joined = here is not None and cu.Context.get_device() == cu.Device(device)
        self._context = here if self._joined else self._retain(device)
        self.current = CurrentContext(
            functools.partial(_ask, cu, "making the context current", self._context.push),
            functools.partial(_quiet, cu, cu.Context.pop),
        )
        self._allocations: dict[int, Any] = {}  # address -> pycuda's allocation
        self._sizes: dict[int, int] = {}
        self._pinned: dict[int, Pinned] = {}
        self._modules: list[Handle] = []
        self._functions: list[Handle] = []
        self._events: list[Handle] = []
        self._closed = False
        self._stream: Any = None
        self.stream = 0
        try:
            self._stream = self._call("making a stream", cu.Stream, _NON_BLOCKING)
            self.stream = int(self._stream.handle)
        except EdgeError:
            self.close()
            raise

    def _retain(self, device: int) -> Any:
        found, gpu = ctypes.c_int(), self._cu.Device(device)
        _libcuda().cuDeviceGet(ctypes.byref(found), device)
        self._ordinal, self._opener = found.value, threading.get_ident()
        return _ask(self._cu, "joining the GPU's primary context", gpu.retain_primary_context)

    @staticmethod
    def facts_of(device: int) -> DeviceFacts:
        """What the driver says of a GPU, without a context. Raises BackendUnavailable."""
        cu = _api()
        _ask(cu, "starting the CUDA driver", cu.init)
        gpu = _ask(cu, f"opening GPU {device}", cu.Device, device)
        version = cu.get_driver_version()

        def attribute(key: str) -> int:
            which = getattr(cu.device_attribute, key)
            return int(_ask(cu, f"asking {key} of GPU {device}", gpu.get_attribute, which))

        major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        return DeviceFacts(
            name=_ask(cu, f"asking the name of GPU {device}", gpu.name),
            compute_capability=f"{major}.{minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
            total_bytes=int(_ask(cu, f"asking the memory of GPU {device}", gpu.total_memory)),
            integrated=bool(attribute("INTEGRATED")),
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            l2_bytes=attribute("L2_CACHE_SIZE"),
            api=PYCUDA,
        )

    # --- memory ---

    def free_bytes(self) -> tuple[int, str]:
        if self.facts.integrated:
            return available_memory()
        free, _ = self._call("asking for free memory", self._cu.mem_get_info)
        return int(free), "free memory of the CUDA driver"

    def allocate(self, nbytes: int) -> int:
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated")
        made = self._call(f"allocating {nbytes} bytes", self._cu.mem_alloc, nbytes, need=nbytes)
        address = int(made)
        self._allocations[address], self._sizes[address] = made, nbytes
        return address

    def free(self, address: int) -> None:
        self._guard()
        if address not in self._allocations:
            raise ValueError(f"{address:#x} was not allocated here, or is free already")
        del self._sizes[address]
        self._call("freeing memory", self._allocations.pop(address).free)

    def pinned(self, nbytes: int) -> Pinned:
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated")
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        array = np.frombuffer(mmap.mmap(-1, size), np.uint8)[:nbytes]
        address, _ = host_bytes(array)
        self._guard()
        register = _libcuda().cuMemHostRegister_v2  # pycuda's own crashes with numpy 2
        with self.current:
            code = register(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        if code == OUT_OF_MEMORY:
            raise self._failed(code, f"pinning {size} bytes of host memory", need=size)
        memory = Pinned(array, address, pinned=code == 0)
        if not code:
            self._pinned[address] = memory
        return memory

    def release_pinned(self, memory: Pinned) -> None:
        if self._pinned.pop(memory.address, None) is not None:
            memory.pinned = False
            with self.current:
                _libcuda().cuMemHostUnregister(ctypes.c_void_p(memory.address))

    def upload(self, address: int, array: Array) -> None:
        self.upload_async(address, np.ascontiguousarray(array))
        self.synchronize()  # so that kernels queued next see it, and the array may change

    def download(self, array: Array, address: int) -> None:
        self.download_async(array, address)
        self.synchronize()

    def upload_async(self, address: int, array: Array) -> None:
        _, nbytes = host_bytes(array)
        if nbytes:
            doing = f"copying {nbytes} bytes to the GPU"
            self._call(doing, self._cu.memcpy_htod_async, address, array, self._stream)

    def download_async(self, array: Array, address: int) -> None:
        _, nbytes = host_bytes(array, writable=True)
        if nbytes:
            doing = f"copying {nbytes} bytes from the GPU"
            self._call(doing, self._cu.memcpy_dtoh_async, array, address, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            doing = f"copying {nbytes} bytes on the GPU"
            self._call(doing, self._cu.memcpy_dtod_async, target, source, nbytes, self._stream)

    def fill(self, address: int, nbytes: int, value: int = 0) -> None:
        if nbytes:
            doing = f"filling {nbytes} bytes"
            self._call(doing, self._cu.memset_d8_async, address, value, nbytes, self._stream)

    # --- device code ---

    def load_module(self, image: bytes, made_for: str = "") -> Module:
        doing = f"loading {len(image)} bytes of device code"
        handle = self._call(doing, self._cu.module_from_buffer, image, need=len(image), code_for=made_for)
        module = Module(handle)
        self._modules.append(module)
        return module

    def function(self, module: Module, symbol: str, shared: int = 0) -> Function:
        self._guard()
        handle = self._call(f"looking up kernel {symbol}", module.handle.get_function, symbol)
        if shared:
            which = self._cu.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            doing = f"allowing kernel {symbol} {shared} bytes of shared memory"
            self._call(doing, handle.set_attribute, which, shared)
        # asked for, so that a module that is loaded lazily takes its memory now and not at the first launch
        local = self._cu.function_attribute.LOCAL_SIZE_BYTES
        self._call(f"loading kernel {symbol}", handle.get_attribute, local)
        function = Function(handle, symbol)
        self._functions.append(function)
        return function

    def prepare(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        args: bytes,
        overlap: bool = False,
    ) -> Launch:
        self._guard()

        def call() -> None:  # through `function`, which is emptied when the driver closes
            function.handle._launch_kernel(grid, (threads, 1, 1), args, shared, self._stream)

        return Launch(call, function.symbol)

    def run(self, launch: Launch) -> None:
        self._call(f"launching kernel {launch.symbol}", launch.call)

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared: int, args: bytes
    ) -> None:
        self.run(self.prepare(function, grid, threads, shared, args))

    def capture(self) -> AbstractContextManager[Graph]:
        raise BackendUnavailable(f"pycuda has no CUDA graphs; for those {PIP}")

    def launch_graph(self, graph: Graph) -> None:
        self.capture()

    def release_graph(self, graph: Graph) -> None:
        self.capture()

    # --- time and order ---

    def synchronize(self) -> None:
        self._guard()
        self._call("waiting for the GPU", self._stream.synchronize)

    def event(self) -> Event:
        event = Event(self._call("making an event", self._cu.Event))
        self._events.append(event)
        return event

    def record(self, event: Event) -> None:
        self._guard()
        self._call("recording an event", event.handle.record, self._stream)

    def elapsed_ms(self, first: Event, last: Event) -> float:
        self._guard()
        self._call("waiting for an event", last.handle.synchronize)
        return float(self._call("measuring between events", last.handle.time_since, first.handle))

    def follow(self, array: object) -> None:
        if interface_of(array).get("stream") is not None:  # pycuda cannot name the stream of others
            self._call("waiting for other streams", self._cu.Context.synchronize)

    @property
    def memory_used(self) -> int:
        return sum(self._sizes.values())

    @property
    def pinned_used(self) -> int:
        return sum(m.nbytes for m in self._pinned.values())

    # --- the end ---

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            cu = self._cu
            below = cu.Context.get_current() is not None
            entered = _quiet(cu, self._context.push)
            if entered:
                if self._stream is not None:
                    _quiet(cu, self._stream.synchronize)
                for memory in self._pinned.values():
                    _libcuda().cuMemHostUnregister(ctypes.c_void_p(memory.address))
                for allocation in self._allocations.values():
                    _quiet(cu, allocation.free)
            elif self._joined:  # lost, and not ours to detach
                for lost in (self._stream, *self._allocations.values()):
                    _never_free(lost)
                for held in (*self._functions, *self._events, *self._modules):
                    _never_free(held.handle)
            else:
                self._release_lost()
            for held in (*self._functions, *self._events, *self._modules):
                held.handle = None  # the last reference: pycuda frees it while the context is current
            for memory in self._pinned.values():
                memory.pinned = False
            self._allocations, self._sizes, self._pinned = {}, {}, {}
            self._functions, self._events, self._modules = [], [], []
            self._stream = None
            if entered and self._joined:
                _quiet(cu, cu.Context.pop)
            elif entered:
                self._release_current(below)
            self._trouble = CLOSED

    def _release_current(self, below: bool) -> None:
        """Give the primary context back while it is current: pycuda does so from any thread only then.

        Detached, so that pycuda leaves alone what is destroyed later, such as what a traceback holds.
        below: whether another of pycuda's contexts was current before.
        """
        _quiet(self._cu, self._context.detach)
        # pycuda has put that back on top of CUDA's stack, and left the primary below it
        top, cuda = ctypes.c_void_p(), _libcuda()
        cuda.cuCtxPopCurrent_v2(ctypes.byref(top))
        if below:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
            cuda.cuCtxPushCurrent_v2(top)

    def _release_lost(self) -> None:
        """Give back a primary context that cannot be made current; pycuda then destroys nothing in it."""
        _quiet(self._cu, self._context.detach)
        if threading.get_ident() != self._opener:  # pycuda has only marked it as gone
            _libcuda().cuDevicePrimaryCtxRelease_v2(self._ordinal)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _guard(self) -> None:
        if self._trouble is not None:
            raise BackendUnavailable(self._trouble)

    def _call(
        self, doing: str, function: Callable[..., Any], *args: object, need: int = 0, code_for: str = ""
    ) -> Any:
        """A function of pycuda in the context of this driver."""
        self._guard()
        try:
            with self.current:
                return function(*args)
        except self._cu.Error as error:
            code = code_of(str(error), _codes())
            raise self._failed(code, doing, need=need, code_for=code_for, said=str(error)) from error

    def _failed(
        self, code: int, doing: str, *, need: int = 0, code_for: str = "", said: str = ""
    ) -> EdgeError:
        if not code:
            return BackendUnavailable(f"{said} while {doing}")
        have, source = 0, ""
        if code == OUT_OF_MEMORY:
            with suppress(EdgeError):
                have, source = self.free_bytes()
        error = failure(
            code,
            _name(code),
            doing,
            need=need,
            have=have,
            source=source,
            device=str(self.facts),
            code_for=code_for,
        )
        if is_lost(code):
            self._trouble = str(error)
        return error
