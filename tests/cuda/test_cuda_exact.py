"""The exactness contract on the fake GPU: a token's numbers are the same bits whatever shares its step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_programs import (
    TABLES,
    Loader,
    equal,
    fed,
    i32,
    ids,
    model,
    opened,
    ready,
    rows,
    rows_part,
    step,
)
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.engine.device_code import CACHES
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Activation, Linear, Norm
from edge_runtime.engine.plan import StepShape

FORMATS = ("int4_g64", "int8_row", "int4_g128_zp", "nf4_g64", "f16", "bf16", "fp8_e4m3_row", "nvfp4_g16")
CHUNKS = (1, 7, 8, 9, 33)
LENGTH = 40


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


def whole(executor: CudaExecutor, text: Array, sequence: int = 0) -> Array:
    return executor.forward(step((sequence, 0, text))).copy()


def in_pieces(executor: CudaExecutor, text: Array, size: int, sequence: int = 0) -> Array:
    cuts = range(0, len(text), size)
    return np.concatenate([executor.forward(step((sequence, i, text[i : i + size]))).copy() for i in cuts])


# Each weight format, each cache, windows and caps, heads that are a tile and more
MODELS: list[dict[str, Any]] = [
    *({"fmt": fmt, "kv": CACHES[i % 4]} for i, fmt in enumerate(FORMATS)),
    *({"fmt": "int4_g64", "kv": kv, "softcap": 3.0, "page_tokens": 32} for kv in CACHES),
    {"fmt": "f16", "kv": "int4,fp8", "window": 11},
    {"fmt": "int8_g64", "kv": "int8", "head_dim": 20, "heads": 3, "kv_heads": 1},
    {"fmt": "int8_g64", "kv": "int8", "head_dim": 8, "heads": 34, "kv_heads": 2, "window": 17},
]
models = pytest.mark.parametrize("shape", MODELS, ids=lambda s: "-".join(map(str, s.values())))


@models
def test_chunks_and_batches(on_gpu: Loader, shape: dict[str, Any]) -> None:
    part = model(**shape)
    text, beside = ids(LENGTH), ids(20, 9)
    with opened(on_gpu(part)) as executor:
        want = whole(executor, text)
        assert equal(whole(executor, text), want), "from run to run"
        for sequence, size in ((0, 1), (1, 7), (2, 8), (1, 9), (0, 33)):
            assert equal(in_pieces(executor, text, size, sequence), want), (sequence, size)
        # Beside other sequences, before, between and after them
        executor.forward(step((1, 0, beside[:5])))
        first = executor.forward(step((1, 5, beside[5:9]), (0, 0, text[:23]))).copy()
        second = executor.forward(step((0, 23, text[23:24]), (1, 9, beside[9:10]))).copy()
        third = executor.forward(step((2, 0, beside), (0, 24, text[24:]), (1, 10, beside[:1]))).copy()
        found = np.concatenate([first[4:], second[:1], third[20:-1]])
        assert equal(found, want)
    with opened(on_gpu(part)) as executor:
        assert equal(in_pieces(executor, text, 9, 2), want), "of another executor"


def test_any_place_in_any_size_of_step(on_gpu: Loader) -> None:
    """The same token alone or as any of 2 to 40, so in all buckets and every slot of a block."""
    part = model("int4_g64", kv="int8")
    part = replace(part, step=StepShape(context=64, sequences=3, tokens=40, logits=40))
    with opened(on_gpu(part)) as executor:
        whole(executor, ids(11))
        one = step((0, 11, ids(1, 3)))
        want = executor.forward(one).copy()
        for count in (1, 2, 3, 7, 8, 15, 16, 31, 32, 39):
            for at in {0, count // 2, count}:
                before, after = ids(at, count), ids(count - at, at)
                runs = [(1, 0, before), (0, 11, ids(1, 3)), (2, 0, after)]
                found = executor.forward(step(*(run for run in runs if len(run[2]))))
                assert equal(found[at : at + 1], want), (count, at)


def test_logit_rows_do_not_matter(on_gpu: Loader) -> None:
    part = model("f16", kv="f16")
    batch = step((0, 0, ids(30)))
    with opened(on_gpu(part)) as executor:
        want = executor.forward(batch).copy()
        for chosen in ([29], [0, 3, 17], list(range(5, 30)), []):
            found = executor.forward(replace(batch, logit_rows=i32(chosen)))
            assert equal(found, want[chosen])


@pytest.mark.parametrize("kind", ["int4_g64", "f16"])
def test_rows_of_a_program_without_a_cache(on_gpu: Loader, kind: str) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((130, 72)).astype(np.float32)
    back = rng.standard_normal((72, 130)).astype(np.float32)
    ops = [
        Norm(x="x", out="x", weight="n", eps=1e-5),
        Linear(x="x", out="g", weight="w"),
        Activation(x="g", out="g", kind="gelu"),
        Linear(x="g", out="y", weight="back"),
    ]
    part = rows_part(
        ops, {"x": 72, "g": 130, "y": 72}, {"w": (kind, w), "back": (kind, back)}, {"n": np.ones(72)}
    )
    x = rows(40, 72)
    with opened(on_gpu(part)) as executor:
        want = executor.forward(fed(x)).copy()
        for size in CHUNKS:
            found = [executor.forward(fed(x[i : i + size])).copy() for i in range(0, 40, size)]
            assert equal(np.concatenate(found), want)


def test_thread_orders(on_gpu: Loader, thread_order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and threads up, down and shuffled give what they give upwards."""
    for shape in ({"fmt": "int4_g64", "kv": "int8"}, {"fmt": "nf4_g64", "kv": "fp8", "softcap": 3.0}):
        found = []
        for order in ("up", thread_order):
            monkeypatch.setenv("EDGE_EMU_ORDER", order)
            with opened(on_gpu(model(**shape, layers=1))) as executor:
                whole(executor, ids(LENGTH))
                after = executor.forward(step((0, LENGTH, ids(1)), (1, 0, ids(20)))).copy()
                found.append([after, executor.read_page(int(TABLES[0, 0]))])
        assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_the_comparisons_have_power(on_gpu: Loader) -> None:
    """Another token far back, or a last bit of one weight, shows."""
    part = model("f16", kv="f16")
    text = ids(LENGTH)
    with opened(on_gpu(part)) as executor:
        want = whole(executor, text)
        text[3] ^= 1
        assert not equal(whole(executor, text)[-1:], want[-1:])
    tensor = part.weights["0.q"]
    values = tensor.planes["w"].copy()
    values.view(np.uint16)[0] ^= 1
    spoiled = replace(tensor, planes={"w": values})
    with opened(on_gpu(replace(part, weights={**part.weights, "0.q": spoiled}))) as executor:
        assert not equal(whole(executor, ids(LENGTH)), want)


