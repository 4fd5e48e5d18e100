"""A part without a KV cache, such as an extra head: it needs no pages, and the file and loader know that."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from toy_engine import BLOBS, toy_manifest, toy_plan, toy_planes, toy_program

from builders.sources.medusa import head_program
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.manifest import PartEntry
from edge_runtime.engine.memory import memory_plan
from edge_runtime.engine.program import Program
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BuildError


def head(width: int = 32, vocab: int = 64) -> Program:
    return head_program(width, vocab, 64)


def entry(program: Program, pages: int, beside: int = 0) -> PartEntry:
    """A part with so many pages; `beside`: bytes of the parts that help it."""
    plan = toy_plan(program)
    kv = msgspec.structs.replace(plan.kv, pages=pages)
    memory = msgspec.structs.replace(plan.memory, kv=cache_nbytes(program, kv, plan.step), draft=beside)
    return PartEntry(program=program, plan=msgspec.structs.replace(plan, kv=kv, memory=memory))


def write(path: Path, parts: dict[str, PartEntry]) -> None:
    with EngineWriter(str(path), 64 * 1024, None) as writer:
        for name, part in parts.items():
            for plane, array in toy_planes(part.program, part.plan).items():
                writer.add(f"{name}/{plane}", array)
        for blob, data in BLOBS.items():
            writer.add(f"blob/{blob}", np.frombuffer(data, np.uint8))
        writer.finish(toy_manifest(parts))


@pytest.mark.parametrize("pages", [0, 8])
def test_a_head_beside_its_model_is_written_read_and_run(tmp_path: Path, pages: int) -> None:
    medusa = entry(head(), pages)
    language = entry(toy_program(), 8, beside=medusa.plan.memory.need)
    write(tmp_path / "a.edge", {"language": language, "medusa-1": medusa})
    with read_engine(tmp_path / "a.edge") as engine:
        part = engine.part("medusa-1")
        assert part.plan.memory.kv == 0
        executor = BACKEND.load(Part(part.program, part.weights, part.plan.kv, part.plan.step))
        zeros = np.zeros(2, np.int32)
        inputs = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)
        rows = np.arange(2, dtype=np.int32)
        batch = StepBatch(zeros, zeros, zeros, np.empty((1, 0), np.int32), rows, inputs=inputs)
        assert executor.forward(batch).shape == (2, 64)
        assert np.array_equal(executor.hidden.shape, (2, 32))
        executor.close()


def test_a_part_with_a_cache_still_needs_its_pages(tmp_path: Path) -> None:
    for pages, message in ((0, "kv.pages is 0, expected 1"), (3, "cannot hold a context of 64")):
        with pytest.raises(BuildError, match=message):
            write(tmp_path / "b.edge", {"language": entry(toy_program(), pages)})
    with pytest.raises(BuildError, match=r"kv\.pages is -1, expected 0"):
        write(tmp_path / "b.edge", {"language": entry(toy_program(), 8), "medusa-1": entry(head(), -1)})


def test_memory_of_a_head() -> None:
    program, plan = head(), toy_plan(head())
    memory = memory_plan(program, plan.tensors, plan.kv, plan.step, threads=2, total=1 << 30, reserve=0)
    assert (memory.kv, memory.weights) == (0, plan.memory.weights)
    tokens, logits = plan.step.tokens, plan.step.logits
    buffers = 2 * tokens * 32 * 4  # h and u
    scratch = tokens * (128 + 2 * (128 // 16) * 4)  # int8 codes; scales and sums of groups of 16
    scratch += logits * (32 + 64) * 4  # rows and logits
    assert memory.buffers == buffers + scratch
