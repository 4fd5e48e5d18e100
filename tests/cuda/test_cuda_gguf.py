"""A GGUF file of several block types, built for a GPU and answering on the fake one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "builders"))

from device_programs import opened, other, step
from emulated_parts import load
from fake_cuda import FakeCuda, add_module, cubin
from gguf_files import gguf_bytes, gguf_name, llama_metadata, random_blocks, spm_metadata
from hf_folders import llama_config, llama_shapes

from builders import pipeline
from builders.device_code import DeviceCode as Compiled
from builders.pipeline import Options, build
from builders.planner import DEFAULT, Request
from edge_runtime import open_engine
from edge_runtime.backends.protocol import DeviceCode, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.device_code import Kernel, source
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry
from edge_runtime.engine.profile import Profile

KINDS = {"Q4_K": "q4_k", "Q3_K": "q3_k", "Q5_1": "int5_g32_min", "Q2_K": "q2_k"}  # of the layers' matrices
TABLE = "Q6_K"  # of embedding and head


def write_gguf(path: Path) -> None:
    """A random Llama of one layer, as llama.cpp mixes its block types."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300, "head_dim": 64}
    config = llama_config(**shape, num_hidden_layers=1)
    rng = np.random.default_rng(0)
    tensors = {}
    for i, (key, size) in enumerate(llama_shapes(config).items()):
        kind = list(KINDS)[i % len(KINDS)] if "layers" in key else TABLE
        if len(size) == 1:
            tensors[gguf_name(key)] = ("F32", size, np.ones(size, "<f4").tobytes())
        else:
            tensors[gguf_name(key)] = (kind, size, random_blocks(kind, *size, rng))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"<fill{i}>" for i in range(300 - len(pieces))]
    vocabulary = spm_metadata({"model": {"vocab": {t: i for i, t in enumerate(pieces)}, "merges": []}})
    path.write_bytes(gguf_bytes(llama_metadata(config) | vocabulary, tensors))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Builds compile their kernels for the fake GPU."""

    def compiled(kernels: Sequence[Kernel], profile: Profile, room: int) -> Compiled:
        text = source(kernels)
        image = cubin(87, content=text.encode())
        assert len(image) <= room
        add_module(tmp_path, image, text)
        entry = DeviceCodeEntry(
            blob="device.sm_87.cubin",
            kind="cubin",
            sm=87,
            ptx="8.5",
            cuda="12.6",
            nbytes=len(image),
            kernels={
                k.symbol: KernelEntry(
                    threads=k.threads,
                    shared_bytes=0,
                    registers=32,
                    stack_bytes=0,
                    spill_stores=0,
                    spill_loads=0,
                )
                for k in kernels
            },
        )
        return Compiled({entry.blob: image}, (entry,))

    monkeypatch.setattr(pipeline, "compile_device_code", compiled)


@pytest.mark.usefixtures("emulated")
def test_a_mixed_gguf_file_answers_on_a_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    path = tmp_path / "m.edge"
    build(Options(tmp_path / "m.gguf", path, "orin", Request(weights=DEFAULT, sequences=1), measure=False))
    with read_engine(path) as engine:
        stored = engine.part("language")
        tensors = stored.plan.tensors
        found = {t.format for n, t in tensors.items() if stored.program.tensors[n].role != "vector"}
        assert found == {*KINDS.values(), "q6_k"}
        assert {t.packing for n, t in tensors.items() if t.format in found} == {"m16"}
        code = DeviceCode(engine.manifest.device_code, engine.blob)
        shape = msgspec.structs.replace(stored.plan.step, logits=20)
        part = Part(stored.program, stored.weights, stored.plan.kv, shape, code)
        ids = np.random.default_rng(1).integers(3, 300, 20)
        tables = np.arange(8, dtype=np.int32).reshape(1, 8)
        batches = step((0, 0, ids[:19]), tables=tables), step((0, 19, ids[19:]), tables=tables)
        with opened(load(part)) as executor:
            got = np.concatenate([executor.forward(batch).copy() for batch in batches])
        want = np.concatenate(other(REFERENCE, part, *batches))
    apart = np.abs(got - want) / np.abs(want).max()
    assert apart.max() <= 0.08 and np.median(apart) <= 8e-3  # as decoders of every format are
    with open_engine(path, backend="cuda") as session:
        answer = session.complete("the cat", max_tokens=5)
    assert 1 <= len(answer.tokens) <= 5
