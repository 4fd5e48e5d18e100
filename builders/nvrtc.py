"""NVRTC, NVIDIA's compiler of device code, by ctypes: found, chosen for a device, run in memory.

It needs neither a CUDA toolkit nor a GPU. Every release that lies here is found: of the pip wheels
nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc (torch brings one of them too), else of the system.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.engine.profile import Profile, capability_of
from edge_runtime.errors import BuildError, Unsupported

OLDEST = (12, 4)  # release that the kernels compile with
WHEELS = {  # that this project is tested with
    (12, 6): "nvidia-cuda-nvrtc-cu12==12.6.85",
    (12, 9): "nvidia-cuda-nvrtc-cu12==12.9.86",
    (13, 0): "nvidia-cuda-nvrtc==13.0.88",
}
# The first release that knows an sm, where that is not the oldest
_FIRST = {100: (12, 8), 101: (12, 8), 120: (12, 8), 103: (12, 9), 121: (12, 9), 88: (13, 0), 110: (13, 0)}
_BAD_SOURCE = 6  # NVRTC_ERROR_COMPILATION
_LOG = 4000  # bytes of the compiler's words that a message repeats
_SYSTEM = (
    "/usr/local/cuda*/lib64",
    "/usr/local/cuda*/targets/*/lib",
    "/usr/lib/*-linux-gnu",
    "/usr/lib64",
    "/opt/cuda/lib64",
)
_OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # of lambdas
    "--fmad=false",  # a * b + c is rounded twice, as in the emulator; kernels say fused() where they mean it
    "--no-source-include",  # no header of the folder that the build happens to run in
    "--ptxas-options=-v",
)
Cuda = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code for one sm, the PTX it was made from (ending with a NUL), and the compiler's words."""

    cubin: bytes
    ptx: bytes
    log: str


