"""What this machine is: the profile behind `auto`, and how much memory a load may take right now.

Reads /proc, /sys and, through ctypes, the NVIDIA driver; needs no GPU library. `root` stands for "/".
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.engine.profile import (
    Compute,
    PowerMode,
    Profile,
    capability_of,
    list_profiles,
    load_profile,
)
from edge_runtime.errors import Unsupported

ROOT = Path("/")
_FEATURES = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
# Peak of one core in 1e12 operations per second, best feature first: (int8, f32). Measured on one server core
# at about 3 GHz for AMX, VNNI and f32 FMA; the rest scaled by vector width and multiplies per clock.
_CORE_RATES = {
    "amx_int8": (7.4, 0.21),
    "avx512_vnni": (0.94, 0.21),
    "avx_vnni": (0.4, 0.1),
    "avx2": (0.2, 0.1),
    "i8mm": (0.25, 0.05),
    "asimddp": (0.13, 0.05),
}
_PLAIN_CORE = (0.05, 0.02)


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver says of GPU 0. bandwidth_gbps (1e9 bytes/s) and clock_mhz are 0 where it is silent."""

    name: str
    total_bytes: int
    compute_capability: str
    integrated: bool
    multiprocessors: int
    clock_mhz: int
    bandwidth_gbps: float
    driver: str  # newest CUDA version that the driver runs, such as "12.6"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A probed machine. `notes` says, for a user, what was assumed or not known."""

    kind: str  # jetson | nvidia | cpu
    model: str
    profile: Profile
    memory_source: str
    cores: int
    features: tuple[str, ...]
    notes: tuple[str, ...] = ()


def available_memory(root: Path = ROOT) -> tuple[int, str]:
    """(bytes, source) that may be allocated now without swapping: least of MemAvailable and cgroup limits.

    `source` names the figure that was least. Not CUDA's figure: on unified memory that is MemFree, which
    leaves out the page cache. Raises Unsupported where there is no /proc/meminfo.
    """
    info = _meminfo(root)
    if "MemAvailable" in info:
        least = (info["MemAvailable"], "MemAvailable of /proc/meminfo")
    elif "MemFree" in info:  # kernels before 3.14
        cached = info.get("Cached", 0) + info.get("Buffers", 0)
        least = (info["MemFree"] + cached, "MemFree + Cached + Buffers of /proc/meminfo")
    else:
        raise Unsupported("free memory is not known: no /proc/meminfo; name a profile rather than auto")
    return min([least, *_cgroup_limits(root)])


def swap_used(root: Path = ROOT) -> int:
    """Bytes of swap in use; anything above 0 is worth a warning, as a swapped engine misses its deadlines."""
    info = _meminfo(root)
    return max(0, info.get("SwapTotal", 0) - info.get("SwapFree", 0))


def probe_machine(
    root: Path = ROOT, *, driver: Callable[[], Gpu | None] | None = None, measure: bool = True
) -> Machine:
    """The machine's profile: a Jetson by its device tree, else a GPU by its driver, else the CPU.

    measure: time a read of memory (at most 0.2 s) for the CPU profile's bandwidth. Raises Unsupported where
    free memory cannot be known.
    """
    notes: list[str] = []
    machine = _jetson(root, notes)
    if machine is None:
        gpu = (driver or query_driver)()
        machine = _nvidia(root, gpu, notes) if gpu is not None else _nvidia_by_name(root, notes)
    if machine is None:
        machine = _cpu(root, measure, notes)
    if swap_used(root):
        notes.append(f"{swap_used(root) >> 20} MiB of swap are in use")
    return msgspec.structs.replace(machine, notes=tuple(notes))


