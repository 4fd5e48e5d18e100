"""Kernels of kernels/cuda on this machine's CPU: compiled by g++ for the emulator, launched on numpy memory.

    library = Emulated(compile_kernels('#include "linear.cuh"\\nEDGE_KERNEL(...)'))
    library.launch("symbol", (blocks, 1, 1), record)

Libraries are kept under EDGE_EMULATION_CACHE (build/emulation by default), named by a hash of all that goes
into them. With EDGE_EMU_ASAN=1 kernels are compiled with AddressSanitizer; Python then needs
`asan_environment()`, and `python tests/cuda/emulation.py TESTS` runs pytest so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.engine.formats.c_header import c_header

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "cuda"
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
# a * b + c is rounded twice on every machine; kernels say fused() where they mean it
BASE = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
# Kernel libraries share no symbol with each other, whatever their statics are called
PRIVATE = ("-fvisibility=hidden", "-fno-gnu-unique")
ASAN = ("-O1", "-fsanitize=address", "-g1", "-fno-omit-frame-pointer")  # quicker to compile than -O2


class EmulationError(AssertionError):
    """A kernel broke a rule of CUDA that the emulator checks, or a guard byte changed."""


def cache_folder() -> Path:
    folder = Path(os.environ.get("EDGE_EMULATION_CACHE", ROOT / "build" / "emulation"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.lru_cache(1)
def compiler() -> tuple[str, str]:
    """Path and version of the C++ compiler; the test is skipped where there is none that knows _Float16."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("the emulator of cuda kernels needs g++ (apt-get install g++)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    half = "__fp16" if platform.machine() == "aarch64" else "_Float16"
    command = [found, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    probe = subprocess.run(command, input=f"{half} x;", text=True, capture_output=True)
    if probe.returncode:
        pytest.skip(
            f"the emulator of cuda kernels needs {half} (g++ 12 or newer), not {version.splitlines()[0]}"
        )
    return found, version


@functools.lru_cache(1)
def _cpu_flags() -> tuple[str, ...]:
    """Instructions that make the twins of cvt and fma fast; they change no result."""
    if platform.machine() != "x86_64":
        return ()
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return tuple(f"-m{name}" for name in ("f16c", "fma", "avx2") if name in words)


def asan_environment() -> dict[str, str]:
    """What a Python process needs in its environment to load libraries with AddressSanitizer."""
    found, _ = compiler()
    library = subprocess.run(
        [found, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer (apt-get install libasan8 or the like)")
    options = "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1"
    # libstdc++ beside it, or a C++ exception of another library is thrown before ASan knows its functions
    return {"LD_PRELOAD": library, "ASAN_OPTIONS": options, "EDGE_EMU_ASAN": "1"}


def _sources(source: str) -> dict[str, bytes]:
    """Files that a translation unit may include: those of the fake driver, or all others of kernels/cuda."""
    of_fake = '"emulator/fake_' in source
    files = sorted(p for p in KERNELS.rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))
    found = {
        str(p.relative_to(KERNELS)): p.read_bytes() for p in files if p.name.startswith("fake_") == of_fake
    }
    return found if of_fake else found | {"edge_formats.h": c_header().encode()}


def compile_cached(name: str, source: str, flags: tuple[str, ...], link: tuple[str, ...] = ()) -> Path:
    """Library of a translation unit, which may include files of kernels/cuda; from the cache if it is there.

    Raises EmulationError with the compiler's words if it does not compile.
    """
    found, version = compiler()
    command = [found, *BASE, *WARNINGS, *_cpu_flags(), *flags]
    digest = hashlib.sha256("\0".join([source, version, *command, *link]).encode())
    for path, text in _sources(source).items():
        digest.update(path.encode() + b"\0" + text)
    out = cache_folder() / f"{name}-{digest.hexdigest()[:24]}.so"
    if out.is_file():
        return out
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{name}-") as folder:
        unit, made = Path(folder, f"{name}.cpp"), Path(folder, out.name)
        unit.write_text(source)
        Path(folder, "edge_formats.h").write_text(c_header())
        parsed = () if '"emulator/fake_' in source else (f"-I{_parsed_emulator(tuple(command))}",)
        include = (*parsed, f"-I{KERNELS}", f"-I{folder}")
        done = subprocess.run(
            [*command, *include, str(unit), "-o", str(made), *link], capture_output=True, text=True
        )
        if done.returncode:
            raise EmulationError(f"{name} does not compile:\n{done.stderr[:6000]}")
        os.replace(made, out)  # whoever comes second replaces it by the same
    return out


@functools.lru_cache
def _parsed_emulator(command: tuple[str, ...]) -> Path:
    """A folder with emulator.h precompiled, which the compiler takes for what is compiled by this command."""
    digest = hashlib.sha256("\0".join([compiler()[1], *command]).encode())
    for path, text in _sources("").items():
        if path.startswith("emulator"):
            digest.update(path.encode() + b"\0" + text)
    folder = cache_folder() / f"parsed-{digest.hexdigest()[:24]}"
    out = folder / "emulator" / "emulator.h.gch"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        made = out.with_name(f"{out.name}.{os.getpid()}")
        header = (f"-I{KERNELS}", "-x", "c++-header", str(KERNELS / "emulator" / "emulator.h"))
        subprocess.run([*command, *header, "-o", str(made)], check=True, capture_output=True)
        os.replace(made, out)
    return folder


def sanitizing(asan: bool | None = None) -> tuple[str, ...]:
    """Flags of AddressSanitizer where it is wanted: as `asan` says, else EDGE_EMU_ASAN."""
    return ASAN if asan or (asan is None and os.environ.get("EDGE_EMU_ASAN") == "1") else ()


def compile_emulated(source: str, *, asan: bool | None = None) -> Path:
    """Emulated kernels of a translation unit of CUDA C++: `#include "x.cuh"` and EDGE_KERNEL lines.

    `asan`: with AddressSanitizer; by default as EDGE_EMU_ASAN says.
    """
    unit = f'#include "emulator/emulator.h"\nnamespace {{\n#line 1 "kernels.cu"\n{source}\n}}\n'
    flags = ("-DEDGE_EMULATE", "-DEDGE_EMU_UNNAMED", *PRIVATE, *sanitizing(asan))
    return compile_cached("kernels", unit, flags)


compile_kernels = compile_emulated


class Emulated:
    """A library of `compile_kernels`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def record_bytes(self, symbol: str) -> int:
        return self._number(ctypes.c_size_t, f"emu_size_{symbol}")

    def threads(self, symbol: str) -> int:
        return self._number(ctypes.c_uint, f"emu_threads_{symbol}")

    def _number(self, kind: Any, name: str) -> int:
        try:
            return int(kind.in_dll(self._library, name).value)
        except ValueError:
            raise EmulationError(f"{self.path.name} has no kernel {name.split('_', 2)[2]!r}") from None

    def launch(
        self,
        symbol: str,
        grid: int | tuple[int, ...],
        record: bytes | bytearray | ctypes.Structure,
        shared: int = 0,
    ) -> None:
        """Runs a kernel to its end. record: its argument record; shared: bytes of dynamic shared memory.

        Raises EmulationError for a record of another size, an unknown kernel and what the emulator finds.
        """
        data = bytes(record)
        if len(data) != (need := self.record_bytes(symbol)):
            raise EmulationError(f"{symbol} takes a record of {need} bytes, not {len(data)}")
        x, y, z = ((grid,) if isinstance(grid, int) else tuple(grid)) + (1,) * (
            2 if isinstance(grid, int) else 3 - len(grid)
        )
        run = getattr(self._library, f"emu_{symbol}")
        run.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p]
        run.restype = ctypes.c_char_p
        if (wrong := run(x, y, z, shared, data)) is not None:
            raise EmulationError(wrong.decode(errors="replace"))


# Bytes around guarded memory: NaN as f32 and as f16, a value out of all range as bf16
_GUARD = np.frombuffer(b"\xb1\xfe\xc3\xff", np.uint8)
_GUARD_BYTES = 4096


class Guarded:
    """Memory between two guards; `data` is (nbytes,) u8, aligned to 256 bytes, at first full of guard bytes.

    `view` gives it as another type and shape; `check` raises EmulationError if something wrote beside it.
    """

    def __init__(self, nbytes: int) -> None:
        tail = _GUARD_BYTES + (-nbytes) % 4
        self._memory = np.empty(_GUARD_BYTES + nbytes + tail + 256, np.uint8)
        start = -self._memory.ctypes.data % 256
        self._all = self._memory[start : start + _GUARD_BYTES + nbytes + tail]
        self._all[:] = np.resize(_GUARD, self._all.size)
        self.data = self._all[_GUARD_BYTES : _GUARD_BYTES + nbytes]
        if sanitizing():  # a read beside it is caught too
            poison = ctypes.CDLL(None)["__asan_poison_memory_region"]
            poison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            poison(self.address - _GUARD_BYTES, _GUARD_BYTES)
            poison(self.address + nbytes, tail)

    @classmethod
    def of(cls, array: np.ndarray) -> Guarded:
        """A guarded copy of an array's bytes."""
        made = cls(array.nbytes)
        made.data[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return made

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def view(self, dtype: Any, shape: int | tuple[int, ...] = -1) -> np.ndarray:
        return self.data.view(dtype).reshape(shape)

    def check(self) -> None:
        wanted = np.resize(_GUARD, self._all.size)
        wrong = np.flatnonzero(self._all != wanted)
        end = _GUARD_BYTES + self.data.size
        wrong = wrong[(wrong < _GUARD_BYTES) | (wrong >= end)]
        if wrong.size:
            raise EmulationError(
                f"{wrong.size} guard bytes were written: byte {int(wrong[0]) - _GUARD_BYTES} to "
                f"{int(wrong[-1]) - _GUARD_BYTES} of a buffer of {self.data.size}"
            )


def guarded(nbytes: int) -> Guarded:
    return Guarded(nbytes)


if os.environ.get("EDGE_KERNELS_ON") == "gpu":  # the same tests on a device
    from device_kernels import Emulated, Guarded, compile_kernels, guarded  # noqa: F401

if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **asan_environment()})
