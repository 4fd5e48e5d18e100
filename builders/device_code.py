"""Device code of a cuda engine: the kernels that its Programs need, compiled ahead of time for the profile.

A cubin for the profile's sm, which the device loads as it is, and PTX of the same source, for GPUs that come
later. The robot needs no compiler. Sources are kernels/cuda, handed to the compiler in memory; the same
inputs give the same bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import builders
from builders.cubin import read_cubin
from builders.nvrtc import Compiled, Nvrtc, compiler_for, limit_of, release, sm_of
from builders.ptxas_report import Usage, read_report
from edge_runtime.engine.device_code import Kernel, source
from edge_runtime.engine.formats.c_header import c_header
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry, loaded_nbytes
from edge_runtime.engine.profile import Profile, capability_of
from edge_runtime.errors import BuildError

_PTX = re.compile(rb"^\.version (\d+\.\d+)$", re.MULTILINE)
_SOURCES = ("*.cuh", "*.h")


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """Blobs by name, what the manifest says of them, and a notice for each kernel that spills registers."""

    blobs: dict[str, bytes]
    entries: tuple[DeviceCodeEntry, ...]
    notices: tuple[str, ...] = ()


def compile_device_code(kernels: Sequence[Kernel], profile: Profile, room: int) -> DeviceCode:
    """The kernels for the profile's sm, in at most `room` bytes: what the plan has for them.

    Raises BuildError when no compiler is here whose code the device loads, when the compiler refuses the
    source, and when the code is too large or newer than the device.
    """
    compiler = compiler_for(profile)
    sm = sm_of(profile)
    compiled = _compile(compiler, sm, source(kernels))
    usage = read_report(compiled.log)
    ptx = check_code(compiled, kernels, usage, profile, sm)
    cubin_name, ptx_name = f"device.sm_{sm}.cubin", f"device.compute_{sm}.ptx"
    cuda = release(compiler.cuda)
    code = DeviceCode(
        blobs={cubin_name: compiled.cubin, ptx_name: compiled.ptx},
        entries=(
            DeviceCodeEntry(
                blob=cubin_name,
                kind="cubin",
                sm=sm,
                ptx=ptx,
                cuda=cuda,
                nbytes=len(compiled.cubin),
                kernels={
                    k.symbol: KernelEntry(threads=k.threads, **asdict(usage[k.symbol])) for k in kernels
                },
            ),
            DeviceCodeEntry(
                blob=ptx_name,
                kind="ptx",
                sm=sm,
                ptx=ptx,
                cuda=cuda,
                nbytes=len(compiled.ptx),
                kernels={
                    k.symbol: KernelEntry(threads=k.threads, shared_bytes=usage[k.symbol].shared_bytes)
                    for k in kernels
                },
            ),
        ),
        notices=tuple(_spills(kernels, usage, sm)),
    )
    if loaded_nbytes(code.entries) > room:
        raise BuildError(
            f"device code of {len(kernels)} kernels takes {loaded_nbytes(code.entries)} bytes, the plan has "
            f"room for {room}; choose from fewer formats (--formats)"
        )
    return code


def check_code(
    compiled: Compiled, kernels: Sequence[Kernel], usage: dict[str, Usage], profile: Profile, sm: int
) -> str:
    """The ISA of the PTX. Raises BuildError when code is for another device, too new for the profile's
    driver, or without one of the kernels."""
    cubin, limit = read_cubin(compiled.cubin), limit_of(profile)
    if cubin.sm != sm:
        raise BuildError(f"the compiler was asked for sm_{sm} and made a cubin for sm_{cubin.sm}")
    if cubin.oldest > limit:
        raise BuildError(
            f"the cubin is loaded by drivers of CUDA {release(cubin.oldest)} and newer; profile "
            f"{profile.name!r} says cuda.driver {release(limit)}"
        )
    for kernel in kernels:
        if kernel.symbol not in usage or kernel.symbol not in cubin.registers:
            raise BuildError(f"the compiled code has no kernel {kernel.symbol!r}")
    found = _PTX.search(compiled.ptx)
    if found is None:
        raise BuildError("the compiler's PTX does not name its ISA (.version)")
    ptx = found[1].decode()
    assert profile.cuda is not None, "limit_of asked for it"
    if capability_of(ptx) > capability_of(profile.cuda.ptx):
        raise BuildError(
            f"the compiler makes PTX {ptx}, profile {profile.name!r} takes {profile.cuda.ptx} at most "
            "(cuda.ptx); install an older NVRTC"
        )
    return ptx


def headers() -> dict[str, str]:
    """name -> text, of everything that a kernel may include."""
    found = {p.name: p.read_text(encoding="utf-8") for kind in _SOURCES for p in sources().glob(kind)}
    return {"edge_formats.h": c_header(), **dict(sorted(found.items()))}


def sources() -> Path:
    """The folder of the kernels. Raises BuildError when the installation lacks it."""
    for folder in _folders():
        if (folder / "edge_cuda.h").is_file():
            return folder
    raise BuildError("the sources of the cuda kernels are missing; reinstall edge-runtime")


def _folders() -> Iterator[Path]:
    """`kernels/cuda` of a source checkout, else `_kernels/cuda` of an installed wheel."""
    packages = [Path(p) for p in builders.__path__]
    yield from (p.parent / "kernels" / "cuda" for p in packages)
    yield from (p / "_kernels" / "cuda" for p in packages)


def _spills(kernels: Sequence[Kernel], usage: dict[str, Usage], sm: int) -> Iterator[str]:
    for kernel in kernels:
        of = usage[kernel.symbol]
        if of.spill_stores or of.spill_loads:
            yield (
                f"kernel {kernel.symbol} spills registers on sm_{sm}: {of.spill_stores} bytes written, "
                f"{of.spill_loads} read"
            )


def _compile(compiler: Nvrtc, sm: int, text: str) -> Compiled:
    """A fleet makes many engines with the same kernels."""
    return _compiled(compiler, sm, text, tuple(headers().items()))


@functools.lru_cache(maxsize=8)
def _compiled(compiler: Nvrtc, sm: int, text: str, files: tuple[tuple[str, str], ...]) -> Compiled:
    return compiler.compile(text, dict(files), sm)
