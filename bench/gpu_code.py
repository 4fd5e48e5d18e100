"""Device code for the GPU of this machine, compiled when it is wanted and kept under build/gpu-check/code.

A check runs in several processes beside and after each other; a kernel set that one of them has compiled the
others find. On the fake GPU (EDGE_GPU_CHECK_EMULATED=1) the same sources are compiled for the emulator.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_runtime.backends.cuda.driver import DeviceFacts, device_facts
from edge_runtime.backends.protocol import DeviceCode
from edge_runtime.engine.device_code import Kernel, source
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry
from edge_runtime.engine.profile import capability_of
from edge_runtime.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("EDGE_GPU_CHECK_WORK", ROOT / "build" / "gpu-check"))
EMULATED = os.environ.get("EDGE_GPU_CHECK_EMULATED") == "1"
_KERNEL = re.compile(r"^EDGE_KERNEL(?:_EARLY)?\((\w+),\s*(\d+),", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel takes of the GPU: registers of a thread, bytes a block, bytes of spills a thread."""

    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """A loadable module, the CUDA release and PTX ISA it is of, its kernels, seconds that compiling took."""

    data: bytes
    cuda: str
    ptx: str
    kernels: dict[str, Usage]
    records: dict[str, int] = field(default_factory=dict)  # bytes of each kernel's argument record
    seconds: float = 0.0


class Compiler:
    """Makes modules for one GPU."""

    def __init__(self, facts: DeviceFacts) -> None:
        """Raises BuildError where no NVRTC lies here whose code the driver loads."""
        self.facts = facts
        self._nvrtc = None if EMULATED else _nvrtc(facts)

    @property
    def name(self) -> str:
        if self._nvrtc is None:
            return "g++, for the emulator"
        return f"NVRTC {self._nvrtc.cuda[0]}.{self._nvrtc.cuda[1]} ({self._nvrtc.path})"

    def image(self, text: str) -> Image:
        """A unit with EDGE_KERNEL lines as a module. Raises BuildError with the compiler's words."""
        return self._emulated(text) if self._nvrtc is None else self._compiled(text)

    def code(self, kernels: Sequence[Kernel]) -> DeviceCode:
        """As an engine carries it."""
        image = self.image(unit_of(kernels))
        name = f"device.sm_{self.facts.sm}.cubin"
        entry = DeviceCodeEntry(
            blob=name,
            kind="cubin",
            sm=self.facts.sm,
            ptx=image.ptx,
            cuda=image.cuda,
            nbytes=len(image.data),
            kernels={
                k.symbol: KernelEntry(
                    threads=k.threads, shared_bytes=image.kernels.get(k.symbol, Usage()).shared_bytes
                )
                for k in kernels
            },
        )
        return DeviceCode((entry,), {name: memoryview(image.data)}.__getitem__)

    def _compiled(self, text: str) -> Image:
        from builders.device_code import headers

        assert self._nvrtc is not None
        files = headers()
        words = [text, str(self._nvrtc.cuda), str(self.facts.sm), *files, *files.values()]
        stem = WORK / "code" / hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
        stem.parent.mkdir(parents=True, exist_ok=True)
        with _locked(stem.with_suffix(".lock")):
            if not stem.with_suffix(".json").is_file():
                began = time.perf_counter()
                made = self._nvrtc.compile(text, files, self.facts.sm)
                image = _described(made.cubin, made.ptx, made.log, self._nvrtc.cuda)
                stem.with_suffix(".cubin").write_bytes(made.cubin)
                about = {
                    "cuda": image.cuda,
                    "ptx": image.ptx,
                    "kernels": {name: asdict(usage) for name, usage in image.kernels.items()},
                    "records": image.records,
                    "seconds": time.perf_counter() - began,
                }
                stem.with_suffix(".json").write_text(json.dumps(about))  # last: marks it whole
        about = json.loads(stem.with_suffix(".json").read_text())
        about["kernels"] = {name: Usage(**usage) for name, usage in about["kernels"].items()}
        return Image(data=stem.with_suffix(".cubin").read_bytes(), **about)

    def _emulated(self, text: str) -> Image:
        from fake_cuda import add_module, cubin

        data = cubin(self.facts.sm, content=text.encode())
        began = time.perf_counter()
        add_module(Path(os.environ["EDGE_FAKE_MODULES"]), data, text)
        seconds = time.perf_counter() - began
        return Image(data, "12.6", "8.5", {name: Usage() for name in kernels_in(text)}, {}, seconds)


@functools.lru_cache(1)
def compiler() -> Compiler:
    return Compiler(device_facts())


def kernels_in(text: str) -> dict[str, int]:
    """symbol -> threads, of a translation unit's EDGE_KERNEL lines."""
    return {name: int(threads) for name, threads in _KERNEL.findall(text)}


def unit_of(kernels: Iterable[Kernel]) -> str:
    """The unit of these kernels. The emulator's compiler is slow, so there one serves all."""
    if not EMULATED:
        return source(kernels)
    from gpu_sizes import tiny_kernels

    wanted, all_of_them = list(kernels), tiny_kernels()
    known = {kernel.symbol for kernel in all_of_them}
    return source(all_of_them if all(k.symbol in known for k in wanted) else wanted)


def _nvrtc(facts: DeviceFacts):  # type: ignore[no-untyped-def]
    """The newest release that knows this GPU and that the driver is not older than."""
    from builders.nvrtc import OLDEST, find_compilers

    limit = capability_of(facts.driver)
    found = find_compilers()
    usable = [c for c in found if OLDEST <= c.cuda <= limit and facts.sm in c.sms]
    # Minor versions of one major are compatible: cubins of 13.1 load with a driver of 13.0
    usable = usable or [c for c in found if c.cuda[0] == limit[0] and facts.sm in c.sms]
    if usable:
        return max(usable, key=lambda c: c.cuda)
    here = ", ".join(f"{c.cuda[0]}.{c.cuda[1]} at {c.path}" for c in found) or "none"
    raise BuildError(
        f"no NVRTC for {facts} is here (found: {here}); it is libnvrtc.so of a CUDA toolkit or of the wheel "
        "nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12: make gpu-check WHEELS=folder"
    )


def _described(cubin: bytes, ptx: bytes, log: str, cuda: tuple[int, int]) -> Image:
    """What the compiler's log and PTX say of each kernel."""
    from builders.ptxas_report import read_report

    text = ptx.decode(errors="replace")
    version = re.search(r"^\.version (\d+\.\d+)$", text, re.MULTILINE)
    records = {
        name: int(size)
        for name, size in re.findall(r"\.entry (\w+)\(\s*\.param \.align \d+ \.b8 \w+\[(\d+)\]", text)
    }
    kernels = {
        name: Usage(u.registers, u.shared_bytes, u.spill_stores + u.spill_loads)
        for name, u in read_report(log).items()
    }
    return Image(cubin, f"{cuda[0]}.{cuda[1]}", version[1] if version else "0.0", kernels, records)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Of processes that want the same file one makes it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
