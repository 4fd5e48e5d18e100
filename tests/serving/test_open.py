"""open_engine on a whole file: devices, sizes, memory, and a runtime without the builder's libraries."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from speaking_engine import write_speaking

import edge_runtime
from edge_runtime import (
    BackendUnavailable,
    BadConfig,
    BadEngineFile,
    BadRequest,
    DeviceMismatch,
    DoesNotFit,
    Request,
    Sampling,
    open_engine,
)
from edge_runtime.backends import cpu
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.manifest import Fingerprint, KnownAnswer
from edge_runtime.engine.probe import Machine
from edge_runtime.engine.profile import load_profile
from edge_runtime.serving.guessing import Guessing
from edge_runtime.serving.medusa import NODES, MedusaHeads

ORIN = Fingerprint(
    profile="orin-nano-8gb", backend="cuda", compute_capability="8.7", abi=f"{abi_hash():016x}"
)
LAPTOP = Machine(
    kind="cpu", model="Some CPU", profile=load_profile("cpu"), memory_source="test", cores=2, features=()
)
BACKENDS = ["reference", *(["cpu"] if cpu.BACKEND.available().ok else [])]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "speaking.edge"
    write_speaking(path)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kv", [None, "f16", "int8", "int4", "fp8", "f16,int4", "fp8, int8", "int4c", "int8c,fp8"]
)
def test_every_cache_format_generates(engine: Path, backend: str, kv: str | None) -> None:
    with open_engine(engine, backend=backend, kv=kv, threads=1) as session:
        assert (session.kv.k, session.kv.v) == kv_pair(kv or "int8")
        told = [n for n in session.notices if n.startswith("KV cache in")]
        assert len(told) == (kv not in (None, "int8"))
        done = session.complete("Once upon a time", max_tokens=8)
        assert len(done.tokens) == 8 and done.finish_reason == "length"
        again = session.complete("Once upon a time", Sampling(temperature=1.0, seed=1), max_tokens=8)
        assert again.tokens != done.tokens
        assert session.pages_used == 0


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not built")
def test_the_memory_planned_is_the_memory_held(engine: Path) -> None:
    with open_engine(engine, backend="cpu", threads=1) as session:
        assert session.memory_used == session.memory.need
        session.complete("Once upon a time", max_tokens=20)
        assert session.memory_used == session.memory.need


def test_memory_is_checked_before_anything_is_loaded(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(engine, backend="reference") as session:
        need = session.memory.need
    from edge_runtime.backends import reference

    loads = []
    monkeypatch.setattr(type(reference.BACKEND), "load", lambda *a, **k: loads.append(a))
    with pytest.raises(DoesNotFit) as caught:
        open_engine(engine, backend="reference", memory_limit=need - 1)
    assert (caught.value.need, caught.value.have, caught.value.source) == (need, need - 1, "the memory limit")
    assert not loads
    monkeypatch.undo()
    open_engine(engine, backend="reference", memory_limit=need).close()


def test_less_context_takes_less_memory(engine: Path) -> None:
    with open_engine(engine, backend="reference") as session:
        assert session.context == 64
        whole = session.memory
    with open_engine(engine, backend="reference", context=20) as session:
        assert session.context == 20 and session.kv.pages == 4
        assert session.memory.kv == whole.kv // 2 and session.memory.need == whole.need - whole.kv // 2
        assert len(session.complete([7] * 15, max_tokens=50).tokens) == 5


def test_fewer_sequences_at_once_take_less_memory(tmp_path: Path) -> None:
    write_speaking(tmp_path / "four.edge", sequences=4)
    with open_engine(tmp_path / "four.edge", backend="reference") as session:
        whole = session.memory
        assert (session.step_shape.sequences, session.kv.pages) == (4, 16)
    with open_engine(tmp_path / "four.edge", backend="reference", parallel=1) as session:
        assert (session.step_shape.sequences, session.kv.pages) == (1, 4)
        assert session.memory.kv == whole.kv // 4 and session.memory.buffers < whole.buffers
        for i in range(3):
            session.submit(Request(prompt=[7 + i] * 5, max_tokens=3))
        most = 0
        while session.in_flight:
            session.step()
            most = max(most, session.snapshot()["running"])
        assert most <= 1 and session.metrics.finished["length"] == 3
    for wrong in (0, 5):
        with pytest.raises(BadConfig, match="1 to 4 sequences"):
            open_engine(tmp_path / "four.edge", parallel=wrong)


def test_another_device_is_refused_with_both_names(tmp_path: Path) -> None:
    write_speaking(tmp_path / "orin.edge", fingerprint=ORIN)
    with pytest.raises(DeviceMismatch) as caught:
        open_engine(tmp_path / "orin.edge", machine=LAPTOP)
    text = str(caught.value)
    assert "orin-nano-8gb (cuda, compute capability 8.7)" in text and "Some CPU (cpu)" in text
    assert "--backend cpu" in text


def test_a_matching_device_passes_on_to_its_backend(tmp_path: Path) -> None:
    write_speaking(tmp_path / "orin.edge", fingerprint=ORIN)
    orin = msgspec.structs.replace(LAPTOP, model="Orin Nano", profile=load_profile("orin-nano-8gb"))
    other = msgspec.structs.replace(LAPTOP, model="RTX 4090", profile=load_profile("rtx-4090"))
    # There is no cuda backend in this build yet: that, and not the device, is what is missing
    with pytest.raises(BackendUnavailable, match="cuda"):
        open_engine(tmp_path / "orin.edge", machine=orin)
    with pytest.raises(DeviceMismatch, match=r"RTX 4090 \(cuda, compute capability 8\.9\)"):
        open_engine(tmp_path / "orin.edge", machine=other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_opens_it_and_says_so(tmp_path: Path, backend: str) -> None:
    write_speaking(tmp_path / "orin.edge", fingerprint=ORIN)
    with open_engine(tmp_path / "orin.edge", backend=backend) as session:
        assert session.notices[0].startswith(
            "planned for orin-nano-8gb (cuda, compute capability 8.7), opened on"
        )
        assert len(session.complete("hi", max_tokens=3).tokens) == 3


def test_verify_holds_the_engine_to_its_known_answer(tmp_path: Path, engine: Path) -> None:
    with open_engine(engine, backend="reference") as session:
        answer = session.complete([7, 8, 9], max_tokens=8).tokens
    known = KnownAnswer(prompt=(7, 8, 9), answer=answer, backend="reference")
    write_speaking(tmp_path / "known.edge", known_answer=known)
    with open_engine(tmp_path / "known.edge", backend="reference") as session:
        session.verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cup"}, "unknown backend 'cup'; did you mean 'cpu'?"),
        ({"backend": "protocol"}, "unknown backend 'protocol'"),
        ({"backend": "../cpu"}, "unknown backend"),
        ({"kv": "int9"}, "unknown KV format 'int9'"),
        ({"kv": "int8,int8,int8"}, "expected one, or K,V"),
        ({"context": 65}, "planned for 2 to 64 tokens"),
        ({"context": 0}, "planned for 2 to 64 tokens"),
        ({"threads": -1}, "threads is -1"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"max_waiting": 0}, "max_waiting is 0"),
    ],
)
def test_bad_options_are_named(engine: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(BadConfig) as caught:
        open_engine(engine, **{"backend": "reference"} | options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_an_unknown_part_is_named(engine: Path) -> None:
    with pytest.raises(BadEngineFile, match="no part 'vision'"):
        open_engine(engine, backend="reference", part="vision")


def test_files_are_not_kept_open(engine: Path) -> None:
    gc.collect()  # what earlier tests left behind is not this test's
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with open_engine(engine, backend="reference") as session, pytest.raises(BadRequest):
            session.complete("")
        with pytest.raises(BadConfig):
            open_engine(engine, backend="reference", kv="no")
    assert len(os.listdir("/proc/self/fd")) <= before


BLOCKED = ("torch", "onnx", "transformers", "rclpy", "rich", "minijinja", "scipy", "matplotlib", "builders")


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
    root = str(Path(edge_runtime.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, env=environment, check=False
    )


def test_import_takes_nothing_of_the_builder() -> None:
    done = run_blocked(
        "import edge_runtime; print(sorted(m for m in sys.modules if m.startswith('edge_runtime')))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['edge_runtime']"


@pytest.mark.parametrize("backend", BACKENDS)
def test_opening_and_generating_take_nothing_of_the_builder(engine: Path, backend: str) -> None:
    done = run_blocked(
        "from edge_runtime import open_engine, Sampling\n"
        f"with open_engine({str(engine)!r}, backend={backend!r}) as s:\n"
        "    warm = Sampling(temperature=1.0)\n"
        "    print(len(s.complete('Once upon a time', warm, max_tokens=5, ignore_eos=True).tokens))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"


def test_every_public_name_exists() -> None:
    for name in edge_runtime.__all__:
        assert getattr(edge_runtime, name) is not None
    assert set(edge_runtime.__all__) == set(dir(edge_runtime))
    with pytest.raises(AttributeError, match="no attribute 'open_engin'"):
        _ = edge_runtime.open_engin


def test_a_draft_length_bounds_a_tree_too() -> None:
    assert MedusaHeads([], most=NODES[-1]).lengths == NODES
    assert MedusaHeads([], most=9).lengths == (2, 4, 8, 9) and MedusaHeads([], most=1).lengths == (1,)
    assert Guessing("medusa", 9, trees=True).rows == 10 and Guessing("off", 9).rows == 1