# --- caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", CACHES)
def test_copied_pages_are_as_good(on_gpu: Loader, kv: str) -> None:
    """A prefix that another sequence computed; then one that was dropped and is computed again."""
    part = model("int4_g64", kv=kv)
    text = ids(LENGTH)
    with opened(on_gpu(part)) as executor:
        want = whole(executor, text)
        for source, target in zip(TABLES[0][:2].tolist(), TABLES[1][:2].tolist(), strict=True):
            executor.copy_page(source, target)
        assert equal(executor.forward(step((1, 32, text[32:]))), want[32:])
        # Partly shared: the second page goes on with other tokens in one of the two
        executor.forward(step((1, 20, ids(3, 7))))
        assert equal(executor.forward(step((0, 32, text[32:]))), want[32:])
        # Preempted: its pages serve others, and are filled again in other pieces
        whole(executor, ids(LENGTH, 11))
        assert equal(in_pieces(executor, text[:20], 6), want[:20])
        assert equal(executor.forward(step((0, 20, text[20:]))), want[20:])


@pytest.mark.parametrize("kv", CACHES)
def test_saved_pages_are_as_good(on_gpu: Loader, kv: str) -> None:
    part = model("int4_g64", kv=kv)
    text = ids(LENGTH)
    with opened(on_gpu(part)) as executor:
        want = whole(executor, text)
        kept = [executor.read_page(page) for page in TABLES[0][:2].tolist()]
    with opened(on_gpu(part)) as executor:
        for page, data in zip(TABLES[2][:2].tolist(), kept, strict=True):
            executor.write_page(page, data)
        assert equal(executor.forward(step((2, 32, text[32:]))), want[32:])


