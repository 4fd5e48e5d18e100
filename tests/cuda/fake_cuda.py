"""A machine with a GPU that is none: the fake libcuda.so.1, in this process or for others, and its modules.

    fake = load_fake()                    # before anything of cuda.bindings.driver is called
    add_module(folder, image, source)     # what a cubin or PTX runs as
    ... the real driver code ...
    assert fake.count("cuGraphLaunch") == 1 and fake.check() == ""

The fake shows no GPU unless EDGE_FAKE_DEVICES says so (kernels/cuda/emulator/fake_device.h has all settings):
the fixture `fake_gpu` of conftest.py sets it for one test, and `environment` for another process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path

from emulation import cache_folder, compile_cached, compile_emulated, sanitizing

SONAME = "libcuda.so.1"


@functools.lru_cache(1)
def fake_driver() -> Path:
    """The fake's library; whoever loads it by this path in one process shares it."""
    link = (f"-Wl,-soname,{SONAME}", "-ldl", "-pthread")
    return compile_cached("libcuda", '#include "emulator/fake_driver.cpp"', sanitizing(), link)


@functools.lru_cache(1)
def fake_folder() -> Path:
    """A folder for LD_LIBRARY_PATH with the fake in it as libcuda.so.1."""
    made = fake_driver()
    folder = cache_folder() / made.stem
    folder.mkdir(exist_ok=True)
    link = folder / f"{SONAME}.{os.getpid()}"
    link.symlink_to(made)
    os.replace(link, folder / SONAME)
    return folder


def environment(modules: Path | None = None, **settings: object) -> dict[str, str]:
    """The environment of a process that shall see the fake GPU. settings: EDGE_FAKE_*, by last words."""
    path = os.environ.get("LD_LIBRARY_PATH")
    made = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join([str(fake_folder()), *([path] if path else [])]),
        "EDGE_FAKE_DEVICES": "1",
    }
    if modules is not None:
        made["EDGE_FAKE_MODULES"] = str(modules)
    return made | {f"EDGE_FAKE_{name.upper()}": str(value) for name, value in settings.items()}


def image_hash(image: bytes) -> str:
    """FNV-1a 64 of a module image, as the fake names its modules; PTX without the NUL at its end."""
    value = 0xCBF29CE484222325
    for byte in image.rstrip(b"\0") if not image.startswith(b"\x7fELF") else image:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def add_module(folder: Path, image: bytes, source: str, *, asan: bool | None = None) -> Path:
    """Let an image (cubin or PTX) run as `source` compiled for the emulator. folder: EDGE_FAKE_MODULES."""
    path = folder / f"{image_hash(image)}.so"
    made = compile_emulated(source, asan=asan)
    copy = folder / f"{path.name}.{os.getpid()}"
    copy.symlink_to(made)
    os.replace(copy, path)
    return path


def cubin(sm: int = 87, *, cuda: int = 12, content: bytes = b"") -> bytes:
    """The head of a cubin made by CUDA 12 or 13 for `sm`: what the fake reads; `content` tells it apart."""
    osabi, abi, flags = (65, 8, 0x6000004 | sm << 8) if cuda >= 13 else (51, 7, sm | 0x500 | sm << 16)
    ident = b"\x7fELF" + bytes((2, 1, 1, osabi, abi)) + bytes(7)
    end = 64 + len(content)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, end, end, flags, 64, 56, 0, 64, 0, 0) + content


def ptx(sm: int = 87, version: str = "8.5", content: str = "") -> bytes:
    """PTX that the fake can read, with the NUL at its end."""
    return f".version {version}\n.target sm_{sm}\n.address_size 64\n{content}\n\0".encode()


class FakeCuda:
    """The fake in this process: what it counted and found, failures to come."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.edge_fake_count.restype = ctypes.c_uint64
        self._library.edge_fake_count.argtypes = [ctypes.c_char_p]
        self._library.edge_fake_fault.restype = ctypes.c_char_p
        self._library.edge_fake_fail.restype = ctypes.c_bool
        self._library.edge_fake_fail.argtypes = [ctypes.c_char_p]
        self._library.edge_fake_used.restype = ctypes.c_size_t

    def count(self, name: str) -> int:
        """Calls of an API function since `reset`, such as "cuGraphLaunch"; or one of fake_symbols.h's words:
        "kernels", "kernel <symbol>", "syncs", "HtoD", "DtoH", "DtoD", "HtoD bytes" and so on,
        "fills", "leaked allocations"."""
        return int(self._library.edge_fake_count(name.encode()))

    def check(self) -> str:
        """What the guards around allocations and the poison of freed ones have to say; "" if all is well."""
        return self.fault if self._library.edge_fake_check() else ""

    @property
    def fault(self) -> str:
        """The fault that the context has had, "" for none; stays known after the context's end."""
        return bytes(self._library.edge_fake_fault()).decode(errors="replace")

    def fail(self, plan: str) -> None:
        """plan: "function:n:code,...": the n-th call from now gives that error. "" plans none."""
        if not self._library.edge_fake_fail(plan.encode()):
            raise ValueError(f"{plan!r} is not function:n:code,...")

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self._library.edge_fake_used())

    def reset(self) -> None:
        """As in a new process. What the API gave out before must not be used any more."""
        self._library.edge_fake_reset()


@functools.lru_cache(1)
def load_fake() -> FakeCuda:
    """Load the fake into this process, where cuda.bindings then finds it by its SONAME."""
    return FakeCuda(fake_driver())
