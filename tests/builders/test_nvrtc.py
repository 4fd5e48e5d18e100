"""NVRTC in memory: real compilations for every sm of the profiles, the choice of a release, what it says."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from builders import nvrtc
from builders.cubin import read_cubin
from builders.nvrtc import Nvrtc, compiler_for, find_compilers, open_compiler
from builders.ptxas_report import Usage, read_report
from edge_runtime.engine.profile import CudaLimit, Profile, list_profiles, load_profile
from edge_runtime.errors import BuildError, Unsupported

ROOT = Path(__file__).resolve().parents[2]
HEADERS = {"scale.h": "#define SCALE 3.0f\n"}
SOURCE = """\
#include "scale.h"
extern "C" __global__ void __launch_bounds__(64) shared(const float* x, float* y) {
    __shared__ float rows[256];
    rows[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = rows[63 - threadIdx.x] * SCALE;
}
extern "C" __global__ void __launch_bounds__(1024, 1) crowded(const float* x, float* y, int n) {
    float v[80];
    for (int i = 0; i < 80; i++) v[i] = x[i * 1024 + threadIdx.x];
    for (int r = 0; r < n; r++)
        for (int i = 0; i < 80; i++) v[i] = v[i] * v[(i + 7) % 80] + x[r];
    for (int i = 0; i < 80; i++) y[i * 1024 + threadIdx.x] = v[i];
}
"""
COMPILERS = find_compilers()
PROFILES = {p.name: p for p in list_profiles() if p.backend == "cuda"}
SMS = sorted({p.sm for p in PROFILES.values() if p.sm is not None})
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no NVRTC here: pip install '.[device-code]'")


def compiler_of(sm: int) -> Nvrtc:
    usable = [c for c in COMPILERS if sm in c.sms]
    if not usable:
        pytest.skip(f"no NVRTC here that knows sm_{sm}")
    return usable[-1]  # the oldest


def fake(major: int, minor: int, *sms: int) -> Nvrtc:
    return Nvrtc(Path(f"/fake/{major}.{minor}"), (major, minor), sms, None)  # type: ignore[arg-type]


def limited(profile: Profile, driver: str) -> Profile:
    return msgspec.structs.replace(profile, cuda=CudaLimit(driver=driver, ptx="9.9"))


CU124 = fake(12, 4, 80, 86, 87, 89, 90)
CU126 = fake(12, 6, 80, 86, 87, 89, 90)
CU129 = fake(12, 9, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121)
CU130 = fake(13, 0, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def test_the_profiles_have_the_sm_that_the_project_is_for() -> None:
    assert SMS == [86, 87, 89, 90, 110, 120]


@needs_compiler
@pytest.mark.parametrize("sm", SMS)
def test_code_for_every_profile_tells_what_it_takes(sm: int) -> None:
    """The figures of the log are those of the machine code; the PTX is for that sm and ends in a NUL."""
    compiler = compiler_of(sm)
    made = compiler.compile(SOURCE, HEADERS, sm)
    usage, cubin = read_report(made.log), read_cubin(made.cubin)
    assert cubin.sm == sm and cubin.oldest == (compiler.cuda[0], 0)
    assert set(usage) == {"shared", "crowded"}
    assert cubin.registers == {name: of.registers for name, of in usage.items()}
    assert usage["shared"].shared_bytes == 1024 and usage["crowded"].shared_bytes == 0
    assert usage["shared"].spill_stores == 0 and usage["shared"].stack_bytes == 0
    crowded = usage["crowded"]  # 80 values in the 64 registers that 1024 threads leave each
    assert crowded.registers == 64
    assert crowded.spill_stores >= 4 * 16 and crowded.spill_loads >= 4 * 16 and crowded.stack_bytes >= 4 * 16
    text = made.ptx.decode()
    assert text[-1] == "\0" and "\0" not in text[:-1]
    assert f".target sm_{sm}\n" in text and ".entry shared(" in text


@needs_compiler
def test_all_releases_here_report_alike() -> None:
    for compiler in COMPILERS:
        made = compiler.compile(SOURCE, HEADERS, 87)
        assert read_report(made.log)["shared"].shared_bytes == 1024
        assert read_cubin(made.cubin).registers["crowded"] == 64
        assert b"\n.version " in made.ptx


@needs_compiler
def test_a_mistake_comes_with_the_words_of_the_compiler() -> None:
    compiler = compiler_of(87)
    with pytest.raises(
        BuildError, match=r"refuses the device code for sm_87:\nedge\.cu\(6\): error"
    ) as found:
        compiler.compile(SOURCE.replace("* SCALE", "* SCALES"), HEADERS, 87)
    assert '"SCALES" is undefined' in str(found.value)
    with pytest.raises(BuildError, match=r"scale\.h\(1\): .*error"):
        compiler.compile(SOURCE, {"scale.h": "#error stop\n"}, 87)
    with pytest.raises(BuildError, match=r"INVALID_OPTION.*\n.*--no-such-option"):
        compiler.compile(SOURCE, HEADERS, 87, ["--no-such-option"])
    with pytest.raises(BuildError) as found:  # thousands of mistakes are no longer message
        compiler.compile("x;\n" * 5000, {}, 87, ["--device-debug"])
    assert len(str(found.value)) < 5000


@needs_compiler
def test_an_sm_that_a_release_does_not_know_is_named() -> None:
    with pytest.raises(Unsupported, match=r"makes no code for sm_101; it knows 7?5?.*87"):
        find_compilers()[0].compile(SOURCE, HEADERS, 101)


@needs_compiler
def test_no_header_comes_from_the_folder_of_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scale.h").write_text("#define SCALE 5.0f\n")
    monkeypatch.chdir(tmp_path)
    made = compiler_of(87).compile(SOURCE, HEADERS, 87)
    assert b"0f40400000" in made.ptx.lower()  # 3.0
    with pytest.raises(BuildError, match=r"could not open source file .scale\.h"):
        compiler_of(87).compile(SOURCE, {}, 87)


@needs_compiler
def test_the_same_source_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    compiler = compiler_of(87)
    code = (
        "import sys, hashlib; from pathlib import Path\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/builders']\n"
        "from test_nvrtc import HEADERS, SOURCE, open_compiler\n"
        "made = open_compiler(Path(sys.argv[2])).compile(SOURCE, HEADERS, 87)\n"
        "print(hashlib.sha256(made.cubin + made.ptx).hexdigest())"
    )
    digests = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        command = [sys.executable, "-c", code, str(ROOT), str(compiler.path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path / folder)
        digests.add(done.stdout.strip())
    made = compiler.compile(SOURCE, HEADERS, 87)
    assert digests == {hashlib.sha256(made.cubin + made.ptx).hexdigest()}
    other = compiler.compile(SOURCE, {"scale.h": "#define SCALE 4.0f\n"}, 87)
    assert other.cubin != made.cubin and other.ptx != made.ptx


# --- which release -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "driver", "found", "chosen", "sm"),
    [
        ("orin", "12.6", [CU130, CU129, CU126, CU124], CU126, 87),
        ("orin", "13.2", [CU130, CU126], CU130, 87),  # JetPack 7 on Orin
        ("orin", "12.8", [CU129, CU124], CU124, 87),
        ("thor", "13.0", [CU130, CU129], CU130, 110),
        ("thor", "12.9", [CU130, CU129, CU126], CU129, 101),  # as CUDA named it before 13.0
        ("h200", "12.6", [CU130, CU126], CU126, 90),
        ("rtx-5090", "12.9", [CU130, CU129, CU126], CU129, 120),
        ("rtx-5090", "13.0", [CU126, CU130], CU130, 120),
    ],
)
def test_the_newest_release_whose_code_the_device_loads(
    name: str, driver: str, found: list[Nvrtc], chosen: Nvrtc, sm: int
) -> None:
    profile = limited(load_profile(name), driver)
    assert compiler_for(profile, found) is chosen
    assert nvrtc.sm_of(profile) == sm


@pytest.mark.parametrize(
    ("name", "driver", "found", "wheel"),
    [
        ("orin", "12.6", [], "nvidia-cuda-nvrtc-cu12==12.6.85"),
        ("orin", "12.6", [CU130, CU129], "nvidia-cuda-nvrtc-cu12==12.6.85"),
        ("orin", "12.5", [CU126], "nvidia-cuda-nvrtc-cu12==12.5.*"),
        ("thor", "13.0", [CU129, CU126], "nvidia-cuda-nvrtc==13.0.88"),
        ("thor", "13.2", [CU126], "nvidia-cuda-nvrtc==13.0.88"),
        ("thor", "12.9", [CU126], "nvidia-cuda-nvrtc-cu12==12.9.86"),
        ("rtx-5090", "12.8", [CU126], "nvidia-cuda-nvrtc-cu12==12.8.*"),
        ("h200", "12.6", [fake(12, 1, 90)], "nvidia-cuda-nvrtc-cu12==12.6.85"),
    ],
)
def test_a_missing_release_is_named_with_its_wheel(
    name: str, driver: str, found: list[Nvrtc], wheel: str
) -> None:
    with pytest.raises(BuildError) as caught:
        compiler_for(limited(load_profile(name), driver), found)
    message = str(caught.value)
    assert f"pip install '{wheel}'" in message and "--no-device-code" in message
    assert all(str(c.path) in message for c in found) and (found or "here: none" in message)
    assert re.search(rf"profile '{load_profile(name).name}' \(sm_\d+\) needs NVRTC of CUDA", message)


def test_what_no_release_can_make_is_unsupported() -> None:
    with pytest.raises(
        Unsupported, match=r"sm_120 needs CUDA 12\.8, and cuda\.driver .* no newer than 12\.6"
    ):
        compiler_for(limited(load_profile("rtx-5090"), "12.6"), [CU126, CU130])
    with pytest.raises(Unsupported, match=r"sm_87 needs CUDA 12\.4, .* no newer than 11\.4"):  # JetPack 5
        compiler_for(limited(load_profile("orin"), "11.4"), [CU126])
    with pytest.raises(Unsupported, match=r"profile 'cpu' has no cuda"):
        compiler_for(load_profile("cpu"), [CU126])


@needs_compiler
def test_the_wheels_of_the_extra_serve_every_profile() -> None:
    if {c.cuda for c in COMPILERS} < {(12, 6), (13, 0)}:
        pytest.skip("not both wheels of '.[device-code]' are here")
    for profile in PROFILES.values():
        compiler = compiler_for(profile)
        assert nvrtc.sm_of(profile) in compiler.sms
        assert compiler.cuda <= nvrtc.limit_of(profile)


def test_a_library_that_is_none_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "libnvrtc.so.12").write_bytes(b"\x7fELF no library")
    assert open_compiler(tmp_path / "libnvrtc.so.12") is None
    (tmp_path / "other.c").write_text("int edge;\n")
    other = tmp_path / "libnvrtc.so.13"
    subprocess.run(["g++", "-shared", "-x", "c", "-o", other, tmp_path / "other.c"], check=True)
    assert open_compiler(other) is None  # it loads, and has nothing of NVRTC


def test_a_system_library_is_found_and_a_wheel_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("wheel", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "libnvrtc.so.12.6.85").write_bytes(b"")
        os.symlink("libnvrtc.so.12.6.85", tmp_path / folder / "libnvrtc.so.12")
    (tmp_path / "system" / "libnvrtc.so.13").write_bytes(b"")
    opened: list[Path] = []

    def open_(path: Path) -> Nvrtc:
        opened.append(path)
        return replace(CU130 if path.name.endswith("13") else CU126, path=path)

    monkeypatch.setattr(nvrtc, "_folders", lambda: iter([tmp_path / "wheel", tmp_path / "system"]))
    monkeypatch.setattr(nvrtc, "open_compiler", open_)
    found = find_compilers.__wrapped__()
    assert [(c.cuda, c.path.parent.name) for c in found] == [((13, 0), "system"), ((12, 6), "wheel")]
    assert len(opened) == 3  # a link is no second library


# --- what it says ------------------------------------------------------------------------------------------

LOG = """\
ptxas warning : Value of threads per SM for entry b is out of range. .minnctapersm will be ignored
ptxas info    : 1092 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function 'a' for 'sm_110a'
ptxas info    : Function properties for a
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers
ptxas info    : Compile time = 12.669 ms
ptxas info    : Compiling entry function 'b' for 'sm_110a'
ptxas info    : Function properties for b
ptxas         .     64 bytes stack frame, 104 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size, 33792 bytes smem
ptxas info    : Function properties for helper
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compile time = 2.302 ms
"""


def test_the_report_is_read_kernel_by_kernel() -> None:
    assert read_report(LOG) == {"a": Usage(38, 0, 0, 0, 0), "b": Usage(255, 33792, 64, 104, 120)}
    assert read_report("") == {}
    with pytest.raises(BuildError, match="says nothing of b's registers"):
        read_report(LOG.replace("Used 255 registers", "…"))


@needs_compiler
def test_a_cubin_of_another_kind_is_refused() -> None:
    cubin = compiler_of(87).compile(SOURCE, HEADERS, 87).cubin
    whole = read_cubin(cubin)
    for bad in (b"", b"\x7fELF", cubin[:40], Path(sys.executable).resolve().read_bytes()[:4096]):
        with pytest.raises(BuildError, match="cannot be read"):
            read_cubin(bad)
    with pytest.raises(BuildError, match="its ABI is 99 version 7, known are those of CUDA 12 and 13"):
        read_cubin(cubin[:7] + b"\x63\x07" + cubin[9:])
    for cut in range(0, len(cubin), 97):  # wherever it ends, it is refused or says the same
        with contextlib.suppress(BuildError):
            assert read_cubin(cubin[:cut]) == whole
