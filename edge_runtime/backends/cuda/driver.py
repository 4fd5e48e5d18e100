"""The seam to CUDA's driver API: what the backend needs of it, offered by cuda-bindings and by pycuda.

A driver owns one stream of one context, and everything runs on that stream in order, copies too. It may be
called from any thread, one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from edge_runtime.backends.cuda.current import CurrentContext
from edge_runtime.backends.cuda.failures import PIP
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BackendUnavailable, BadConfig, nearest

AUTO = "auto"
BINDINGS = "cuda-bindings"
PYCUDA = "pycuda"
OVERLAP_SM = 90  # from which on a kernel can wait for the launch before it


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a driver says of its GPU. driver: newest CUDA release it runs, such as "12.6"; api: who was asked.

    shared_bytes: of a block, with what a kernel must ask for specially.
    """

    name: str
    compute_capability: str
    driver: str
    total_bytes: int
    integrated: bool
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int
    api: str

    @property
    def sm(self) -> int:
        """Compute capability as compilers write it: 87 for "8.7"."""
        return int(self.compute_capability.replace(".", ""))

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.sm}, driver for CUDA {self.driver})"


@dataclass(slots=True, eq=False)
class Handle:
    """What a driver gives out; `handle` is the API's own object, None once it is released."""

    handle: Any = None


class Module(Handle):
    """Loaded device code."""


@dataclass(slots=True, eq=False)
class Function(Handle):
    """A kernel of a module."""

    symbol: str = ""


class Graph(Handle):
    """Launches and copies captured in a block of `capture`, started together."""


class Event(Handle):
    """A point of the stream whose time was taken."""


@dataclass(slots=True, eq=False)
class Launch:
    """A launch prepared once: `call` starts it; `keep` is what its arguments lie in."""

    call: Callable[[], Any]
    symbol: str
    keep: tuple[object, ...] = field(repr=False, default=())


@dataclass(slots=True, eq=False)
class Pinned:
    """Host memory that the GPU copies to and from by itself: `array` u8 (nbytes,), page-aligned.

    The memory lives as long as a view of it does, also beyond the driver, which only unpins it. pinned is
    False where the system refused to pin it: copies are then slower, and cannot be captured.
    """

    array: Array
    address: int
    pinned: bool
    handle: Any = None

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)


