"""Probing fake machines: Jetsons by device tree, GPUs by a fake driver, CPUs, and every memory limit."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.engine import probe
from edge_runtime.engine.probe import Gpu, available_memory, measure_bandwidth, probe_machine, swap_used
from edge_runtime.engine.profile import load_profile
from edge_runtime.errors import Unsupported

GIB = 1 << 30
X86 = "processor\t: 0\nmodel name\t: Toy CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def meminfo(total: int, free: int, available: int | None, swap: int = 0) -> str:
    text = f"MemTotal:       {total >> 10} kB\nMemFree:        {free >> 10} kB\n"
    if available is not None:
        text += f"MemAvailable:   {available >> 10} kB\n"
    return (
        text + f"Cached:  1024 kB\nSwapTotal:  {2 * GIB >> 10} kB\nSwapFree:  {(2 * GIB - swap) >> 10} kB\n"
    )


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def jetson(root: Path, ids: str, model: str, total: int, **more: str) -> Path:
    files = {
        "proc/device-tree/compatible": ids.replace(" ", "\0") + "\0",
        "sys/firmware/devicetree/base/model": model + "\0",
        "proc/meminfo": meminfo(total, total // 10, total // 2),
        "proc/cpuinfo": ARM,
    }
    return tree(root, files | {k.replace("__", "/"): v for k, v in more.items()})


def no_driver() -> None:
    return None


CONF = """< PARAM TYPE=CLOCK NAME=GPU >
< POWER_MODEL ID=0 NAME=15W >
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
< PM_CONFIG DEFAULT=1 >
"""


def test_orin_nano(tmp_path: Path) -> None:
    root = jetson(
        tmp_path,
        "nvidia,p3768-0000+p3767-0005-super nvidia,p3767-0005 nvidia,tegra234",
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        7619 << 20,
    )
    tree(root, {"etc/nvpmodel.conf": CONF, "var/lib/nvpmodel/status": "pmode:0002\n"})
    tree(root, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n"})
    machine = probe_machine(root, driver=no_driver)
    assert machine.kind == "jetson" and machine.profile.name == "orin-nano-8gb"
    assert machine.model.endswith("Kit Super")
    assert machine.profile.mode().mode_name == "MAXN_SUPER" and machine.profile.mode().gpu_mhz == 1020
    # MemFree is a tenth and MemAvailable a half of it all: the second counts
    assert machine.profile.memory.total_bytes == (7619 << 20) // 2 // 1024 * 1024
    assert "MemAvailable" in machine.memory_source == machine.profile.memory_source
    assert machine.profile.memory_available() > (7619 << 20) // 3
    assert machine.profile.cuda is not None and machine.profile.cuda.driver == "12.6"
    assert machine.features == ("asimddp", "i8mm") and machine.notes == ()


@pytest.mark.parametrize(
    ("ids", "total", "name"),
    [
        ("nvidia,p3767-0004 nvidia,tegra234", 3420 << 20, "orin-nano-4gb"),
        ("nvidia,p3767-0001-super nvidia,tegra234", 7619 << 20, "orin-nx-8gb"),
        ("nvidia,p3767-0000 nvidia,tegra234", 15 * GIB, "orin-nx-16gb"),
        ("nvidia,p3737-0000+p3701-0004 nvidia,tegra234", 30 * GIB, "orin-agx-32gb"),
        ("nvidia,p3737-0000+p3701-0005 nvidia,p3701-0005 nvidia,tegra234", 61 * GIB, "orin-agx-64gb"),
        ("nvidia,p4071-0000+p3834-0008 nvidia,p3834-0008 nvidia,tegra264", 122 * GIB, "thor-t5000"),
        ("nvidia,p4071-0000+p3834-0000 nvidia,tegra264", 59 * GIB, "thor-t4000"),
        ("acme,carrier nvidia,tegra234", 60 * GIB, "orin-agx-64gb"),
        ("acme,carrier nvidia,tegra264", 60 * GIB, "thor-t4000"),
    ],
)
def test_jetson_modules(tmp_path: Path, ids: str, total: int, name: str) -> None:
    machine = probe_machine(jetson(tmp_path, ids, "NVIDIA Jetson", total), driver=no_driver)
    assert machine.profile.name == name
    assert any("power mode not known" in note for note in machine.notes)
    assert ("acme" in ids) == any("module id not known" in note for note in machine.notes)


def test_nvpmodel_names_and_caps(tmp_path: Path) -> None:
    root = jetson(tmp_path, "nvidia,p3834-0008 nvidia,tegra264", "NVIDIA Jetson AGX Thor", 122 * GIB)
    conf = "< POWER_MODEL ID=1 NAME=120W >\nGPU MAX_FREQ 1200000000\n< POWER_MODEL ID=3 NAME=ODD >\n"
    tree(root, {"etc/nvpmodel.conf": conf, "var/lib/nvpmodel/status": "pmode:0001"})
    tree(root, {"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0\n"})
    mode = probe_machine(root, driver=no_driver).profile.mode()
    listed = load_profile("thor").mode("120W")
    assert mode.gpu_mhz == 1200 and listed.gpu_mhz is not None
    assert mode.compute.int8 == pytest.approx(listed.compute.int8 * 1200 / listed.gpu_mhz)
    cuda = probe_machine(root, driver=no_driver).profile.cuda
    assert cuda is not None and (cuda.driver, cuda.ptx) == ("13.2", "9.2")
    tree(root, {"var/lib/nvpmodel/status": "pmode:0003"})
    machine = probe_machine(root, driver=no_driver)
    assert machine.profile.mode().mode_name == "120W"
    assert "power mode ODD is not in the profile; 120W assumed" in machine.notes
    tree(
        root,
        {"etc/nvpmodel.conf": conf.replace("120W", "MODE_120W"), "var/lib/nvpmodel/status": "pmode:0001"},
    )
    assert probe_machine(root, driver=no_driver).notes == ()


def test_old_jetson_is_a_cpu(tmp_path: Path) -> None:
    root = jetson(tmp_path, "nvidia,p2972-0000 nvidia,tegra194", "Jetson-AGX", 16 * GIB)
    machine = probe_machine(root, driver=no_driver, measure=False)
    assert machine.kind == "cpu" and "Jetson-AGX is of a generation without a profile" in machine.notes[0]


def gpu(**changes: Any) -> Gpu:
    base: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 3090",
        "total_bytes": 24 * GIB,
        "compute_capability": "8.6",
        "integrated": False,
        "multiprocessors": 82,
        "clock_mhz": 1695,
        "bandwidth_gbps": 936.0,
        "driver": "12.9",
    }
    return Gpu(**base | changes)


def pc(root: Path) -> Path:
    return tree(root, {"proc/meminfo": meminfo(16 * GIB, GIB, 8 * GIB), "proc/cpuinfo": X86})


def test_listed_gpu(tmp_path: Path) -> None:
    machine = probe_machine(pc(tmp_path), driver=gpu)
    assert (machine.kind, machine.profile.name) == ("nvidia", "rtx-3090")
    assert machine.profile.memory.total_bytes == 24 * GIB and "driver" in machine.memory_source
    assert machine.profile.cuda is not None and machine.profile.cuda.ptx == "8.8"


def test_unlisted_gpu_is_scaled(tmp_path: Path) -> None:
    found = gpu(name="NVIDIA GeForce RTX 4060", compute_capability="8.9", multiprocessors=24, clock_mhz=2460)
    machine = probe_machine(pc(tmp_path), driver=lambda: found)
    profile = machine.profile
    assert profile.name == "nvidia-geforce-rtx-4060" and profile.compute_capability == "8.9"
    assert profile.mode().compute.int8 == pytest.approx(24 * 2.46 * 2.048, rel=0.01)
    assert profile.mode().bandwidth_gbps == 936.0 and profile.supports("fp8")
    assert "scaled from rtx-4090" in machine.notes[0]


def test_gpu_too_old_falls_back_to_the_cpu(tmp_path: Path) -> None:
    found = gpu(name="NVIDIA T4", compute_capability="7.5")
    machine = probe_machine(pc(tmp_path), driver=lambda: found, measure=False)
    assert machine.kind == "cpu" and "too old" in machine.notes[0]


def test_jetson_in_a_container_without_device_tree(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": meminfo(7619 << 20, GIB, 4 * GIB), "proc/cpuinfo": ARM})
    found = gpu(name="Orin", compute_capability="8.7", integrated=True, total_bytes=7619 << 20)
    machine = probe_machine(root, driver=lambda: found)
    assert machine.profile.name in {"orin-nano-8gb", "orin-nx-8gb"}
    assert machine.profile.memory.total_bytes == 4 * GIB  # MemAvailable, not the driver's figure
    assert "device tree not readable" in machine.notes[0]


def test_gpu_by_name_when_libcuda_is_missing(tmp_path: Path) -> None:
    where = "proc/driver/nvidia/gpus/0000:01:00.0/information"
    root = tree(pc(tmp_path), {where: "Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 5\n"})
    assert probe_machine(root, driver=no_driver).profile.name == "rtx-3060"
    tree(root, {where: "Model: \t\t NVIDIA Mystery\n"})
    machine = probe_machine(root, driver=no_driver, measure=False)
    assert machine.kind == "cpu" and "GPU Mystery: libcuda" in machine.notes[0]


def test_cpu(tmp_path: Path) -> None:
    machine = probe_machine(pc(tmp_path), driver=no_driver, measure=False)
    assert machine.kind == "cpu" and machine.model == "Toy CPU" and machine.cores == 2
    assert machine.features == ("avx2", "avx512_vnni")
    profile = machine.profile
    assert profile.packing == "n16k4" and profile.mode().compute.int8 == pytest.approx(1.88)
    assert profile.memory.total_bytes == 8 * GIB and profile.memory.reserve_bytes == GIB
    tree(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})
    assert probe_machine(tmp_path, driver=no_driver, measure=False).cores == 1


def test_bandwidth_is_measured_quickly() -> None:
    start = time.perf_counter()
    assert 0.5 < measure_bandwidth(2) < 5000
    assert time.perf_counter() - start < 3  # 0.2 s of a quiet machine


def test_auto_on_this_machine() -> None:
    profile = load_profile("auto")
    assert profile.memory_available() > 0 and profile.memory_source != "profile"


def test_memory_low_free_high_available(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": meminfo(8 * GIB, GIB // 4, 5 * GIB)})
    assert available_memory(root) == (5 * GIB, "MemAvailable of /proc/meminfo")
    tree(root, {"proc/meminfo": meminfo(8 * GIB, GIB, None)})
    size, source = available_memory(root)
    assert size == GIB + (1 << 20) and source.startswith("MemFree")


def test_cgroup_v2_least_of_the_chain_wins(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": meminfo(8 * GIB, GIB, 5 * GIB),
            "proc/self/cgroup": "0::/robot/brain\n",
            "sys/fs/cgroup/robot/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/robot/memory.high": "max\n",
            "sys/fs/cgroup/robot/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/robot/memory.stat": f"anon 5\nactive_file 7\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/robot/brain/memory.max": "max\n",
            "sys/fs/cgroup/robot/brain/memory.current": f"{GIB}\n",
        },
    )
    size, source = available_memory(root)
    assert size == GIB + GIB // 2 and source.startswith("cgroup v2 memory.max of /robot ")
    tree(root, {"sys/fs/cgroup/robot/brain/memory.high": str(GIB + 5)})
    assert available_memory(root)[0] == 5
    tree(root, {"sys/fs/cgroup/robot/brain/memory.high": str(GIB - 5)})
    assert available_memory(root)[0] == 0  # over the limit is nothing, not less


def test_cgroup_v2_container_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/memory.max": str(GIB)}
    root = tree(tmp_path / "m", files | {"proc/meminfo": meminfo(8 * GIB, GIB, 5 * GIB)})
    tree(tmp_path, {"memory.max": "1"})  # outside the mount
    assert available_memory(root) == (GIB, "cgroup v2 memory.max of / less what is in use")


def test_cgroup_v1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": meminfo(8 * GIB, GIB, 5 * GIB),
            "proc/self/cgroup": "4:cpu,memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",  # no limit
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert available_memory(root)[1].startswith("MemAvailable")
    tree(root, {"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(2 * GIB)})
    tree(root, {"sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": str(GIB)})
    tree(root, {"sys/fs/cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {GIB // 4}\n"})
    size, source = available_memory(root)
    assert size == GIB + GIB // 4 and source.startswith("cgroup v1 memory.limit_in_bytes of /docker/abc ")


def test_swap_is_reported(tmp_path: Path) -> None:
    root = pc(tmp_path)
    assert swap_used(root) == 0
    tree(root, {"proc/meminfo": meminfo(16 * GIB, GIB, 8 * GIB, swap=512 << 20)})
    assert swap_used(root) == 512 << 20
    assert "512 MiB of swap are in use" in probe_machine(root, driver=no_driver, measure=False).notes


def test_no_meminfo_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="name a profile"):
        available_memory(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "\0\0\0", "MemAvailable: lots kB\n", "0::" * 100, "MemAvailable:  5 kB\n"]
)
def test_odd_proc_files_raise_only_typed_errors(tmp_path: Path, text: str) -> None:
    names = ("proc/meminfo", "proc/self/cgroup", "sys/fs/cgroup/memory.max", "sys/fs/cgroup/cpu.max")
    root = tree(tmp_path, dict.fromkeys((*names, "proc/cpuinfo", "proc/device-tree/compatible"), text))
    try:
        assert probe_machine(root, driver=no_driver, measure=False).cores >= 1
    except Unsupported:
        assert "MemAvailable:  5" not in text


class FakeCuda:
    """The seven calls of libcuda that are used, for one H200."""

    attributes = {13: 1_980_000, 16: 132, 18: 0, 36: 3_201_000, 37: 6144, 75: 9, 76: 0}  # noqa: RUF012
    fails = ""

    def __getattr__(self, name: str) -> Any:
        if name == self.fails:
            return lambda *_: 100
        return getattr(self, f"do_{name}")

    def do_cuInit(self, flags: int) -> int:
        return 0

    def do_cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = 1
        return 0

    def do_cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def do_cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA H200"
        return 0

    def do_cuDeviceTotalMem_v2(self, out: Any, device: Any) -> int:
        out._obj.value = 140 * GIB
        return 0

    def do_cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13020
        return 0

    def do_cuDeviceGetAttribute(self, out: Any, key: int, device: Any) -> int:
        out._obj.value = self.attributes[key]
        return 0


def test_driver_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda())
    found = probe.query_driver()
    assert found is not None and found.name == "NVIDIA H200" and found.compute_capability == "9.0"
    assert found.total_bytes == 140 * GIB and found.driver == "13.2" and found.multiprocessors == 132
    assert found.bandwidth_gbps == pytest.approx(4917, rel=0.01)
    assert probe_machine(pc(tmp_path)).profile.name == "h200"


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2"])
def test_driver_failure_is_no_gpu(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fake = FakeCuda()
    fake.fails = call
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    assert probe.query_driver() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a stub without symbols
    assert probe.query_driver() is None