# --- chains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MODELS[::3], ids=lambda s: "-".join(map(str, s.values())))
def test_a_chain_is_its_steps(on_gpu: Loader, shape: dict[str, Any]) -> None:
    part = model(**shape)
    texts = {0: ids(13), 1: ids(5, 8), 2: ids(20, 9)}
    with opened(on_gpu(part)) as executor:
        for sequence, text in texts.items():
            whole(executor, text, sequence)
        batch = step(*((s, len(text), ids(1, s)) for s, text in texts.items()))
        chained = executor.chain(batch, 12)
        found = []
        for n in range(12):
            at = replace(batch, positions=batch.positions + np.int32(n))
            found.append(executor.forward(at).argmax(axis=1).astype(np.int32))
            batch = replace(batch, tokens=found[-1])
        assert np.array_equal(chained, found) and chained.dtype == np.int32
        alone = step((1, 5, ids(1, 1)), tables=TABLES[1:2])
        alone = replace(alone, sequence=np.zeros(1, np.int32))
        assert np.array_equal(executor.chain(alone, 12), chained[:, 1:2])


# --- trees -------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A token of a tree; `before` is the node one position before it, None = it is in the cache."""

    token: int
    position: int
    place: int
    before: Node | None = None

    @property
    def path(self) -> list[Node]:
        return [*(self.before.path if self.before else []), self]


def tree(rng: np.random.Generator, first: int, count: int) -> list[Node]:
    """A random forest above a cache of `first` tokens, at random places."""
    places = first + rng.permutation(count + 6)[:count]
    nodes: list[Node] = []
    for place in places.tolist():
        before = nodes[rng.integers(len(nodes))] if nodes and rng.random() < 0.9 else None
        position = first if before is None else before.position + 1
        nodes.append(Node(int(rng.integers(70)), position, place, before))
    return nodes


def batch_of(nodes: list[Node], sequence: int = 0) -> StepBatch:
    at = {id(node): row for row, node in enumerate(nodes)}
    return StepBatch(
        i32([n.token for n in nodes]),
        i32([n.position for n in nodes]),
        i32([sequence] * len(nodes)),
        TABLES,
        i32(np.arange(len(nodes))),
        parents=i32([-1 if n.before is None else at[id(n.before)] for n in nodes]),
        places=i32([n.place for n in nodes]),
    )


def ends(nodes: list[Node]) -> Iterator[Node]:
    return (n for n in nodes if not any(m.before is n for m in nodes))


TREES: list[dict[str, Any]] = [
    *({"kv": kv, "page_tokens": 16 << (i % 2)} for i, kv in enumerate(CACHES)),
    *({"kv": "f16", "window": window, "softcap": 3.0} for window in (1, 5, 17)),
    {"kv": "int8", "head_dim": 8, "heads": 34, "kv_heads": 2},
]