@dataclass(frozen=True)
class Nvrtc:
    """One release of the compiler: `cuda` such as (12, 6), `sms` such as 87 that it makes code for."""

    path: Path
    cuda: Cuda
    sms: tuple[int, ...]
    _library: ctypes.CDLL = field(repr=False, compare=False)

    def compile(
        self, source: str, headers: Mapping[str, str], sm: int, options: Sequence[str] = ()
    ) -> Compiled:
        """Compile one translation unit with these headers (name -> text) and no others.

        The log tells registers, shared memory and spills of every kernel. Raises Unsupported for an sm that
        this release does not know, BuildError with the compiler's words for anything it refuses.
        """
        if sm not in self.sms:
            known = ", ".join(map(str, self.sms))
            raise Unsupported(f"NVRTC {release(self.cuda)} makes no code for sm_{sm}; it knows {known}")
        # sm_ and not compute_: the PTX is the same, and there is a cubin besides
        words = [f"--gpu-architecture=sm_{sm}", *_OPTIONS]
        call = self._library
        program = ctypes.c_void_p()
        names = _texts(headers)
        self._check(
            call.nvrtcCreateProgram(
                ctypes.byref(program),
                source.encode(),
                b"edge.cu",
                len(headers),
                _texts(headers.values()),
                names,
            ),
            "create a program",
        )
        try:
            words += options
            failed = call.nvrtcCompileProgram(program, len(words), _texts(words))
            log = self._result(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if failed:
                self._refuse(failed, sm, log)
            return Compiled(self._result(program, "CUBIN"), self._result(program, "PTX"), log)
        finally:
            call.nvrtcDestroyProgram(ctypes.byref(program))

    def _result(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        measure, give = (getattr(self._library, f"nvrtcGet{what}{end}") for end in ("Size", ""))
        self._check(measure(program, ctypes.byref(size)), f"tell the size of {what}")
        buffer = ctypes.create_string_buffer(size.value)
        self._check(give(program, buffer), f"give {what}")
        return buffer.raw

    def _refuse(self, failed: int, sm: int, log: str) -> None:
        said = log if len(log) <= _LOG else log[:_LOG] + " …"
        why = "refuses the device code" if failed == _BAD_SOURCE else f"fails ({self._reason(failed)})"
        raise BuildError(f"NVRTC {release(self.cuda)} {why} for sm_{sm}:\n{said.strip()}")

    def _check(self, failed: int, what: str) -> None:
        if failed:
            raise BuildError(f"{self.path} cannot {what}: {self._reason(failed)}")

    def _reason(self, failed: int) -> str:
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        text: bytes = self._library.nvrtcGetErrorString(failed)
        return text.decode(errors="replace")


def release(cuda: Cuda) -> str:
    """(12, 6) as people write it."""
    return f"{cuda[0]}.{cuda[1]}"


def sm_of(profile: Profile) -> int:
    """The profile's sm as its driver names it: Thor (11.0) is sm_101 before CUDA 13.0, and neither loads what
    is made for the other. Raises Unsupported."""
    if profile.sm is None:
        raise Unsupported(f"profile {profile.name!r} is no GPU; device code is for backend cuda")
    return 101 if profile.sm == 110 and limit_of(profile) < (13, 0) else profile.sm


def compiler_for(profile: Profile, found: Sequence[Nvrtc] | None = None) -> Nvrtc:
    """The newest of the compilers (default: all that are here) whose code the profile's driver loads.

    Raises BuildError that names the wheel to install when there is none, Unsupported when there cannot be
    one.
    """
    found = find_compilers() if found is None else found
    limit, sm = limit_of(profile), sm_of(profile)
    usable = [c for c in found if OLDEST <= c.cuda <= limit and sm in c.sms]
    if usable:
        return max(usable, key=lambda c: c.cuda)
    first = _FIRST.get(sm, OLDEST)
    if first > limit:
        raise Unsupported(
            f"profile {profile.name!r}: code for sm_{sm} needs CUDA {release(first)}, and cuda.driver says "
            f"that the device loads no newer than {release(limit)}"
        )
    wheels = [wheel for cuda, wheel in sorted(WHEELS.items()) if first <= cuda <= limit]
    package = "nvidia-cuda-nvrtc" if limit >= (13, 0) else f"nvidia-cuda-nvrtc-cu{limit[0]}"
    wheel = wheels[-1] if wheels else f"{package}=={release(limit)}.*"
    here = ", ".join(f"{release(c.cuda)} ({c.path})" for c in found) or "none"
    raise BuildError(
        f"device code for profile {profile.name!r} (sm_{sm}) needs NVRTC of CUDA {release(first)} to "
        f"{release(limit)}; here: {here}. Install it with: pip install '{wheel}', or build with "
        "--no-device-code"
    )


def limit_of(profile: Profile) -> Cuda:
    """Newest CUDA whose code the device loads. Raises Unsupported for a profile without one."""
    if profile.cuda is None:
        raise Unsupported(f"profile {profile.name!r} has no cuda; device code is for backend cuda")
    return capability_of(profile.cuda.driver)


@functools.cache
def find_compilers() -> tuple[Nvrtc, ...]:
    """One of each release that lies here and can be loaded, newest first; those of wheels before others."""
    found: dict[Cuda, Nvrtc] = {}
    seen: set[Path] = set()
    for folder in _folders():
        for path in sorted(folder.glob("libnvrtc.so.*")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            compiler = open_compiler(path)
            if compiler is not None:
                found.setdefault(compiler.cuda, compiler)
    return tuple(found[cuda] for cuda in sorted(found, reverse=True))


def open_compiler(path: Path) -> Nvrtc | None:
    """The compiler in that library; None when it cannot be loaded or is older than its own list of sm."""
    try:
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and the loader finds only what is loaded
        library = ctypes.CDLL(str(path))
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        failed = failed or library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        sms = (ctypes.c_int * count.value)()
        failed = failed or library.nvrtcGetSupportedArchs(sms)
    except (OSError, AttributeError):
        return None
    return None if failed else Nvrtc(path, (major.value, minor.value), tuple(sms), library)


def _folders() -> Iterator[Path]:
    """Where the library may lie: wheels of any release, then toolkits, then the system."""
    spec = importlib.util.find_spec("nvidia")  # a namespace: each wheel adds its folder
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(place).glob("*/lib"))
    yield Path(sys.prefix) / "lib"  # conda
    for pattern in _SYSTEM:
        yield from sorted(Path("/").glob(pattern.lstrip("/")))


def _texts(items: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [item.encode() for item in items]
    return (ctypes.c_char_p * len(encoded))(*encoded)
