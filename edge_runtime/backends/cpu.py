"""The cpu backend: a Program compiled into records for libedge_cpu.so, one native call for each forward pass.

A token's numbers do not depend on what shares the step, on the number of threads or on the instruction set:
activations are int8 per token and group, the dot inside a group is exact, groups are summed in a fixed order,
and every output is summed by one thread (ARCHITECTURE, exactness contract).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import edge_runtime
from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.cpu_executor import CpuExecutor
from edge_runtime.backends.cpu_weights import kernel_shape
from edge_runtime.backends.kernel_support import kernel_support
from edge_runtime.backends.protocol import DeviceCode, Part, Support
from edge_runtime.engine.formats import FORMATS, abi_hash
from edge_runtime.engine.packing import cpu_packing
from edge_runtime.engine.probe import available_memory
from edge_runtime.engine.program import Program
from edge_runtime.errors import BackendUnavailable, BadConfig, Unsupported, nearest

MAX_THREADS = 256
LIBRARY = "libedge_cpu.so"


def library_path() -> Path:
    """Where the library lies: beside the package in a wheel, in site-packages for an editable install."""
    folders = [Path(p) / "_native" for p in edge_runtime.__path__]
    return next((f / LIBRARY for f in folders if (f / LIBRARY).is_file()), folders[0] / LIBRARY)


@lru_cache(maxsize=4)
def open_library(path: Path) -> ctypes.CDLL:
    """The library, its functions declared. Raises BackendUnavailable when missing, stale or another ABI's."""
    if not path.is_file():
        raise BackendUnavailable(
            f"the native library is not built: {path} does not exist; run 'pip install .'"
        )
    try:
        library = rec.declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(
            f"{path} cannot be used ({error}); build it again with 'pip install .'"
        ) from error
    for what, have, want in (
        ("number formats", int(library.edge_cpu_abi()), abi_hash()),
        ("records", int(library.edge_cpu_records()), rec.RECORDS),
    ):
        if have != want:
            raise BackendUnavailable(
                f"{path} was built for other {what}: it says {have:016x}, this package says {want:016x}; "
                "build it again with 'pip install .'"
            )
    return library


def native_library() -> ctypes.CDLL:
    """The library of this package. Raises BackendUnavailable."""
    return open_library(library_path())


class CpuBackend:
    """C++ kernels on the cores of this process."""

    name = "cpu"
    packing: Mapping[str, str] = {fmt: cpu_packing(fmt) for fmt in FORMATS}
    exact = True

    def available(self) -> Support:
        try:
            native_library()
        except BackendUnavailable as error:
            return Support(False, str(error))
        return Support(True)

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        return kernel_support(self.name, program, formats, lambda name: kernel_shape(name) is not None)

    def check_code(self, code: DeviceCode) -> None:
        """Nothing: no device code is used."""

    def memory(self) -> tuple[int, str]:
        return available_memory()

    def release(self) -> None:
        """Nothing is kept."""

    def load(self, part: Part, *, threads: int = 0, simd: str = "auto") -> CpuExecutor:
        """`simd` picks an instruction set, for tests: results do not depend on it.

        Raises BackendUnavailable, BadConfig (threads, simd), Unsupported, BadEngineFile (a plane's size).
        """
        if not 0 <= threads <= MAX_THREADS:
            raise BadConfig(f"threads is {threads}, expected 0 (all cores of this process) to {MAX_THREADS}")
        if simd not in rec.SIMD:
            raise BadConfig(f"unknown instruction set {simd!r}; {nearest(simd, rec.SIMD)}")
        part.program.check()
        answer = self.supports(part.program, {name: t.format for name, t in part.weights.items()})
        if not answer.ok:
            raise Unsupported(f"the cpu backend cannot run this engine: {answer.why}")
        library = native_library()
        if simd != "auto" and not library.edge_cpu_features() >> rec.SIMD[simd] & 1:
            raise BackendUnavailable(f"this CPU or this build has no {simd} path")
        return CpuExecutor(library, part, threads or _cores(), rec.SIMD[simd])


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


BACKEND = CpuBackend()
