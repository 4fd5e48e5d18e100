"""The emulator of cuda kernels: results in every order of threads, and broken rules are caught."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulation import (
    KERNELS,
    Emulated,
    EmulationError,
    Guarded,
    asan_environment,
    compile_kernels,
    compiler,
    sanitizing,
)
from emulator_kernels import PROGRAM, SOURCE

from edge_runtime.engine.formats.c_header import c_header

HERE = Path(__file__).resolve().parent
by_guards = pytest.mark.skipif(bool(sanitizing()), reason="AddressSanitizer ends the process at once")
ORDERS = ("up", "down", "shuffled")


class Args(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("n", ctypes.c_int32),
    )


@pytest.fixture(scope="module")
def library() -> Emulated:
    return Emulated(compile_kernels(SOURCE))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGE_EMU_ORDER", request.param)
    return str(request.param)


def run(
    library: Emulated,
    symbol: str,
    out: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    n: int = 0,
    grid: int | tuple[int, ...] = 1,
    shared: int = 0,
) -> None:
    """Launches a kernel on guarded copies of a and b, and with `out` filled in."""
    memory = [Guarded.of(np.zeros(1) if array is None else array) for array in (a, b, out)]
    library.launch(symbol, grid, Args(*(m.address for m in memory), n), shared)
    for guarded in memory:
        guarded.check()
    out[...] = memory[2].view(out.dtype, out.shape)


def test_a_block_sum_is_right_in_every_order(library: Emulated, order: str) -> None:
    x = np.random.default_rng(1).integers(-8, 9, (5, 1000)).astype(np.float32)
    out = np.zeros(5, np.float32)
    run(library, "block_sum", out, x, n=1000, grid=5)
    np.testing.assert_array_equal(out, x.sum(1))


def test_a_missing_barrier_shows_in_every_order(library: Emulated, order: str) -> None:
    """Thread 64 reads what warp 3 (up) or warp 0 (down) has yet to write: poison."""
    x = np.ones((8, 1000), np.float32)
    out = np.zeros(8, np.float32)
    run(library, "racing_sum", out, x, n=1000, grid=8)
    assert np.any(out != 1000)


def test_a_missing_second_barrier_shows_in_some_order(
    library: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.arange(96, dtype=np.int32)
    wrong = []
    for order in ORDERS:
        monkeypatch.setenv("EDGE_EMU_ORDER", order)
        right, racing = np.zeros(96, np.int32), np.zeros(96, np.int32)
        run(library, "rotate", right, x, n=40, shared=384)
        np.testing.assert_array_equal(right, np.roll(x, -40))
        run(library, "racing_rotate", racing, x, n=40, shared=384)
        wrong.append(not np.array_equal(racing, right))
    assert any(wrong)


def fragments_a(a: np.ndarray) -> np.ndarray:
    """(32, 4) words of a (16, 32 bytes), by the PTX ISA's formula rather than the emulator's."""
    out = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        for word in range(4):
            row = lane // 4 + (8 if word in (1, 3) else 0)
            start = lane % 4 * 4 + (16 if word >= 2 else 0)
            out[lane, word] = a[row, start : start + 4].copy().view(np.uint32)[0]
    return out


def fragments_b(b: np.ndarray) -> np.ndarray:
    """(32, 2) words of b, given as its columns (8, 32 bytes)."""
    out = np.zeros((32, 2), np.uint32)
    for lane in range(32):
        for word in range(2):
            start = lane % 4 * 4 + 16 * word
            out[lane, word] = b[lane // 4, start : start + 4].copy().view(np.uint32)[0]
    return out


def product_of(d: np.ndarray) -> np.ndarray:
    """(16, 8) of what lanes hold (32, 4)."""
    out = np.zeros((16, 8), d.dtype)
    for lane in range(32):
        for i in range(4):
            out[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2] = d[lane, i]
    return out


@pytest.mark.parametrize("symbol", ["product_u8", "product_s8"])
def test_the_product_of_bytes_is_exact(library: Emulated, order: str, symbol: str) -> None:
    rng = np.random.default_rng(2)
    kind = np.uint8 if symbol == "product_u8" else np.int8
    info = np.iinfo(kind)
    a = rng.integers(info.min, info.max + 1, (16, 32)).astype(kind)
    b = rng.integers(-128, 128, (8, 32)).astype(np.int8)
    d = np.zeros((32, 4), np.int32)
    run(library, symbol, d, fragments_a(a.view(np.uint8)), fragments_b(b.view(np.uint8)), n=3)
    np.testing.assert_array_equal(product_of(d), 1 + 3 * (a.astype(np.int64) @ b.astype(np.int64).T))


@pytest.mark.parametrize("symbol", ["product_f16", "product_bf16"])
def test_the_product_of_halves_is_within_rounding(library: Emulated, order: str, symbol: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((16, 16)).astype(np.float32), rng.standard_normal((8, 16)).astype(np.float32)
    if symbol == "product_f16":
        stored_a, stored_b = a.astype(np.float16), b.astype(np.float16)
        a, b = stored_a.astype(np.float64), stored_b.astype(np.float64)
    else:
        stored_a, stored_b = (
            np.ascontiguousarray(v.view(np.uint32) >> 16, np.uint32).astype(np.uint16) for v in (a, b)
        )
        a, b = ((v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (stored_a, stored_b))
    d = np.zeros((32, 4), np.float32)
    run(library, symbol, d, fragments_a(stored_a.view(np.uint8)), fragments_b(stored_b.view(np.uint8)), n=1)
    bound = 17 * 2**-24 * (1 + np.abs(a) @ np.abs(b).T)  # 16 additions, each rounded once
    assert np.all(np.abs(product_of(d) - (1 + a @ b.T)) <= bound)


def test_exchanges_and_votes(library: Emulated, order: str) -> None:
    lane = np.arange(32)
    out = np.zeros((7, 32), np.int32)
    run(library, "exchanges", out)
    up, down = np.where(lane < 3, lane, lane - 3), np.where(lane + 7 > 31, lane, lane + 7)
    for row, source in zip(out, (lane // 4, lane ^ 5, up, down), strict=False):
        np.testing.assert_array_equal(row, 100 + source)
    assert np.all(out[4] == np.int32(np.uint32(sum(1 << i for i in range(0, 32, 3)))))
    assert np.all(out[5] == 1) and np.all(out[6] == 131)


def test_blocks_run_in_the_order_asked_for(library: Emulated, order: str) -> None:
    out = np.zeros(1 + 24, np.int32)
    run(library, "blocks", out, grid=(4, 3, 2))
    assert out[0] == 24
    turn = out[1:] - out[1:].min()
    if order == "shuffled":
        assert sorted(turn) == list(range(24)) and list(turn) != sorted(turn)
    else:
        assert list(turn) == sorted(turn, reverse=order == "down")


def test_shared_memory_is_poisoned_before_every_block(library: Emulated, order: str) -> None:
    out = np.zeros((3, 64), np.uint32)
    run(library, "fresh", out, grid=3, shared=256)
    assert np.all(out == 0xCDCDCDCD)


def test_threads_that_have_ended_do_not_hold_a_barrier_up(library: Emulated, order: str) -> None:
    out = np.zeros(128, np.int32)
    run(library, "some_leave", out, n=40)
    assert list(out) == [1] * 40 + [0] * 88


@pytest.mark.parametrize(
    ("symbol", "n", "words"),
    [
        ("never_met", 1, ("threads wait for ever", "__syncthreads", "__syncwarp")),
        ("two_places", 1, ("at __syncthreads", "while others are at")),
        ("two_shuffles", 1, ("__shfl_sync", "while lanes of its warp are at")),
        ("half_a_warp", 16, ("__shfl_xor_sync", "lanes of its warp|all 32 must be alive")),
        ("tail_warp", 32, ("by a warp of 16 lanes",)),
        ("half_a_mask", 0, ("mask 0xffff", "whole warps only")),
    ],
)
def test_what_cuda_leaves_undefined_ends_the_launch(
    library: Emulated, order: str, symbol: str, n: int, words: tuple[str, ...]
) -> None:
    out = np.zeros(128, np.int32)
    with pytest.raises(EmulationError) as caught:
        run(library, symbol, out, n=n)
    for word in words:
        assert any(w in str(caught.value) for w in word.split("|")), caught.value
    # and the library serves on
    x = np.ones((1, 1000), np.float32)
    total = np.zeros(1, np.float32)
    run(library, "block_sum", total, x, n=1000)
    assert total == 1000


@by_guards
def test_a_write_behind_shared_memory_is_caught(library: Emulated) -> None:
    out = np.zeros(1, np.int32)
    run(library, "beyond_shared", out, n=99, shared=100)
    with pytest.raises(EmulationError, match="byte 5 behind 100 bytes of dynamic shared memory"):
        run(library, "beyond_shared", out, n=105, shared=100)


@by_guards
@pytest.mark.parametrize("n", [-1, -4096, 100, 100 + 4095])
def test_a_write_beside_a_buffer_is_caught(library: Emulated, n: int) -> None:
    out = np.zeros(100, np.uint8)
    with pytest.raises(EmulationError, match=rf"1 guard bytes were written: byte {n} "):
        run(library, "write", out, n=n)


def test_wrong_launches_are_refused(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmulationError, match="a record of 32 bytes, not 3"):
        library.launch("blocks", 1, b"abc")
    with pytest.raises(EmulationError, match="no kernel 'nothing'"):
        library.launch("nothing", 1, b"")
    with pytest.raises(EmulationError, match="at least one block"):
        library.launch("blocks", (1, 0), Args())
    monkeypatch.setenv("EDGE_EMU_ORDER", "sideways")
    with pytest.raises(EmulationError, match="neither up, down nor shuffled"):
        library.launch("blocks", 1, Args())
    with pytest.raises(EmulationError, match="does not compile"):
        compile_kernels("#error no")


def build_program(folder: Path, *compiler: str) -> str:
    """PROGRAM and the kernels compiled so; they lie in a library, whose .bss is theirs alone."""
    folder.mkdir()
    (folder / "edge_formats.h").write_text(c_header())
    (folder / "kernels.cpp").write_text(SOURCE)
    (folder / "program.cpp").write_text(PROGRAM)
    base = (*compiler, "-std=c++17", "-O2", "-ffp-contract=off", f"-I{KERNELS}", f"-I{folder}")
    hidden = ("-DEDGE_EMULATE", "-fPIC", "-shared", "-fvisibility=hidden")
    library, program = str(folder / "libkernels.so"), str(folder / "program")
    subprocess.run([*base, *hidden, str(folder / "kernels.cpp"), "-o", library], check=True)
    link = (str(folder / "program.cpp"), library, f"-Wl,-rpath,{folder}")
    subprocess.run([*base, *link, "-o", program], check=True)
    return program


@pytest.mark.parametrize("other", ["ucontext", "aarch64"])
def test_another_way_to_switch_stacks_gives_the_same(tmp_path: Path, other: str) -> None:
    here = compiler()[0]
    command, runner = [here, "-DEDGE_EMU_UCONTEXT"], []
    if other == "aarch64":
        found, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
        if found is None or emulator is None:
            pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
        command, runner = [found], [emulator, "-L", "/usr/aarch64-linux-gnu"]
    programs = [build_program(tmp_path / "here", here)], [*runner, build_program(tmp_path / other, *command)]
    for order in ORDERS:
        settings = {**os.environ, "EDGE_EMU_ORDER": order}
        wanted, said = (
            subprocess.run(p, check=True, stdout=-1, text=True, env=settings).stdout for p in programs
        )
        assert wanted.count(" ran ") == 7 and "wait for ever" in wanted
        assert said == wanted


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **asan_environment()}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=280, cwd=HERE
    )


def test_all_of_this_under_address_sanitizer() -> None:
    others = "not another_way and not address_sanitizer"
    done = sanitized(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", others, str(Path(__file__).resolve())
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


BROKEN = """
import numpy as np
from test_emulator import Args, SOURCE
from emulation import Emulated, compile_kernels
library, out = Emulated(compile_kernels(SOURCE)), np.zeros(64, np.float32)
record = Args(0, 0, out.ctypes.data, {n})
library.launch("{symbol}", 1, record, {shared})
print("ran to its end")
"""


@pytest.mark.parametrize(
    ("symbol", "n", "shared", "found"),
    [
        ("beyond_static", 6, 0, None),
        ("beyond_static", 7, 0, "global-buffer-overflow"),
        ("beyond_shared", 99, 100, None),
        ("beyond_shared", 100 + 64, 100, "heap-buffer-overflow"),
        ("write", 255, 0, None),
        ("write", 256, 0, "heap-buffer-overflow"),
    ],
)
def test_address_sanitizer_sees_what_a_kernel_does_wrong(
    symbol: str, n: int, shared: int, found: str | None
) -> None:
    done = sanitized("-c", BROKEN.format(symbol=symbol, n=n, shared=shared))
    if found is None:
        assert done.returncode == 0 and "ran to its end" in done.stdout, done.stderr[-2000:]
    else:
        assert done.returncode != 0 and found in done.stderr, done.stderr[-2000:]