class Driver(Protocol):
    """Addresses are device addresses, as plain integers. Every method raises EdgeError, with CUDA's name for
    what failed: DoesNotFit out of memory, DeviceMismatch for device code that does not run here,
    BackendUnavailable else; after a lost context at every call.
    """

    facts: DeviceFacts
    graphs: bool  # whether it has `capture`; without, launch one by one
    overlaps: bool  # whether launches may overlap where `prepare` is told so: from sm_90 on
    stream: int  # handle, as others' APIs take it
    current: CurrentContext  # `with driver.current:` around many calls makes them cheaper

    def free_bytes(self) -> tuple[int, str]:
        """(bytes, source) that may be allocated now. On an integrated GPU MemAvailable and cgroup limits."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Address of device memory, aligned to 256 bytes at least. Raises DoesNotFit."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` gave. Raises ValueError for any other address."""
        ...

    def pinned(self, nbytes: int) -> Pinned: ...

    def release_pinned(self, memory: Pinned) -> None:
        """Unpin it; its array stays valid. Twice does nothing."""
        ...

    def upload(self, address: int, array: Array) -> None:
        """Copy a host array to the device; when it returns, the array may change."""
        ...

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous host array from the device, once all that is queued has run."""
        ...

    def upload_async(self, address: int, array: Array) -> None:
        """Queue a copy from a (part of a) Pinned array, which must not change until it has run."""
        ...

    def download_async(self, array: Array, address: int) -> None:
        """Queue a copy to a (part of a) Pinned array, valid after `synchronize`."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy on the device; the two must not overlap."""
        ...

    def fill(self, address: int, nbytes: int, value: int = 0) -> None:
        """Queue setting bytes to `value` (0 to 255)."""
        ...

    def load_module(self, image: bytes, made_for: str = "") -> Module:
        """Device code, cubin or PTX with a NUL at its end. `made_for` ("sm_87, CUDA 12.6") is for errors."""
        ...

    def function(self, module: Module, symbol: str, shared: int = 0) -> Function:
        """A kernel, allowed `shared` bytes of dynamic shared memory a block."""
        ...

    def prepare(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        args: bytes,
        overlap: bool = False,
    ) -> Launch:
        """A launch to `run` again and again. args: the kernel's one record.

        overlap: it may begin while the launch before it still runs, for whose end the kernel waits itself
        (device.cuh); without effect where `overlaps` is False.
        """
        ...

    def run(self, launch: Launch) -> None:
        """Queue a prepared launch; within a capture it is added to the graph."""
        ...

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared: int, args: bytes
    ) -> None:
        """`prepare` and `run`."""
        ...

    def capture(self) -> AbstractContextManager[Graph]:
        """What is queued in its block goes into the Graph, which is ready after the block.

        Raises BackendUnavailable where `graphs` is False.
        """
        ...

    def launch_graph(self, graph: Graph) -> None: ...

    def release_graph(self, graph: Graph) -> None: ...

    def synchronize(self) -> None:
        """Wait until all that is queued has run; other Python threads go on meanwhile."""
        ...

    def event(self) -> Event: ...

    def record(self, event: Event) -> None:
        """Queue taking the time."""
        ...

    def elapsed_ms(self, first: Event, last: Event) -> float:
        """Milliseconds between two recorded events; waits for the last."""
        ...

    def follow(self, array: object) -> None:
        """Wait for the work that the values of a device array of somebody else's come from."""
        ...

    @property
    def memory_used(self) -> int:
        """Bytes of device memory allocated here and not freed."""
        ...

    @property
    def pinned_used(self) -> int:
        """Bytes of host memory pinned here."""
        ...

    def close(self) -> None:
        """Free everything and leave the context; a second close does nothing. Never raises EdgeError."""
        ...


def open_driver(name: str = AUTO, device: int = 0) -> Driver:
    """The driver of GPU `device`: cuda-bindings where installed, else pycuda; or the one named.

    It joins the context that is current in the calling thread, if that is of this GPU (pycuda's, say), else
    the GPU's primary context, which CUDA's runtime (torch, cupy) uses. Raises BackendUnavailable, DoesNotFit,
    BadConfig for an unknown name.
    """
    return _opener(name)(device)


def device_facts(name: str = AUTO, device: int = 0) -> DeviceFacts:
    """What `open_driver(name, device).facts` will say, without a context. Raises as that does."""
    return _opener(name).facts_of(device)


class _Opener(Protocol):
    def __call__(self, device: int) -> Driver: ...

    def facts_of(self, device: int) -> DeviceFacts: ...


def _opener(name: str) -> _Opener:
    from edge_runtime.backends.cuda import bindings_driver, pycuda_driver  # they know this module

    if name not in (AUTO, BINDINGS, PYCUDA):
        raise BadConfig(f"unknown CUDA driver API {name!r}; {nearest(name, (AUTO, BINDINGS, PYCUDA))}")
    if name == BINDINGS or (name == AUTO and bindings_driver.installed()):
        return bindings_driver.BindingsDriver
    if name == PYCUDA or pycuda_driver.installed():
        return pycuda_driver.PycudaDriver
    raise BackendUnavailable(f"neither cuda-bindings nor pycuda is installed: {PIP}")


def host_bytes(array: Array, writable: bool = False) -> tuple[int, int]:
    """(address, bytes) of a contiguous host array. Raises ValueError for another or a read-only one."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise ValueError("copies take C-contiguous numpy arrays")
    if writable and not array.flags.writeable:
        raise ValueError("the host array is read-only")
    address: int = array.__array_interface__["data"][0]
    return address, array.nbytes