@pytest.mark.parametrize("shape", TREES, ids=lambda s: "-".join(map(str, s.values())))
def test_paths_of_trees_are_plain_sequences(on_gpu: Loader, shape: dict[str, Any]) -> None:
    """Then the longest moves to its positions, and what follows is what follows the plain sequence."""
    part = model("int4_g64", layers=1, **shape)
    with opened(on_gpu(part)) as executor:
        for seed, (first, count) in enumerate([(13, 12), (30, 3), (0, 20), (24, 9)]):
            rng = np.random.default_rng(seed)
            nodes = tree(rng, first, count)
            text = ids(max(first, 1), seed)
            whole(executor, text)
            got = executor.forward(batch_of(nodes)).copy()
            row = {id(node): i for i, node in enumerate(nodes)}
            for end in ends(nodes):
                tokens = i32([n.token for n in end.path])
                want = executor.forward(step((0, first, tokens)))
                assert equal(np.stack([got[row[id(n)]] for n in end.path]), want), (seed, end.path)
            for i, place in enumerate(sorted(n.place for n in nodes)):
                nodes[i].place = place  # a path's places ascend, as `move` asks
            executor.forward(batch_of(nodes))
            path = max((n.path for n in nodes), key=len)
            moved = [n for n in path if n.place != n.position]
            executor.move(TABLES[0], i32([n.place for n in moved]), i32([n.position for n in moved]))
            after = step((0, first + len(path), ids(1, 3)))
            got = executor.forward(after).copy()
            executor.forward(step((0, first, i32([n.token for n in path]))))
            assert equal(got, executor.forward(after))


def test_trees_beside_chunks(on_gpu: Loader) -> None:
    """A tree of few and of many tokens in one step with another sequence's plain tokens."""
    part = model("int8_g64", kv="int8")
    with opened(on_gpu(part)) as executor:
        for count, beside in product((2, 12), (1, 17)):
            nodes = tree(np.random.default_rng(count), 13, count)
            whole(executor, ids(13))
            alone = executor.forward(batch_of(nodes)).copy()
            text = ids(beside, 4)
            plain = whole(executor, text, 1)
            one = batch_of(nodes)
            both = StepBatch(
                np.concatenate([one.tokens, text]),
                np.concatenate([one.positions, np.arange(beside, dtype=np.int32)]),
                np.concatenate([one.sequence, np.ones(beside, np.int32)]),
                TABLES,
                np.arange(count + beside, dtype=np.int32),
                parents=np.concatenate(
                    [one.parents, i32(np.arange(beside) - 1 + count * (np.arange(beside) > 0))]
                ),  # type: ignore[arg-type]
                places=np.concatenate([one.places, np.arange(beside, dtype=np.int32)]),  # type: ignore[arg-type]
            )
            got = executor.forward(both)
            assert equal(got[:count], alone) and equal(got[count:], plain)


def test_the_comparison_of_trees_has_power(on_gpu: Loader) -> None:
    """A path that sees its sibling in place of its parent gives other numbers."""
    with opened(on_gpu(model("int4_g64", kv="f16"))) as executor:
        whole(executor, ids(20))
        root = Node(5, 20, 20)
        first, second = Node(6, 21, 21, root), Node(7, 21, 22, root)
        right = executor.forward(batch_of([root, first, second, Node(8, 22, 23, second)])).copy()
        wrong = executor.forward(batch_of([root, first, second, Node(8, 22, 23, first)])).copy()
        assert equal(right[:3], wrong[:3]) and not equal(right[3], wrong[3])


def without_graphs(part: Part, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    executor = load(part)
    monkeypatch.setattr(executor._driver, "graphs", False)
    return executor


def test_a_driver_without_graphs_gives_the_same_bits(
    on_gpu: Loader, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = ready(model("int4_g64", kv="int8"), tmp_path)
    batches = step((0, 0, ids(LENGTH))), step((0, LENGTH, ids(1)), (1, 0, ids(9)))
    with opened(load(part)) as executor:
        want = [executor.forward(batch).copy() for batch in batches]
        chained = executor.chain(step((0, 41, ids(1)), tables=TABLES[:1]), 9)
    launched = fake_gpu.count("cuGraphLaunch")
    with opened(without_graphs(part, monkeypatch)) as executor:
        for batch, logits in zip(batches, want, strict=True):
            assert equal(executor.forward(batch), logits)
        assert np.array_equal(executor.chain(step((0, 41, ids(1)), tables=TABLES[:1]), 9), chained)
    assert fake_gpu.count("cuGraphLaunch") == launched
