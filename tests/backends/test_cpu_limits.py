"""What the cpu backend takes and gives back in memory, and everything that it refuses."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_programs import PAGES, Array, decoded, ids, instruction_sets, llama, packed, run, step, vector

from edge_runtime.backends import cpu, cpu_program, cpu_records
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine import memory
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.layout import lay_out
from edge_runtime.errors import (
    BackendUnavailable,
    BadConfig,
    BadEngineFile,
    BadRequest,
    NumericError,
    Unsupported,
)

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

SIMD = instruction_sets()


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["int8", "int4c"])
def test_memory_is_the_plans(kv: str) -> None:
    part = llama("int4_g64", kv=kv)
    for threads in (1, 3):
        executor = BACKEND.load(part, threads=threads)
        need = cache_nbytes(part.program, part.kv, part.step) + lay_out(part.program, part.step).nbytes
        assert executor.memory_bytes == need + memory.scratch_nbytes(part.program, part.step, threads)
        executor.close()


def test_attention_scratch_is_the_librarys() -> None:
    library = cpu.open_library(cpu.library_path())
    for heads in (1, 3, 8):
        for head_dim in (1, 16, 20, 128):
            assert library.edge_cpu_attention_floats(heads, head_dim) == memory.attention_floats(
                heads, head_dim
            )


def test_repacked_weights_are_counted_and_equal() -> None:
    part, batch = llama("int4_g64"), step((0, 0, ids(8)))
    want = run(part, batch)
    tensor = part.weights["head"]
    rows = packed(np.zeros((tensor.rows, tensor.cols), np.float32), "int4_g64", "rows")
    from edge_runtime.engine import packing

    planes = packing.unpack("int4_g64", tensor.packing, tensor.planes, tensor.rows, tensor.cols)
    rows = replace(rows, planes=packing.pack("int4_g64", "rows", planes, tensor.rows, tensor.cols))
    again = replace(part, weights={**part.weights, "head": rows})
    executor = BACKEND.load(again)
    assert np.array_equal(executor.forward(batch), want)
    plain = BACKEND.load(part)
    more = packing.packed_nbytes("int4_g64", "n16k4", tensor.rows, tensor.cols)
    assert executor.memory_bytes == plain.memory_bytes + more
    executor.close()
    plain.close()


@pytest.mark.parametrize("kv", ["f16", "int4", "int8c", "int4c"])
def test_nothing_is_written_outside_the_arena(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = 4096
    blocks: list[Array] = []

    def guarded(nbytes: int) -> Array:
        block = np.full(nbytes + 2 * guard + 64, 0xA5, np.uint8)
        start = guard + (-(block.ctypes.data + guard)) % 64
        block[start : start + nbytes] = 0
        blocks.append(block)
        return block[start : start + nbytes]

    monkeypatch.setattr(cpu_program, "allocate", guarded)
    part = llama("int4_g32", kv=kv, head_dim=20, heads=3, kv_heads=1)
    executor = BACKEND.load(part, threads=2)
    for first in range(0, 64, 32):  # the largest step, up to the last position
        executor.forward(step((0, first, ids(32, first))))
    block = blocks[0]
    inside = executor.memory_bytes
    start = guard + (-(block.ctypes.data + guard)) % 64
    assert (block[:start] == 0xA5).all() and (block[start + inside :] == 0xA5).all()
    executor.close()


def test_logits_are_a_view_and_close_ends_it() -> None:
    part = llama("f16")
    executor = BACKEND.load(part, threads=2)
    first = executor.forward(step((0, 0, ids(3))))
    second = executor.forward(step((0, 3, ids(3, 1))))
    assert np.shares_memory(first, second)
    executor.close()
    executor.close()
    assert executor.memory_bytes == 0
    with pytest.raises(BackendUnavailable, match="closed"):
        executor.forward(step((0, 0, ids(1))))
    second.sum()  # memory held by a caller stays valid


def test_copied_pages_are_equal_prefixes() -> None:
    part = llama("int8_g64", kv="int8")
    executor = BACKEND.load(part, threads=2)
    text = ids(20)
    want = executor.forward(step((0, 0, text)))[16:].copy()
    executor.copy_page(PAGES[0][0], 9)
    batch = step((0, 16, text[16:]))
    table = batch.page_tables.copy()
    table[0] = (9, 10, -1, -1)
    assert np.array_equal(executor.forward(replace(batch, page_tables=table)), want)
    with pytest.raises(BadRequest, match="page 12 does not exist"):
        executor.copy_page(0, 12)
    executor.close()


# --- refusals ----------------------------------------------------------------------------------------------


def changed(batch: StepBatch, name: str, at: int, value: int) -> StepBatch:
    array = getattr(batch, name).copy()
    array.reshape(-1)[at] = value
    return replace(batch, **{name: array})


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("tokens", 3, 70, "token 3 has the id 70, expected 0 to 69"),
        ("tokens", 0, -1, "token 0 has the id -1"),
        ("positions", 2, 64, "token 2 is at position 64"),
        ("positions", 2, -5, "token 2 is at position -5"),
        ("positions", 2, 1, "token 2 is the second at position 1"),
        ("sequence", 1, 2, "token 1 names sequence 2"),
        ("sequence", 1, -1, "token 1 names sequence -1"),
        ("page_tables", 0, 12, "token 0 needs page 12"),
        ("page_tables", 0, -1, "token 0 needs page -1"),
        ("logit_rows", 4, 5, r"logit_rows\[4\] is 5"),
        ("logit_rows", 0, -1, r"logit_rows\[0\] is -1"),
        ("logit_rows", 1, 0, r"logit_rows\[1\] is 0; expected ascending"),
    ],
)
def test_bad_indices_are_refused(name: str, at: int, value: int, message: str) -> None:
    executor = BACKEND.load(llama("f16"), threads=1)
    batch = step((0, 0, ids(5)))
    with pytest.raises(BadRequest, match=message):
        executor.forward(changed(batch, name, at, value))
    executor.forward(batch)
    executor.close()


def test_bad_shapes_and_sizes_are_refused() -> None:
    executor = BACKEND.load(llama("f16", tokens=8))
    batch = step((0, 0, ids(5)))
    for bad, message in (
        (step((0, 0, ids(9))), "has 9 tokens, the executor was sized for 8"),
        (step((0, 0, ids(0))), "has 0 tokens"),
        (replace(batch, positions=batch.positions[:3]), "positions has 3 entries for 5 tokens"),
        (replace(batch, tokens=batch.tokens.astype(np.float32)), "tokens is 1-D float32, expected 1-D int32"),
        (replace(batch, tokens=batch.tokens[:, None]), "tokens is 2-D int32"),
        (replace(batch, tokens=batch.tokens.astype(np.int64) + 2**40), "which no int32 holds"),
        (
            replace(batch, page_tables=np.zeros((9, 4), np.int32)),
            "has 9 sequences, the executor was sized for 3",
        ),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.forward(bad)
    # Pages that no token needs may be holes, and a table may be short
    table = np.array([[3, -1]], np.int32)
    assert executor.forward(replace(batch, page_tables=table)).shape == (5, 70)
    executor.close()


def test_a_window_needs_only_its_pages() -> None:
    executor = BACKEND.load(llama("f32", window=8))
    want = REFERENCE.load(llama("f32", window=8))
    for first in (0, 16, 32):
        batch = step((0, first, ids(16, first)))
        if first == 32:
            batch = changed(batch, "page_tables", 0, -1)  # positions 0..15 are out of every window
        answer = want.forward(batch)
        assert np.abs(executor.forward(batch) - answer).max() <= 1e-5 * np.abs(answer).max()
    with pytest.raises(BadRequest, match="needs page -1"):
        executor.forward(changed(step((0, 16, ids(4))), "page_tables", 0, -1))
    executor.close()


@pytest.mark.parametrize("name", ["int4_g64", "f32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_an_error(name: str, value: float) -> None:
    part = llama(name)
    norm = np.ones(part.program.tensors["norm"].cols, np.float32)
    norm[7] = value
    bad = vector(np.ones_like(norm))
    bad = replace(bad, planes={"w": norm})
    executor = BACKEND.load(replace(part, weights={**part.weights, "norm": bad}), threads=2)
    with pytest.raises(NumericError, match="NaN or Inf"):
        executor.forward(step((0, 0, ids(4))))
    executor.close()


def test_values_beyond_the_cache_format_are_an_error() -> None:
    part = llama("f32", kv="f16")
    huge = replace(part, weights={**part.weights, "0.v": packed(1e6 * decoded(part.weights["0.v"]), "f32")})
    executor = BACKEND.load(huge)
    with pytest.raises(NumericError, match="does not fit the KV formats f16/f16"):
        executor.forward(step((0, 0, ids(4))))
    executor.close()


def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.open_library.cache_clear()
    try:
        monkeypatch.setattr(cpu, "abi_hash", lambda: 0x1234)
        with pytest.raises(
            BackendUnavailable, match=r"other number formats: it says [0-9a-f]{16}, .*0{12}1234"
        ):
            BACKEND.load(llama("f16"))
        assert "other number formats" in BACKEND.available().why
        monkeypatch.undo()
        monkeypatch.setattr(cpu_records, "RECORDS", 5)
        with pytest.raises(BackendUnavailable, match="other records"):
            BACKEND.load(llama("f16"))
    finally:
        monkeypatch.undo()
        cpu.open_library.cache_clear()


def test_a_missing_or_broken_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="is not built"):
        cpu.open_library(tmp_path / "libedge_cpu.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable, match="cannot be used"):
        cpu.open_library(tmp_path / "broken.so")


def test_bad_options_and_unknown_formats_are_refused() -> None:
    part = llama("f16")
    with pytest.raises(BadConfig, match="threads is -1"):
        BACKEND.load(part, threads=-1)
    with pytest.raises(BadConfig, match="did you mean 'avx512'"):
        BACKEND.load(part, simd="avx51")
    other = next(s for s in ("neon", "avx2") if s not in SIMD)
    with pytest.raises(BackendUnavailable, match=f"no {other} path"):
        BACKEND.load(part, simd=other)
    formats = {name: t.format for name, t in part.weights.items()}
    assert BACKEND.supports(part.program, formats).ok
    assert "did you mean 'int4_g64'" in BACKEND.supports(part.program, {**formats, "head": "int4_g6"}).why
    del formats["head"]
    assert "no format" in BACKEND.supports(part.program, formats).why
    with pytest.raises(Unsupported, match="no format"):
        BACKEND.load(replace(part, weights={n: t for n, t in part.weights.items() if n != "head"}))


def test_planes_of_wrong_size_are_refused() -> None:
    part = llama("int4_g64")
    head = part.weights["head"]
    for planes, message in (
        ({**head.planes, "q": head.planes["q"][:-1]}, "plane 'q' is uint8"),
        ({"q": head.planes["q"]}, "plane 'scale' is missing"),
        ({**head.planes, "scale": head.planes["scale"].astype(np.float32)}, "plane 'scale' is float32"),
    ):
        with pytest.raises(BadEngineFile, match=message):
            BACKEND.load(replace(part, weights={**part.weights, "head": replace(head, planes=planes)}))
    with pytest.raises(BadEngineFile, match="its program says"):
        BACKEND.load(replace(part, weights={**part.weights, "head": replace(head, rows=head.rows + 1)}))


def test_records_mirror_the_header() -> None:
    library = cpu.open_library(cpu.library_path())
    assert not isinstance(library, ctypes.PyDLL)  # which would hold the GIL during a step
    assert library.edge_cpu_records() == cpu_records.RECORDS
    assert ctypes.sizeof(cpu_records.Op) < 1 << 16
    assert SIMD[0] == "scalar"
