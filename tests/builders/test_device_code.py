"""Device code: real kernels compiled for the devices, what the manifest says of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hf_folders import write_model

import builders
from builders import device_code, nvrtc, pipeline
from builders.cli import main
from builders.device_code import check_code, compile_device_code, headers, sources
from builders.nvrtc import compiler_for, find_compilers
from builders.planner import Request
from builders.ptxas_report import read_report
from edge_runtime.cli import inspect
from edge_runtime.engine.device_code import Kernel, matrix_kernels, source
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.manifest import DeviceCodeEntry, loaded_nbytes
from edge_runtime.engine.profile import CudaLimit, Profile, load_profile
from edge_runtime.errors import BuildError

DEVICES = {"orin": (87, "12.6", "8.5"), "thor": (110, "13.0", "9.0")}
DEVICES |= {"rtx-4090": (89, "12.6", "8.5"), "h200": (90, "12.6", "8.5")}
ROOM = 8 << 20
pytestmark = pytest.mark.skipif(
    not {(12, 6), (13, 0)} <= {c.cuda for c in find_compilers()},
    reason="NVRTC of CUDA 12.6 and 13.0 are not here: pip install '.[device-code]'",
)


def some_kernels() -> tuple[Kernel, ...]:
    made = matrix_kernels("int4_g64")
    return made.split[1], made.embed


def limited(profile: Profile, driver: str, ptx: str) -> Profile:
    return msgspec.structs.replace(profile, cuda=CudaLimit(driver=driver, ptx=ptx))


@pytest.mark.parametrize("name", DEVICES)
def test_kernels_of_the_project_for_each_device(name: str) -> None:
    sm, cuda, ptx = DEVICES[name]
    kernels = some_kernels()
    code = compile_device_code(kernels, load_profile(name), ROOM)
    assert list(code.blobs) == [f"device.sm_{sm}.cubin", f"device.compute_{sm}.ptx"]
    assert [e.kind for e in code.entries] == ["cubin", "ptx"] and code.notices == ()
    for entry in code.entries:
        assert (entry.sm, entry.cuda, entry.ptx) == (sm, cuda, ptx)
        assert entry.nbytes == len(code.blobs[entry.blob])
        assert {s: k.threads for s, k in entry.kernels.items()} == {k.symbol: k.threads for k in kernels}
    for kernel in code.entries[0].kernels.values():
        assert kernel.registers is not None and 8 <= kernel.registers * kernel.threads <= 65536
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    split = kernels[0].symbol
    assert all(e.kernels[split].shared_bytes > 0 for e in code.entries)
    assert all(k.registers is None for k in code.entries[1].kernels.values())
    assert f"\n.version {ptx}\n.target sm_{sm}\n" in code.blobs[f"device.compute_{sm}.ptx"].decode()
    assert code.blobs[f"device.sm_{sm}.cubin"][:4] == b"\x7fELF"


def test_what_is_compiled_once_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_device_code(some_kernels(), load_profile("orin"), ROOM)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", refuse)
    again = compile_device_code(tuple(reversed(some_kernels())), load_profile("orin-nano-8gb"), ROOM)
    assert again.blobs == first.blobs


def test_the_same_kernels_give_the_same_bytes() -> None:
    first = compile_device_code(some_kernels(), load_profile("orin"), ROOM)
    device_code._compiled.cache_clear()
    assert compile_device_code(some_kernels(), load_profile("orin"), ROOM) == first


SPILLING = """\
#include "device.cuh"
namespace edge {
EDGE_DEVICE void crowded(const EdgeRow& args) {
    float v[80];
    for (int i = 0; i < 80; i++) v[i] = args.x[i * 1024 + threadIdx.x];
    for (int r = 0; r < args.group; r++)
        for (int i = 0; i < 80; i++) v[i] = v[i] * v[(i + 7) % 80] + args.x[r];
    for (int i = 0; i < 80; i++) args.out[i * 1024 + threadIdx.x] = v[i];
}
}
"""


def test_a_kernel_that_spills_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = headers()
    monkeypatch.setattr(device_code, "headers", lambda: whole | {"crowded.cuh": SPILLING})
    kernel = Kernel("crowded", "crowded.cuh", "EdgeRow", "edge::crowded", 1024)
    code = compile_device_code([kernel, *some_kernels()], load_profile("orin"), ROOM)
    of = code.entries[0].kernels["crowded"]
    assert of.spill_stores and of.spill_loads and of.registers == 64
    assert code.notices == (
        f"kernel crowded spills registers on sm_87: {of.spill_stores} bytes written, {of.spill_loads} read",
    )


def test_code_that_is_too_large_is_refused() -> None:
    code = compile_device_code(some_kernels(), load_profile("orin"), ROOM)
    size = loaded_nbytes(code.entries)
    assert size == max(len(b) for name, b in code.blobs.items() if name.endswith(".cubin"))
    assert compile_device_code(some_kernels(), load_profile("orin"), size) == code
    with pytest.raises(
        BuildError, match=f"2 kernels takes {size} bytes, the plan has room for {size - 1}; choose"
    ):
        compile_device_code(some_kernels(), load_profile("orin"), size - 1)


def test_ptx_that_the_driver_does_not_know_is_refused() -> None:
    with pytest.raises(BuildError, match=r"makes PTX 8\.5, profile 'orin-agx-64gb' takes 8\.4 at most"):
        compile_device_code(some_kernels(), limited(load_profile("orin"), "12.6", "8.4"), ROOM)


def test_code_for_another_device_or_driver_is_refused() -> None:
    """What the choice of the compiler rules out is looked at once more, in what it made."""
    kernels, orin = some_kernels(), load_profile("orin")
    newer = limited(orin, "13.0", "9.0")
    made = compiler_for(newer).compile(source(kernels), headers(), 87)
    usage = read_report(made.log)
    assert check_code(made, kernels, usage, newer, 87) == "9.0"
    with pytest.raises(BuildError, match=r"loaded by drivers of CUDA 13\.0 .* cuda\.driver 12\.6"):
        check_code(made, kernels, usage, orin, 87)
    with pytest.raises(BuildError, match=r"asked for sm_89 and made a cubin for sm_87"):
        check_code(made, kernels, usage, newer, 89)
    with pytest.raises(BuildError, match=r"no kernel 'missing'"):
        check_code(made, [*kernels, replace(kernels[0], symbol="missing")], usage, newer, 87)
    with pytest.raises(BuildError, match=r"does not name its ISA"):
        check_code(replace(made, ptx=b"// nothing\n\0"), kernels, usage, newer, 87)


# --- the sources -------------------------------------------------------------------------------------------


def test_headers_are_the_kernels_and_the_format_table_and_no_emulator() -> None:
    found = headers()
    assert {"edge_formats.h", "edge_cuda.h", "device.cuh", "linear.cuh"} <= set(found)
    assert all("/" not in name for name in found)
    assert "EDGE_FORMAT_ABI" in found["edge_formats.h"]


def test_an_installed_builder_has_them_as_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = headers()
    package = tmp_path / "builders"
    shutil.copytree(sources(), package / "_kernels" / "cuda", ignore=shutil.ignore_patterns("emulator"))
    monkeypatch.setattr(builders, "__path__", [str(package)])
    assert sources() == package / "_kernels" / "cuda" and headers() == checkout
    shutil.rmtree(package / "_kernels")
    with pytest.raises(BuildError, match="sources of the cuda kernels are missing; reinstall"):
        headers()


# --- the whole build ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("device") / "toy")


WEIGHTS = "int4_g32"  # of every build here, so that a device's kernels are compiled once


def built(model: Path, target: Path, profile: str, *more: str) -> int:
    options = ["--profile", profile, "--weights", WEIGHTS, "--no-eval", "-o", str(target), "--json"]
    return main([*options, *more, str(model)])


@pytest.mark.parametrize("name", ["orin", "thor"])  # one for each compiler
def test_edge_build_puts_the_code_into_the_engine(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sm, cuda, ptx = DEVICES[name]
    assert built(model, tmp_path / "m.edge", name) == 0
    said = json.loads(capsys.readouterr().out)
    assert inspect.main([str(tmp_path / "m.edge"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device_code"] == said["device_code"] and data["verified"]
    cubin, text = data["device_code"]
    assert (cubin["kind"], cubin["sm"], cubin["cuda"], cubin["ptx"]) == ("cubin", sm, cuda, ptx)
    assert (text["kind"], text["sm"], text["cuda"], text["ptx"]) == ("ptx", sm, cuda, ptx)
    assert set(cubin["kernels"]) == set(text["kernels"]) and len(cubin["kernels"]) > 5
    for kernel in cubin["kernels"].values():
        assert set(kernel) >= {"registers", "shared_bytes", "spill_stores", "spill_loads"}
        assert kernel["registers"] * kernel["threads"] <= 65536
    with read_engine(tmp_path / "m.edge") as engine:
        code = bytes(engine.blob(cubin["blob"]))
        assert len(code) == cubin["nbytes"] and code[:4] == b"\x7fELF"
        assert bytes(engine.blob(text["blob"]))[-1:] == b"\0"
    assert inspect.main([str(tmp_path / "m.edge")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"device code device.sm_{sm}.cubin, device.compute_{sm}.ptx" in shown
    assert f"device.sm_{sm}.cubin sm_{sm} {ptx} CUDA {cuda}" in shown


def test_the_same_build_gives_the_same_engine(model: Path, tmp_path: Path) -> None:
    assert built(model, tmp_path / "a.edge", "orin") == 0
    device_code._compiled.cache_clear()
    assert built(model, tmp_path / "b.edge", "orin") == 0
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


def test_a_build_says_that_it_compiles_and_leaves_what_it_found(model: Path, tmp_path: Path) -> None:
    class Hearing(pipeline.Watcher):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def phase(self, name: str, steps: int) -> None:
            self.heard.append(f"{name} {steps}")

        def step(self, what: str) -> None:
            if what.endswith("sm_87"):
                self.heard.append(what)

    watcher = Hearing()
    request = Request(weights=WEIGHTS)
    done = pipeline.build(
        pipeline.Options(
            model, tmp_path / "m.edge", "orin", request, measure=False, keep_json=tmp_path / "json"
        ),
        watcher,
    )
    count = len(done.manifest.device_code[0].kernels)
    assert watcher.heard[:3] == ["compile 1", f"{count} kernels for sm_87", watcher.heard[2]]
    assert watcher.heard[2].startswith("quantize ") and done.seconds["compile"] > 0
    kept = json.loads((tmp_path / "json" / "device_code.json").read_bytes())
    assert msgspec.convert(kept, tuple[DeviceCodeEntry, ...]) == done.manifest.device_code


def test_without_a_compiler_nothing_is_written_and_the_wheel_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> tuple[Any, ...]:
        return ()

    monkeypatch.setattr(nvrtc, "find_compilers", none)
    assert built(model, tmp_path / "m.edge", "orin") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "BuildError"
    assert "pip install 'nvidia-cuda-nvrtc-cu12==12.6.85'" in error["message"]
    assert list(tmp_path.iterdir()) == []
    # without device code none is asked for, and edge-inspect says what that means
    assert built(model, tmp_path / "m.edge", "orin", "--no-device-code") == 0
    assert json.loads(capsys.readouterr().out)["device_code"] == []
    assert inspect.main([str(tmp_path / "m.edge")]) == 0
    assert "device code: none (edge-build --no-device-code); no cuda device runs" in capsys.readouterr().out
    assert built(model, tmp_path / "cpu.edge", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["device_code"] == []
