"""CUDA's driver API through cuda-bindings 12.x and 13.x: stream capture, graphs, cheapest launches.

From 12.9 on it lets other Python threads run while it waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from edge_runtime.backends.cuda.current import CurrentContext
from edge_runtime.backends.cuda.device_array import interface_of
from edge_runtime.backends.cuda.driver import (
    BINDINGS,
    OVERLAP_SM,
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

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy stream of other libraries


def installed() -> bool:
    """Whether cuda-bindings can be imported."""
    try:
        return importlib.util.find_spec("cuda.bindings.driver") is not None
    except ModuleNotFoundError:
        return False


def _api() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendUnavailable(f"cuda-bindings cannot be used ({error}): {PIP}") from error


def _ask(api: Any, doing: str, function: Callable[..., Any], *args: object) -> Any:
    """What a function of the API gives beside its result code. Raises the typed error of a nonzero one."""
    code, values = _result(api, doing, function, *args)
    if code:
        raise failure(int(code), str(code.name), doing)
    return values


def _result(api: Any, doing: str, function: Callable[..., Any], *args: object) -> tuple[Any, Any]:
    try:
        code, *values = function(*args)
    except RuntimeError as error:  # of cuda-bindings itself: no libcuda, or one without this function
        if type(error).__name__ == "DynamicLibNotFoundError":
            raise BackendUnavailable(
                "the NVIDIA driver (libcuda.so.1) is missing: where there is a GPU, install its driver, and "
                f"the cuda-bindings of its release: {PIP}"
            ) from error
        raise BackendUnavailable(
            f"the CUDA driver did not answer while {doing}: {error}; install the NVIDIA driver "
            f"(libcuda.so.1), and the cuda-bindings of its release: {PIP}"
        ) from error
    except (ValueError, KeyError) as error:  # a result code that this release has no name for
        raise BackendUnavailable(f"an error unknown to cuda-bindings while {doing}: {error}") from error
    return code, values[0] if values else None


def _quiet(function: Callable[..., Any], *args: object) -> bool:
    """Call on the way out, where nothing can be done about a failure; whether it worked."""
    try:
        return not function(*args)[0]
    except (RuntimeError, ValueError, KeyError, TypeError):
        return False


class BindingsDriver:
    """See `Driver`. `stream` is non-blocking: it does not wait for the streams of other libraries."""

    graphs = True

    def __init__(self, device: int = 0) -> None:
        self._trouble: str | None = None  # why no call can be made any more
        self._closed = True
        self._lock = threading.RLock()
        self._cu = cu = _api()
        self.facts = self.facts_of(device)
        self.overlaps = self.facts.sm >= OVERLAP_SM
        self._device = _ask(cu, "opening the GPU", cu.cuDeviceGet, device)
        self._primary = False
        self._context = self._join()
        self.current = CurrentContext(
            functools.partial(_ask, cu, "making the context current", cu.cuCtxPushCurrent, self._context),
            functools.partial(_quiet, cu.cuCtxPopCurrent),
        )
        self._allocations: dict[int, int] = {}  # address -> bytes
        self._pinned: dict[int, Pinned] = {}
        self._modules: list[Handle] = []
        self._functions: list[Handle] = []
        self._graphs: list[Handle] = []
        self._events: list[Handle] = []
        self._closed = False
        self._stream: Any = None
        self.stream = 0
        try:
            self._stream = self._call("making a stream", cu.cuStreamCreate, _NON_BLOCKING)
            self.stream = int(self._stream)
        except EdgeError:
            self.close()
            raise

    @staticmethod
    def facts_of(device: int) -> DeviceFacts:
        """What the driver says of a GPU, without a context. Raises BackendUnavailable."""
        cu = _api()
        _ask(cu, "starting the CUDA driver", cu.cuInit, 0)
        version = _ask(cu, "asking the driver's release", cu.cuDriverGetVersion)
        handle = _ask(cu, f"opening GPU {device}", cu.cuDeviceGet, device)
        name = _ask(cu, f"asking the name of GPU {device}", cu.cuDeviceGetName, 256, handle)
        total = _ask(cu, f"asking the memory of GPU {device}", cu.cuDeviceTotalMem, handle)

        def attribute(key: str) -> int:
            which = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{key}")
            return int(_ask(cu, f"asking {key} of GPU {device}", cu.cuDeviceGetAttribute, which, handle))

        major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        return DeviceFacts(
            name=name.split(b"\0")[0].decode("utf-8", "replace"),
            compute_capability=f"{major}.{minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
            total_bytes=int(total),
            integrated=bool(attribute("INTEGRATED")),
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            l2_bytes=attribute("L2_CACHE_SIZE"),
            api=BINDINGS,
        )

    def _join(self) -> Any:
        """The context that is current in this thread, if of this GPU, else the primary one, retained."""
        cu = self._cu
        here = _ask(cu, "asking for a current context", cu.cuCtxGetCurrent)
        same = bool(int(here)) and int(
            _ask(cu, "asking whose the current context is", cu.cuCtxGetDevice)
        ) == int(self._device)
        primary = _ask(cu, "joining the GPU's primary context", cu.cuDevicePrimaryCtxRetain, self._device)
        if same and int(here) != int(primary):
            _quiet(cu.cuDevicePrimaryCtxRelease, self._device)
            return here
        self._primary = True
        return primary

    # --- memory ---

    def free_bytes(self) -> tuple[int, str]:
        if self.facts.integrated:
            return available_memory()
        free = self._call("asking for free memory", self._cu.cuMemGetInfo)
        return int(free), "free memory of the CUDA driver"

    def allocate(self, nbytes: int) -> int:
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated")
        doing = f"allocating {nbytes} bytes"
        address = int(self._call(doing, self._cu.cuMemAlloc, nbytes, need=nbytes))
        self._allocations[address] = nbytes
        return address

    def free(self, address: int) -> None:
        self._guard()
        if address not in self._allocations:
            raise ValueError(f"{address:#x} was not allocated here, or is free already")
        self._call("freeing memory", self._cu.cuMemFree, address)
        del self._allocations[address]

    def pinned(self, nbytes: int) -> Pinned:
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated")
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        array = np.frombuffer(mmap.mmap(-1, size), np.uint8)[
            :nbytes
        ]  # shared, so that a fork leaves it alone
        address, _ = host_bytes(array)
        memory = Pinned(array, address, pinned=True, handle=size)
        self._guard()
        with self.current:
            code, _ = _result(self._cu, "pinning host memory", self._cu.cuMemHostRegister, address, size, 0)
        if code and int(code) == OUT_OF_MEMORY:
            raise self._failed(code, f"pinning {size} bytes of host memory", need=size)
        if code:
            memory.pinned, memory.handle = False, None
        else:
            self._pinned[address] = memory
        return memory

    def release_pinned(self, memory: Pinned) -> None:
        if self._pinned.pop(memory.address, None) is not None:
            memory.pinned, memory.handle = False, None
            self._call("unpinning host memory", self._cu.cuMemHostUnregister, memory.address)

    def upload(self, address: int, array: Array) -> None:
        array = np.ascontiguousarray(array)
        self.upload_async(address, array)
        self.synchronize()  # so that kernels queued next see it, and the array may change

    def download(self, array: Array, address: int) -> None:
        self.download_async(array, address)
        self.synchronize()

    def upload_async(self, address: int, array: Array) -> None:
        host, nbytes = host_bytes(array)
        if nbytes:
            doing = f"copying {nbytes} bytes to the GPU"
            self._call(doing, self._cu.cuMemcpyHtoDAsync, address, host, nbytes, self._stream)

    def download_async(self, array: Array, address: int) -> None:
        host, nbytes = host_bytes(array, writable=True)
        if nbytes:
            doing = f"copying {nbytes} bytes from the GPU"
            self._call(doing, self._cu.cuMemcpyDtoHAsync, host, address, nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            doing = f"copying {nbytes} bytes on the GPU"
            self._call(doing, self._cu.cuMemcpyDtoDAsync, target, source, nbytes, self._stream)

    def fill(self, address: int, nbytes: int, value: int = 0) -> None:
        if nbytes:
            doing = f"filling {nbytes} bytes"
            self._call(doing, self._cu.cuMemsetD8Async, address, value, nbytes, self._stream)

    # --- device code ---

    def load_module(self, image: bytes, made_for: str = "") -> Module:
        handle = self._call(
            f"loading {len(image)} bytes of device code",
            self._cu.cuModuleLoadData,
            image,
            need=len(image),
            code_for=made_for,
        )
        module = Module(handle)
        self._modules.append(module)
        return module

    def function(self, module: Module, symbol: str, shared: int = 0) -> Function:
        cu = self._cu
        handle = self._call(
            f"looking up kernel {symbol}", cu.cuModuleGetFunction, module.handle, symbol.encode()
        )
        if shared:
            which = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            doing = f"allowing kernel {symbol} {shared} bytes of shared memory"
            self._call(doing, cu.cuFuncSetAttribute, handle, which, shared)
        # asked for, so that a module that is loaded lazily takes its memory now and not at the first launch
        local = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        self._call(f"loading kernel {symbol}", cu.cuFuncGetAttribute, local, handle)
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
        record = ctypes.create_string_buffer(args, len(args))
        params = (ctypes.c_void_p * 2)(ctypes.addressof(record), None)
        if overlap and self.overlaps:
            config = self._overlapping(grid, threads, shared)
            call = functools.partial(
                self._cu.cuLaunchKernelEx, config, function.handle, ctypes.addressof(params), 0
            )
            return Launch(call, function.symbol, (record, params, config))
        call = functools.partial(
            self._cu.cuLaunchKernel,
            function.handle,
            *grid,
            threads,
            1,
            1,
            shared,
            self._stream,
            ctypes.addressof(params),
            0,
        )
        return Launch(call, function.symbol, (record, params))

    def _overlapping(self, grid: tuple[int, int, int], threads: int, shared: int) -> Any:
        """Of a launch that may begin before the one before it has ended (programmatic dependent launch)."""
        cu = self._cu
        value = cu.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute = cu.CUlaunchAttribute()
        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = self._stream
        config.attrs = [attribute]
        config.numAttrs = 1
        return config

    def run(self, launch: Launch) -> None:
        self._start(launch.call, launch.symbol)

    def _start(self, call: Callable[[], Any], what: str) -> None:
        """The hot path: the launch itself takes 0.4 us, so little else."""
        if self._trouble is not None:
            raise BackendUnavailable(self._trouble)
        if self.current.depth:
            code = call()[0]
        else:
            with self.current:
                code = call()[0]
        if code:
            raise self._failed(code, f"launching {what}")

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared: int, args: bytes
    ) -> None:
        self.run(self.prepare(function, grid, threads, shared, args))

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        cu = self._cu
        # of this thread only: what other threads ask of CUDA meanwhile neither fails nor is captured
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        graph = Graph()
        with self.current:
            self._call("beginning a capture", cu.cuStreamBeginCapture, self._stream, mode)
            try:
                yield graph
            except BaseException:
                code, captured = _result(cu, "ending a capture", cu.cuStreamEndCapture, self._stream)
                if not code and int(captured):
                    _quiet(cu.cuGraphDestroy, captured)
                raise
            captured = self._call("ending a capture", cu.cuStreamEndCapture, self._stream)
            try:
                graph.handle = self._call("making a graph", cu.cuGraphInstantiate, captured, 0)
                _quiet(cu.cuGraphUpload, graph.handle, self._stream)  # else the first launch does, and waits
            finally:
                _quiet(cu.cuGraphDestroy, captured)
            self._graphs.append(graph)

    def launch_graph(self, graph: Graph) -> None:
        if graph.handle is None and self._trouble is None:
            raise ValueError("the graph is released, or its capture failed")
        self._start(functools.partial(self._cu.cuGraphLaunch, graph.handle, self._stream), "a graph")

    def release_graph(self, graph: Graph) -> None:
        if graph in self._graphs:
            self._graphs.remove(graph)
            handle, graph.handle = graph.handle, None
            self._call("releasing a graph", self._cu.cuGraphExecDestroy, handle)

    # --- time and order ---

    def synchronize(self) -> None:
        self._call("waiting for the GPU", self._cu.cuStreamSynchronize, self._stream)

    def event(self) -> Event:
        event = Event(self._call("making an event", self._cu.cuEventCreate, 0))
        self._events.append(event)
        return event

    def record(self, event: Event) -> None:
        self._call("recording an event", self._cu.cuEventRecord, event.handle, self._stream)

    def elapsed_ms(self, first: Event, last: Event) -> float:
        self._call("waiting for an event", self._cu.cuEventSynchronize, last.handle)
        return float(
            self._call("measuring between events", self._cu.cuEventElapsedTime, first.handle, last.handle)
        )

    def follow(self, array: object) -> None:
        stream = interface_of(array).get("stream")
        if stream is not None:
            self._call("waiting for another stream", self._cu.cuStreamSynchronize, int(stream))

    @property
    def memory_used(self) -> int:
        return sum(self._allocations.values())

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
            entered = _quiet(cu.cuCtxPushCurrent, self._context)
            if self._stream is not None:
                _quiet(cu.cuStreamSynchronize, self._stream)
            for graph in self._graphs:
                _quiet(cu.cuGraphExecDestroy, graph.handle)
            for event in self._events:
                _quiet(cu.cuEventDestroy, event.handle)
            for memory in self._pinned.values():
                _quiet(cu.cuMemHostUnregister, memory.address)
                memory.pinned = False
            for address in self._allocations:
                _quiet(cu.cuMemFree, address)
            for module in self._modules:
                _quiet(cu.cuModuleUnload, module.handle)
            if self._stream is not None:
                _quiet(cu.cuStreamDestroy, self._stream)
            if entered:
                _quiet(cu.cuCtxPopCurrent)
            if self._primary:
                _quiet(cu.cuDevicePrimaryCtxRelease, self._device)
            for held in (*self._modules, *self._functions, *self._graphs, *self._events):
                held.handle = None
            self._modules, self._functions, self._graphs, self._events = [], [], [], []
            self._allocations, self._pinned = {}, {}
            self._trouble = CLOSED

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _guard(self) -> None:
        if self._trouble is not None:
            raise BackendUnavailable(self._trouble)

    def _call(
        self, doing: str, function: Callable[..., Any], *args: object, need: int = 0, code_for: str = ""
    ) -> Any:
        """A function of the API in the context of this driver; the first value it gives."""
        self._guard()
        with self.current:
            code, value = _result(self._cu, doing, function, *args)
        if code:
            raise self._failed(code, doing, need=need, code_for=code_for)
        return value

    def _failed(self, code: Any, doing: str, *, need: int = 0, code_for: str = "") -> EdgeError:
        number, have, source = int(code), 0, ""
        if number == OUT_OF_MEMORY:
            with suppress(EdgeError):
                have, source = self.free_bytes()
        error = failure(
            number,
            str(code.name),
            doing,
            need=need,
            have=have,
            source=source,
            device=str(self.facts),
            code_for=code_for,
        )
        if is_lost(number):
            self._trouble = str(error)
        return error
