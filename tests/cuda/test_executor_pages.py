"""What else the cuda executor gives and takes: pages, hidden rows, the likeliest tokens, long chains."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from device_programs import (
    TABLES,
    Loader,
    decoded,
    equal,
    i32,
    ids,
    model,
    opened,
    ready,
    rows,
    step,
)
from emulated_parts import load, packed, part_of
from fake_cuda import FakeCuda

from edge_runtime.backends.chain import run_chain
from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.protocol import Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.device_code import CACHES
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.ops import Gather, Input, KvAppend, Logits
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BadRequest

OTHERS = pytest.mark.parametrize("other", [CPU, REFERENCE], ids=["cpu", "reference"])


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


# --- pages -------------------------------------------------------------------------------------------------


def storing(kv: str, head_dim: int, page_tokens: int) -> Part:
    """Keys are the inputs as they come, values the same in another order."""
    width = 2 * head_dim
    order = np.random.default_rng(1).permutation(width).astype(np.float32)
    program = Program(
        ops=(
            Input(out="x"),
            Gather(x="x", out="v", order="order"),
            KvAppend(k="x", v="v", layer=0),
            Logits(x="v", weight="head"),
        ),
        tensors={"order": TensorSpec(1, width, "vector"), "head": TensorSpec(4, width, "head")},
        buffers={"x": width, "v": width},
        cache=(CacheSlot(2, head_dim),),
        vocab_size=4,
        max_context=64,
    )
    weights = {
        "order": packed(order[None], "f32", "rows"),
        "head": packed(np.zeros((4, width), np.float32), "f16", "m16"),
    }
    return part_of(program, weights, kv=kv, tokens=40, page_tokens=page_tokens, pages=12)


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize(("kv", "head_dim"), [*product(CACHES, (32,)), ("int8", 20), ("int4", 128)])
def test_bytes_of_pages_are_the_codecs(on_gpu: Loader, kv: str, head_dim: int, page_tokens: int) -> None:
    """Zeros, ties, denormals and outliers too; what no token was stored in stays as it was."""
    part = storing(kv, head_dim, page_tokens)
    x = rows(40, 2 * head_dim)
    x[1], x[2], x[3] = 0, -0.0, 1e-42
    x[4], x[5] = np.abs(x[4]), -np.abs(x[5])
    x[6] = np.arange(2 * head_dim) / 2
    x[7] *= np.float32(1e-7)
    x[8, 0] = 30000  # int4 on this backend ends where its scale is 2113
    batches = [replace(step((0, 0, np.zeros(23))), inputs=x[:23])]
    batches += [replace(step((0, 23, np.zeros(9)), (1, 3, np.zeros(8))), inputs=x[23:])]
    oracle = REFERENCE.load(part)
    with opened(on_gpu(part)) as executor:
        for batch in batches:
            executor.forward(batch)
            oracle.forward(batch)
        assert executor.page_nbytes == oracle.page_nbytes
        assert executor.page_nbytes == cache_nbytes(part.program, part.kv, part.step) // 12
        for page in range(12):
            np.testing.assert_array_equal(executor.read_page(page), oracle.read_page(page))


@OTHERS
@pytest.mark.parametrize("kv", CACHES)
def test_pages_go_to_other_backends_and_back(on_gpu: Loader, kv: str, other: object) -> None:
    part = model("f16", kv=kv)
    text, after = ids(32), step((1, 32, ids(5, 2)))
    host = other.load(part)  # type: ignore[attr-defined]
    pages = list(zip(TABLES[0][:2].tolist(), TABLES[1][:2].tolist(), strict=True))
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, text)))
        for source, target in pages:
            host.write_page(target, executor.read_page(source))
            executor.write_page(target, executor.read_page(source))
        want = executor.forward(after).copy()
        got = host.forward(after)
        assert np.abs(got - want).max() <= 5e-3 * np.abs(want).max()
        # And what the other computed, here
        host.forward(step((0, 0, text)))
        for source, target in pages:
            executor.write_page(target, host.read_page(source))
        got = executor.forward(after)
        assert np.abs(got - want).max() <= (3e-2 if kv in ("int4", "fp8") else 1e-2) * np.abs(want).max()
    host.close()


def test_a_read_page_is_a_copy(on_gpu: Loader) -> None:
    with opened(on_gpu(model("f16", kv="int8"))) as executor:
        page = int(TABLES[0, 0])
        executor.forward(step((0, 0, ids(16))))
        data = executor.read_page(page)
        kept = data.copy()
        executor.forward(step((0, 0, ids(16, 9))))
        assert equal(data, kept) and not equal(executor.read_page(page), kept)
        executor.copy_page(page, page)
        executor.copy_page(page, 11)
        assert equal(executor.read_page(11), executor.read_page(page))
        executor.write_page(page, kept[::-1][::-1])
        assert equal(executor.read_page(page), kept) and not equal(executor.read_page(11), kept)


@pytest.mark.parametrize("kv", CACHES)
def test_rows_move_as_in_the_reference(on_gpu: Loader, kv: str) -> None:
    """Across pages, and over places that are read themselves."""
    part = storing(kv, 32, 16)
    x = rows(40, 64)
    batch = replace(step((0, 0, np.zeros(40))), inputs=x)
    oracle = REFERENCE.load(part)
    rng = np.random.default_rng(2)
    with opened(on_gpu(part)) as executor:
        executor.forward(batch)
        oracle.forward(batch)
        for count in (1, 5, 39, 0):
            sources = i32(np.sort(rng.choice(np.arange(1, 40), count, replace=False)))
            targets = i32(
                np.minimum.accumulate(np.maximum(sources - rng.integers(0, 9, count), 0)[::-1])[::-1]
            )
            targets = i32(np.maximum.accumulate(targets + np.arange(count)) - np.arange(count))
            targets = i32(np.minimum(targets + np.arange(count), sources))
            if (np.diff(targets) <= 0).any():
                targets = i32(np.arange(count))
            for each in (executor, oracle):
                each.move(TABLES[0], sources, targets)
            for page in TABLES[0].tolist():
                np.testing.assert_array_equal(executor.read_page(page), oracle.read_page(page))


def test_moves_keep_to_the_context(on_gpu: Loader) -> None:
    """A longer row of pages than any sequence has, and places beyond: neither is written past its memory."""
    part = storing("int8", 32, 16)
    with opened(on_gpu(part)) as executor:
        executor.forward(replace(step((0, 0, np.zeros(40))), inputs=rows(40, 64)))
        wide = i32([*TABLES[0], *TABLES[1], *TABLES[2]] * 20)
        executor.move(wide, i32([5, 9]), i32([1, 2]))
        before = [executor.read_page(page) for page in range(12)]
        with pytest.raises(BadRequest, match="place 64 is beyond the context of 64"):
            executor.move(wide, i32([64]), i32([3]))
        with pytest.raises(BadRequest, match=r"place 3\d\d\d is beyond the context of 64"):
            executor.move(wide, i32(range(1, 3840)), i32(range(3839)))
        assert all(equal(executor.read_page(page), before[page]) for page in range(12))


# --- hidden rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["f16", "int4_g64"])
def test_hidden_rows_are_the_inputs_of_the_logits(on_gpu: Loader, fmt: str) -> None:
    part = model(fmt, head="f16")
    width = part.program.hidden_width
    with opened(on_gpu(part)) as executor:
        assert executor.hidden.shape == (0, width)
        batch = replace(step((0, 0, ids(9))), logit_rows=i32([1, 4, 6]))
        logits, hidden = executor.forward(batch).copy(), executor.hidden.copy()
        assert hidden.shape == (3, width) and hidden.dtype == np.float32
        head, bias = (decoded(part, n).astype(np.float64) for n in ("head", "head_bias"))
        want = 0.9 * (hidden.astype(np.float64) @ head.T + bias)
        assert np.abs(logits - want).max() <= 1e-3 * np.abs(want).max()
        executor.forward(step((0, 0, ids(9))))
        assert equal(executor.hidden[[1, 4, 6]], hidden)
        executor.likeliest(batch)
        assert equal(executor.hidden, hidden)
        executor.top(batch, 3)
        assert equal(executor.hidden, hidden)
        executor.forward(replace(step((0, 9, ids(1))), logit_rows=i32([])))
        assert executor.hidden.shape == (0, width)
        with pytest.raises(BadRequest):
            executor.forward(step((0, 0, ids(50))))
        assert executor.hidden.shape == (0, width), "of no step"


# --- the likeliest -----------------------------------------------------------------------------------------


def ordered(logits: Array, k: int) -> Array:
    """Ids of the greatest, equals by their lowest."""
    return np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k].astype(np.int32)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_likeliest_are_those_of_the_logits(on_gpu: Loader, softcap: float | None) -> None:
    part = model("int4_g64", kv="int8", softcap=softcap, layers=1)
    batch = replace(step((0, 0, ids(30))), logit_rows=i32([0, 3, 4, 29]))
    with opened(on_gpu(part)) as executor:
        logits = executor.forward(batch).copy()
        best = executor.likeliest(batch)
        assert best.dtype == np.int32 and np.array_equal(best, logits.argmax(axis=1))
        for k in (1, 5, 64):
            found, values = executor.top(batch, k)
            assert found.dtype == np.int32 and values.dtype == np.float32
            assert np.array_equal(found, ordered(logits, k))
            assert equal(values, np.take_along_axis(logits, found, axis=1))
        assert equal(executor.forward(batch), logits), "no cap is applied twice"
        none = replace(batch, logit_rows=i32([]))
        assert executor.likeliest(none).shape == (0,)
        assert [a.shape for a in executor.top(none, 2)] == [(0, 2), (0, 2)]
        for k in (0, -1, 71, 73):
            with pytest.raises(BadRequest, match=f"the {k} likeliest tokens; expected 1 to 70"):
                executor.top(batch, k)


def test_equals_go_to_the_lowest_id(on_gpu: Loader) -> None:
    """Two ids of the head alike, and all alike."""
    part = model("f16", layers=1)
    rng = np.random.default_rng(4)
    for pattern in (rng.integers(0, 6, 70), np.zeros(70, int)):
        values = rng.standard_normal((6, 72)).astype(np.float32)[pattern]
        bias = rng.standard_normal((1, 6)).astype(np.float32)[:, pattern]
        weights = {**part.weights, "head": packed(values, "f16", "m16"),
                   "head_bias": packed(bias, "f32", "rows")}  # fmt: skip
        batch = step((0, 0, ids(12)))
        with opened(on_gpu(replace(part, weights=weights))) as executor:
            logits = executor.forward(batch).copy()
            assert len(np.unique(logits[0])) == len(np.unique(pattern))
            assert np.array_equal(executor.likeliest(batch), logits.argmax(axis=1))
            assert np.array_equal(executor.top(batch, 64)[0], ordered(logits, 64))


# --- chains ------------------------------------------------------------------------------------------------


def test_a_chain_longer_than_one_of_its_histories(on_gpu: Loader) -> None:
    """150 steps of two sequences: as many steps by hand give the same tokens."""
    part = model("int8_g64", layers=1, context=200, pages=26)
    table = np.random.default_rng(1).permutation(26).reshape(2, 13).astype(np.int32)
    batch = step((0, 9, ids(1)), (1, 3, ids(1, 3)), tables=table)
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, ids(9)), (1, 0, ids(3)), tables=table))
        chained = executor.chain(batch, 150)
        assert chained.shape == (150, 2)
        assert np.array_equal(run_chain(executor, batch, 150), chained)
        assert len(np.unique(chained)) > 5, "not one token all along"
        assert executor.chain(batch, 0).shape == (0, 2)
        assert executor.hidden.shape[0] in (0, 2)


def test_a_chain_ends_at_the_context(on_gpu: Loader) -> None:
    part = model("f16", layers=1)
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, ids(40))))
        batch = step((0, 40, ids(1)), tables=TABLES[:1])
        assert executor.chain(batch, 24).shape == (24, 1)
        with pytest.raises(BadRequest, match="positions holds 64"):
            executor.chain(batch, 25)
        with pytest.raises(BadRequest, match="one token and one row of logits of each sequence"):
            executor.chain(step((0, 0, ids(2)), tables=TABLES[:1]), 3)