def query_driver() -> Gpu | None:
    """GPU 0 as libcuda describes it, without making a context; None when there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, number, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)) or number.value < 1:
            return None

        def attribute(key: int) -> int:
            failed = cuda.cuDeviceGetAttribute(ctypes.byref(number), key, device)
            return 0 if failed else max(0, number.value)

        name = ctypes.create_string_buffer(256)
        version = ctypes.c_int()
        if (
            cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetName(name, 256, device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
            or cuda.cuDriverGetVersion(ctypes.byref(version))
        ):
            return None
        # CUdevice_attribute: 13 clock kHz, 16 multiprocessors, 18 integrated, 36 memory clock kHz,
        # 37 bus bits, 75/76 compute capability
        return Gpu(
            name=name.value.decode("utf-8", "replace"),
            total_bytes=total.value,
            compute_capability=f"{attribute(75)}.{attribute(76)}",
            integrated=bool(attribute(18)),
            multiprocessors=attribute(16),
            clock_mhz=attribute(13) // 1000,
            bandwidth_gbps=2 * attribute(36) * attribute(37) / 8 / 1e6,
            driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )
    except (OSError, AttributeError):  # no library, or a stub without these symbols
        return None


def measure_bandwidth(cores: int, *, limit_s: float = 0.2, size: int = 128 << 20) -> float:
    """1e9 bytes/s of plain reads by `cores` threads (at most 16) over an array beyond most caches."""
    workers = max(1, min(cores, 16))
    data = np.empty(size // 8, np.int64)
    best, filled, step = 0.0, 0, 1 << 20
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        # the first touch of fresh pages is slow in some sandboxes: past half the time, 64 MiB must do
        while filled < data.size and (filled < data.size // 2 or time.perf_counter() - start < limit_s / 2):
            list(
                pool.map(
                    lambda at: data[at : at + step].fill(1), range(filled, filled + step * workers, step)
                )
            )
            filled = min(data.size, filled + step * workers)
        parts = np.array_split(data[:filled], workers)
        for turn in range(8):
            if turn >= 2 and time.perf_counter() - start > limit_s:
                break
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, filled * 8 / (time.perf_counter() - began) / 1e9)
    return best


def _jetson(root: Path, notes: list[str]) -> Machine | None:
    tree = ("proc/device-tree", "sys/firmware/devicetree/base")
    compatible = next(filter(None, (_read(root, f"{t}/compatible") for t in tree)), "")
    model = next(filter(None, (_read(root, f"{t}/model") for t in tree)), "").strip("\0\n ")
    release = re.search(r"# R(\d+)", _read(root, "etc/nv_tegra_release"))
    if "nvidia,tegra" not in compatible and "Jetson" not in model:
        return None  # also in a container that masks /sys/firmware: there the driver tells
    on_soc = [p for p in list_profiles() if p.detect.soc and p.detect.soc in compatible]
    if not on_soc:
        notes.append(f"{model or 'this Jetson'} is of a generation without a profile; planned for its CPU")
        return None
    profile = next((p for p in on_soc if any(m in compatible for m in p.detect.modules)), None)
    if profile is None:
        profile = _nearest_memory(on_soc, root)
        notes.append(f"module id not known; taken as {profile.name} by its SoC and memory")
    if release:  # L4T decides the newest CUDA
        driver = {35: "11.4", 36: "12.6", 38: "13.0", 39: "13.2"}.get(int(release[1]))
        profile = _with_driver(profile, driver) if driver else profile
    profile = _with_active_mode(profile, root, notes)
    return _machine("jetson", model or profile.title, _unified(profile, root), root)


def _with_active_mode(profile: Profile, root: Path, notes: list[str]) -> Profile:
    """The mode that nvpmodel has set becomes the default, with the GPU cap that its file gives."""
    status = re.search(r"pmode:0*(\d+)", _read(root, "var/lib/nvpmodel/status"))
    if status is None:
        notes.append(f"power mode not known; {profile.default_mode} assumed")
        return profile
    # ids differ from board to board, so only the name counts
    block = re.search(
        rf"< *POWER_MODEL +ID={status[1]} +NAME=(?:MODE_)?(\S+) *>([^<]*)", _read(root, "etc/nvpmodel.conf")
    )
    if block is None or block[1] not in profile.power_modes:
        name = block[1] if block else f"id {status[1]}"
        notes.append(f"power mode {name} is not in the profile; {profile.default_mode} assumed")
        return profile
    mode = profile.power_modes[block[1]]
    cap = re.search(r"^GPU\w* +MAX_FREQ +(\d{8,10})\b", block[2], re.MULTILINE)
    if cap and mode.gpu_mhz and int(cap[1]) // 1_000_000 not in (0, mode.gpu_mhz):
        mhz = int(cap[1]) // 1_000_000
        compute = _scaled(mode.compute, mhz / mode.gpu_mhz)
        mode = msgspec.structs.replace(mode, gpu_mhz=mhz, compute=compute)
    return msgspec.structs.replace(
        profile, default_mode=mode.mode_name, power_modes={**profile.power_modes, mode.mode_name: mode}
    )


def _nvidia(root: Path, gpu: Gpu, notes: list[str]) -> Machine | None:
    profiles = [p for p in list_profiles() if p.backend == "cuda" and p.memory.unified == gpu.integrated]
    bare = gpu.name.removeprefix("NVIDIA ").strip()
    profile = next((p for p in profiles if bare in p.detect.gpu_names), None)
    same = [p for p in profiles if p.compute_capability == gpu.compute_capability]
    if profile is None and gpu.integrated and same:  # a Jetson whose device tree is hidden
        profile = _nearest_memory(same, root)
        notes.append(f"device tree not readable; taken as {profile.name} by its GPU and memory")
    if profile is None:
        profile = _scaled_profile(profiles, gpu, notes)
        if profile is None:
            return None
    profile = _with_driver(profile, gpu.driver)
    if gpu.integrated:
        return _machine("nvidia", gpu.name, _unified(profile, root), root)
    memory = msgspec.structs.replace(profile.memory, total_bytes=gpu.total_bytes)
    profile = msgspec.structs.replace(profile, memory=memory, memory_source="total memory of the CUDA driver")
    return _machine("nvidia", gpu.name, profile, root)


def _scaled_profile(profiles: list[Profile], gpu: Gpu, notes: list[str]) -> Profile | None:
    """An unlisted GPU: the newest listed generation it covers, scaled by its own SMs, clock and bandwidth."""
    own = capability_of(gpu.compute_capability)
    older = [p for p in profiles if p.compute_capability and capability_of(p.compute_capability) <= own]
    if not older:
        notes.append(f"{gpu.name} (compute capability {gpu.compute_capability}) is too old for the kernels")
        return None
    base = max(older, key=lambda p: capability_of(p.compute_capability or "0.0"))
    mode = base.mode()
    if gpu.multiprocessors and gpu.clock_mhz and mode.tpcs and mode.gpu_mhz:
        ratio = gpu.multiprocessors * gpu.clock_mhz / (mode.tpcs * 2 * mode.gpu_mhz)
        mode = msgspec.structs.replace(mode, compute=_scaled(mode.compute, ratio), gpu_mhz=gpu.clock_mhz)
        mode = msgspec.structs.replace(mode, tpcs=max(1, gpu.multiprocessors // 2))
    if gpu.bandwidth_gbps:
        mode = msgspec.structs.replace(mode, bandwidth_gbps=gpu.bandwidth_gbps)
    notes.append(f"{gpu.name} has no profile; figures scaled from {base.name} by SMs, clock and bandwidth")
    return msgspec.structs.replace(
        base,
        name=re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")[:64] or "gpu",
        title=gpu.name or "GPU",
        aliases=(),
        compute_capability=gpu.compute_capability,
        default_mode=mode.mode_name,
        power_modes={mode.mode_name: mode},
    )


def _nvidia_by_name(root: Path, notes: list[str]) -> Machine | None:
    """Without libcuda, the kernel driver still names the GPU; its listed profile is taken as it stands."""
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        match = re.search(
            r"^Model:\s*(?:NVIDIA )?(.+?)\s*$", path.read_text("utf-8", "replace"), re.MULTILINE
        )
        for profile in list_profiles() if match else ():
            if match and match[1] in profile.detect.gpu_names:
                notes.append("libcuda.so.1 does not load; memory and CUDA version are the profile's")
                return _machine("nvidia", match[1], profile, root)
        notes.append(f"GPU {match[1] if match else 'without a name'}: libcuda.so.1 does not load; CPU used")
    return None


def _cpu(root: Path, measure: bool, notes: list[str]) -> Machine:
    profile = _unified(load_profile("cpu"), root)
    cores, features = _cores(root), _features(root)
    int8, floats = next((_CORE_RATES[f] for f in _CORE_RATES if f in features), _PLAIN_CORE)
    bandwidth = 0.0
    size = min(128 << 20, profile.memory.total_bytes // 16)
    if measure and size >= 16 << 20:
        bandwidth = measure_bandwidth(cores, size=size)
    if not bandwidth:
        notes.append("bandwidth not measured; the generic figure is used")
        bandwidth = profile.mode().bandwidth_gbps
    mode = PowerMode(
        mode_name=profile.default_mode,
        bandwidth_gbps=bandwidth,
        compute=Compute(int8=int8 * cores, fp16=floats * cores),
    )
    profile = msgspec.structs.replace(profile, power_modes={profile.default_mode: mode})
    model = re.search(r"^model name\s*:\s*(.+)$", _read(root, "proc/cpuinfo"), re.MULTILINE)
    return _machine("cpu", model[1] if model else profile.title, profile, root)


def _machine(kind: str, model: str, profile: Profile, root: Path) -> Machine:
    return Machine(
        kind=kind,
        model=model,
        profile=profile,
        memory_source=profile.memory_source,
        cores=_cores(root),
        features=_features(root),
    )


def _unified(profile: Profile, root: Path) -> Profile:
    """Total becomes what is free now. The OS is outside that figure already, so less is kept back."""
    free, source = available_memory(root)
    reserve = min(profile.memory.reserve_bytes, free // 8)
    memory = msgspec.structs.replace(profile.memory, total_bytes=free, reserve_bytes=reserve)
    return msgspec.structs.replace(profile, memory=memory, memory_source=source)


def newest_ptx(driver: str) -> str | None:
    """The newest PTX ISA that a driver of a CUDA release ("12.6") compiles: 7.x for 11.x, 9.x for 13.x.

    12.6 kept the 8.5 of 12.5. None before CUDA 11.
    """
    major, minor = capability_of(driver)
    if major < 11:
        return None
    return f"{major - 4}.{minor - 1 if major == 12 and minor > 5 else minor}"


def _with_driver(profile: Profile, driver: str) -> Profile:
    ptx = newest_ptx(driver)
    if profile.cuda is None or ptx is None:
        return profile
    return msgspec.structs.replace(
        profile, cuda=msgspec.structs.replace(profile.cuda, driver=driver, ptx=ptx)
    )


def _nearest_memory(profiles: list[Profile], root: Path) -> Profile:
    total = _meminfo(root).get("MemTotal", 0)
    return min(profiles, key=lambda p: abs(p.memory.total_bytes - total))


def _scaled(compute: Compute, ratio: float) -> Compute:
    return Compute(**{name: rate * ratio for name, rate in msgspec.structs.asdict(compute).items() if rate})


def _cgroup_limits(root: Path) -> Iterator[tuple[int, str]]:
    """What each memory limit on the way from this process's cgroup to the root still leaves."""
    own = {"v2": "/", "v1": "/"}
    for line in _read(root, "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            own["v2"] = path
        elif "memory" in controllers.split(","):
            own["v1"] = path
    for version, mount, limits, used, cache in (
        ("v2", "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (
            "v1",
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes",),
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        parts = [
            part for part in own[version].split("/") if part and part != ".."
        ]  # ".." leads out of the mount
        for depth in range(len(parts), -1, -1):
            folder = "/".join([mount, *parts[:depth]])
            usage = _number(root, f"{folder}/{used}")
            stat = re.search(rf"^{cache} (\d+)$", _read(root, f"{folder}/memory.stat"), re.MULTILINE)
            reclaimable = min(int(stat[1]), usage) if stat and usage else 0
            for name in limits:
                limit = _number(root, f"{folder}/{name}")
                if limit is not None:
                    left = max(0, limit - (usage or 0) + reclaimable)
                    yield left, f"cgroup {version} {name} of /{'/'.join(parts[:depth])} less what is in use"


def _cores(root: Path) -> int:
    count = (
        len(re.findall(r"^processor\s*:", _read(root, "proc/cpuinfo"), re.MULTILINE)) or os.cpu_count() or 1
    )
    if root == ROOT and hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    quota = _read(root, "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, count)


def _features(root: Path) -> tuple[str, ...]:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(root, "proc/cpuinfo"), re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return tuple(f for f in _FEATURES if f in present)


def _meminfo(root: Path) -> dict[str, int]:
    rows = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root, "proc/meminfo"), re.MULTILINE)
    return {key: int(value) * 1024 for key, value in rows}


def _number(root: Path, path: str) -> int | None:
    text = _read(root, path).strip()
    return int(text) if text.isdigit() and len(text) < 20 else None  # "max" means no limit


def _read(root: Path, path: str) -> str:
    """The text of a pseudo-file, "" when it is absent or not ours to read."""
    try:
        return (root / path).read_text("utf-8", "replace")
    except OSError:
        return ""
