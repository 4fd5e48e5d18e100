"""Embedding and head in several matrices: to the bit what one matrix gives that is rounded the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from cpu_programs import Array, decoded, ids, instruction_sets, llama, packed, part_of, run, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Backend, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.adapter import LowRank
from edge_runtime.engine.memory import adapter_nbytes, low_rank_layout
from edge_runtime.engine.ops import AnyOp, Embed, Logits
from edge_runtime.engine.program import TensorSpec

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

ENDS = ((7, 70), (16, 32, 64, 70), (1, 2, 3, 40, 69, 70))
BOTH = pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])


def cut(part: Part, ends: tuple[int, ...], *formats: str) -> Part:
    """The part with embedding and head in blocks, of these formats in turn (none: as they were)."""
    tensors, weights = dict(part.program.tensors), dict(part.weights)
    ops: list[AnyOp] = []
    for op in part.program.ops:
        if not isinstance(op, Embed | Logits):
            ops.append(op)
            continue
        spec, whole = tensors.pop(op.weight), weights.pop(op.weight)
        values = decoded(whole)
        for i, (first, end) in enumerate(zip((0, *ends), ends, strict=False)):
            name, fmt = f"{op.weight}.{first}", formats[i % len(formats)] if formats else whole.format
            tensors[name] = TensorSpec(end - first, spec.cols, spec.role)
            weights[name] = packed(values[first:end], fmt)
            ops.append(msgspec.structs.replace(op, weight=name, first=first))
    program = msgspec.structs.replace(part.program, ops=tuple(ops), tensors=tensors)
    return part_of(program, weights, tokens=part.step.tokens)


@pytest.mark.parametrize("fmt", ["f32", "f16", "int8_row", "int8_g32", "int4_g32", "nf4_g64", "q4_k"])
@pytest.mark.parametrize("ends", ENDS)
def test_blocks_are_the_whole(fmt: str, ends: tuple[int, ...]) -> None:
    """Every path, one and two threads, one token and many; a softcap too. Formats that give their own values
    back, so that a block is a slice of the whole."""
    part = llama(fmt, softcap=5.0 if len(ends) == 4 else None)
    values = {n: decoded(w) for n, w in part.weights.items() if n in ("embed", "head")}
    blocks = cut(part, ends)
    for name, whole in values.items():
        made = np.concatenate([decoded(w) for n, w in blocks.weights.items() if n.startswith(f"{name}.")])
        assert np.array_equal(made, whole) or fmt in ("nf4_g64", "q4_k")
    for count in (1, 19):
        batch = step((0, 0, ids(count)), (1, 0, ids(3, 6)))
        for simd in instruction_sets():
            for threads in (1, 2):
                got = run(blocks, batch, threads=threads, simd=simd)
                if fmt in ("nf4_g64", "q4_k"):  # rounded anew
                    want = REFERENCE.load(blocks).forward(batch)
                    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
                else:
                    assert np.array_equal(got, run(part, batch, threads=threads, simd=simd))


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_different_formats(threads: int) -> None:
    """A quantizing and a float block, and one of another group, in turn: as near to the reference, whose
    activations are f32, as the same model with its head whole."""
    part = llama("int8_g32", tokens=64)
    batch = step((0, 0, ids(40)), (1, 0, ids(9, 6)))
    for formats in (("int8_g32", "f16"), ("f32", "int8_g32", "int8_row"), ("int8_row", "int8_row", "f16")):
        blocks = cut(part, ENDS[1], *formats)
        want = REFERENCE.load(blocks).forward(batch)
        whole = np.abs(run(part, batch) - REFERENCE.load(part).forward(batch)).max()
        assert np.abs(run(blocks, batch, threads=threads) - want).max() <= 2 * whole


def test_the_reference_is_the_decoded_whole() -> None:
    part = llama("f32")
    batch = step((0, 0, ids(21)))
    want = REFERENCE.load(part).forward(batch)
    for ends in ENDS:
        got = REFERENCE.load(cut(part, ends)).forward(batch)
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@BOTH
def test_an_adapter_of_the_head_is_cut_with_it(backend: Backend) -> None:
    """B's rows go with their block; A stays. The scratch has a place for the A x of each block."""
    part = llama("f32")
    rng = np.random.default_rng(3)
    spec = part.program.tensors["head"]
    a = rng.standard_normal((5, spec.cols)).astype(np.float16)
    b = rng.standard_normal((spec.rows, 5)).astype(np.float16)
    batch = step((0, 0, ids(21)), (1, 0, ids(6, 6)))

    def answer(part: Part, adapter: dict[str, LowRank]) -> Array:
        executor = backend.load(part)
        number = executor.add_adapter(adapter)
        using = replace(batch, adapters=np.array([number, -1], np.int32))
        logits = executor.forward(using).copy()
        executor.close()
        return logits

    want = answer(part, {"head": LowRank(a, b, 0.3)})
    blocks = cut(part, ENDS[1])
    ends = (0, *ENDS[1])
    adapter = {f"head.{first}": LowRank(a, b[first:end], 0.3) for first, end in pairwise(ends)}
    assert np.abs(answer(blocks, adapter) - want).max() <= 1e-5 * np.abs(want).max()
    some = {"head.16": adapter["head.16"]}
    plain = answer(part, {"0.q": LowRank(a, np.zeros((128, 5), np.float16), 1.0)})
    got = answer(blocks, some)
    inside = slice(16, 32)
    assert np.abs(got[:, inside] - want[:, inside]).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(np.delete(got - plain, np.r_[inside], axis=1)).max() <= 1e-5 * np.abs(want).max()
    offsets, stride = low_rank_layout(blocks.program, {name: 5 for name in adapter})
    assert sorted(offsets.values()) == [0, 8, 16, 24] and stride == 32
    assert adapter_nbytes(blocks.program, blocks.step, {name: 5 for name in adapter}) > 0


def test_tokens_of_every_block_are_looked_up() -> None:
    """Each id's row is its own, at both ends of a block."""
    part = cut(llama("f32"), ENDS[1])
    table = np.concatenate([decoded(w) for n, w in part.weights.items() if n.startswith("embed.")])
    wanted = np.array([0, 15, 16, 31, 32, 63, 64, 69], np.int32)
    executor = REFERENCE.load(part)
    found = next(buffers["h"].copy() for at, buffers in executor.walk_hidden(step((0, 0, wanted))) if at == 3)
    assert np.array_equal(found, table[wanted] * np.float32(1.5))
