"""A session holds what was planned, to the byte, before and after it served; decoding adds nothing."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
from real_engines import PLANNER, Engines

from edge_runtime import Request, Session, open_engine
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.engine.adapter import Adapter, LowRank
from edge_runtime.engine.memory import adapter_nbytes

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

WAYS = ("off", "draft", "lookup", "medusa")


def adapter(session: Session, rank: int) -> Adapter:
    tensors = session.manifest.parts["language"].program.tensors
    return {
        name: LowRank(
            np.full((rank, tensors[name].cols), 0.01, np.float16),
            np.full((tensors[name].rows, rank), 0.01, np.float16),
            1.0,
        )
        for name in ("layers.0.q", "layers.0.v", "layers.3.down", "embed")
    }


def serve(session: Session, tokens: int, adapter: str | None = None) -> None:
    """So many tokens, in eight requests at once."""
    for i in range(8):
        prompt = [5 + i, 9, 10, 11, 9, 10]
        session.submit(Request(prompt=prompt, max_tokens=tokens // 8, ignore_eos=True, adapter=adapter))
    while session.in_flight:
        session.step()


@pytest.mark.parametrize("kv", ["f16", "int8,int4", "int4c,int4"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_held_is_what_was_planned(engines: Engines, way: str, kv: str) -> None:
    for threads in (1, 3):
        with open_engine(
            engines.full("planner"), kv=kv, speculate=way, gated=False, threads=threads
        ) as session:
            assert session.memory_used == session.memory.need
            serve(session, 160)
            assert session.memory_used == session.memory.need


def test_adapters_are_counted(engines: Engines) -> None:
    path = engines.build("planner")
    with open_engine(path, speculate="off") as session:
        one, two = adapter(session, 3), adapter(session, 9)
        before = session.memory_used
        session.load_adapter("two", two)
        program, step = session.manifest.parts["language"].program, session.step_shape
        more = adapter_nbytes(program, step, {name: low.rank for name, low in two.items()})
        serve(session, 160, "two")
        assert session.memory_used == before + more
        session.drop_adapter("two")
        assert session.memory_used == before
    with open_engine(path, speculate="off", adapters={"a": one}) as session:
        serve(session, 160, "a")
        assert session.memory_used == session.memory.need
        assert session.memory.adapters > 0


def test_weights_in_another_packing_are_counted_wherever_they_are(engines: Engines) -> None:
    """An engine for a device with another packing, opened here: target and draft are packed anew."""
    words = ("--profile", "orin-nano-8gb", "--draft", str(PLANNER / "draft"))
    path = engines.build("planner", *words, name="orin")
    with open_engine(path, backend="cpu", speculate="draft", gated=False) as session:
        assert any("repacked at load" in notice for notice in session.notices)
        serve(session, 160)
        assert session.memory_used == session.memory.need


# --- nothing grows -----------------------------------------------------------------------------------------


class Heap(ctypes.Structure):
    """mallinfo2 of glibc: `uordblks` and `hblkhd` are the bytes that are allocated."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def heap() -> int:
    """Bytes that native code and Python have of malloc."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later, which counts what is allocated")
    libc.mallinfo2.restype = Heap
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def touch(session: Session) -> None:
    """Bring the arenas into memory, which their first use would else do bit by bit."""
    proposer = session.speculation.proposer
    beside = [getattr(proposer, "_executor", None), *getattr(proposer, "_executors", [])]
    for executor in (session._executor, *beside):
        if executor is not None:
            executor._arena._bytes[::4096] += 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", WAYS)
def test_steady_decoding_allocates_nothing(engines: Engines, way: str) -> None:
    """Over 2,000 tokens 64 KiB of heap at most (figures of requests are kept), and as much memory as before.

    In one of three times: a leak shows in each of them, a table of Python's own that doubles in one.
    """
    with open_engine(
        engines.full("planner"), speculate=way, draft_length=4, gated=False, threads=2
    ) as session:
        touch(session)
        serve(session, 1000)
        for last in (False, False, True):
            before = heap(), resident()
            serve(session, 2000)
            more = heap() - before[0], resident() - before[1]
            if more[0] <= 64 << 10 and more[1] <= 256 << 10:
                break
            assert not last, more
        assert session.memory_used == session.memory.need


def test_the_measure_sees_a_leak() -> None:
    before = heap(), resident()
    kept = np.ones(1 << 18)  # 2 MiB
    assert heap() - before[0] >= kept.nbytes
    block = mmap.mmap(-1, 2 << 20)
    block.write(b"x" * (2 << 20))
    assert resident() - before[1] >= 1 << 20
    block.close()
