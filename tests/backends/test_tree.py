"""Trees of tokens: a path's numbers are those of the same tokens run as a plain sequence, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from cpu_programs import PAGES, Array, ids, instruction_sets, llama, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Executor, Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.kv import KV_FORMATS
from edge_runtime.errors import BadRequest

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

CONTEXT = 64
TABLES = np.array([PAGES[0], PAGES[1], (8, 9, 10, 11)], np.int32)


def i32(values: object) -> Array:
    return np.asarray(values, np.int32)


@dataclass
class Node:
    """A token of a step; `before` is the node one position before it, None = it is in the cache."""

    sequence: int
    token: int
    position: int
    place: int
    before: Node | None = None

    @property
    def path(self) -> list[Node]:
        return [*(self.before.path if self.before else []), self]


def tree(rng: np.random.Generator, sequence: int, first: int, count: int, spread: int = 6) -> list[Node]:
    """A random forest above a cache of `first` tokens, at random places from `first` on."""
    room = min(CONTEXT - first, count + spread)
    places = first + rng.permutation(room)[: min(count, room)]
    nodes: list[Node] = []
    for place in places.tolist():
        before = nodes[rng.integers(len(nodes))] if nodes and rng.random() < 0.9 else None
        position = first if before is None else before.position + 1
        nodes.append(Node(sequence, int(rng.integers(70)), position, place, before))
    return nodes


def plain(sequence: int, first: int, tokens: Array, chained: bool = True) -> list[Node]:
    """Tokens at their own positions: a prompt's chunk or a decoding token."""
    nodes: list[Node] = []
    for i, token in enumerate(tokens.tolist()):
        before = nodes[-1] if nodes and chained else None
        nodes.append(Node(sequence, token, first + i, first + i, before))
    return nodes


def mixed(rng: np.random.Generator, *groups: list[Node]) -> list[Node]:
    """One step of all groups, whose rows may alternate; a group keeps its order."""
    turns = rng.permutation(np.repeat(np.arange(len(groups)), [len(g) for g in groups]))
    left = [iter(group) for group in groups]
    return [next(left[turn]) for turn in turns.tolist()]


def batch_of(nodes: list[Node]) -> StepBatch:
    rows = {id(node): row for row, node in enumerate(nodes)}
    return StepBatch(
        i32([n.token for n in nodes]),
        i32([n.position for n in nodes]),
        i32([n.sequence for n in nodes]),
        TABLES,
        i32(np.arange(len(nodes))),
        parents=i32([-1 if n.before is None else rows[id(n.before)] for n in nodes]),
        places=i32([n.place for n in nodes]),
    )


def prefill(executor: Executor, sequence: int, text: Array) -> None:
    for at in range(0, len(text), 32):
        executor.forward(replace(step((sequence, at, text[at : at + 32])), page_tables=TABLES))


def as_plain(executor: Executor, node: Node) -> Array:
    """Logits of the node's path, run as a plain sequence on what the cache holds below it."""
    path = node.path
    tokens = i32([n.token for n in path])
    batch = replace(step((node.sequence, path[0].position, tokens)), page_tables=TABLES)
    return executor.forward(batch).copy()


def compare(part: Part, seed: int, *, threads: int = 1, simd: str = "auto") -> int:
    """Random trees of three sequences, beside a chunk and a decoding token; returns how many paths agree."""
    rng = np.random.default_rng(seed)
    executor = BACKEND.load(part, threads=threads, simd=simd)
    lengths = rng.integers(0, 50, 3).tolist()
    for sequence, length in enumerate(lengths):
        if length:
            prefill(executor, sequence, ids(length, seed + sequence))
    chunk = plain(1, lengths[1], ids(int(rng.integers(1, 9)), seed), chained=bool(rng.integers(2)))
    nodes = mixed(
        rng,
        tree(rng, 0, lengths[0], int(rng.integers(1, 14))),
        chunk,
        tree(rng, 2, lengths[2], int(rng.integers(1, 8)), spread=0),
    )
    got = executor.forward(batch_of(nodes)).copy()
    ends = [n for n in nodes if not any(m.before is n for m in nodes)]
    row = {id(node): i for i, node in enumerate(nodes)}
    for end in ends:
        if end.sequence == 1 and end.before is None:
            continue  # of an unchained chunk; compared as a whole below
        want = as_plain(executor, end)
        found = np.stack([got[row[id(n)]] for n in end.path])
        assert np.array_equal(found.view(np.int32), want.view(np.int32)), (seed, end.path)
    tokens = i32([n.token for n in chunk])
    want = executor.forward(replace(step((1, lengths[1], tokens)), page_tables=TABLES))
    assert np.array_equal(np.stack([got[row[id(n)]] for n in chunk]), want)
    executor.close()
    return len(ends)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_paths_are_plain_sequences(kv: str, page_tokens: int) -> None:
    part = llama("int4_g64", kv=kv, page_tokens=page_tokens, head_dim=64 if kv == "int4" else 32)
    assert sum(compare(part, seed, threads=1 + seed % 2) for seed in range(12)) > 24


@pytest.mark.parametrize("window", [1, 5, 17, 40])
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_windows(window: int, page_tokens: int) -> None:
    part = llama("f16", kv="f16", window=window, softcap=3.0, page_tokens=page_tokens)
    for seed in range(8):
        compare(part, 100 + seed)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 20), (4, 4, 32), (6, 2, 48)])
def test_grouped_heads_and_tails(heads: int, kv_heads: int, head_dim: int) -> None:
    part = llama("int8_g64", kv="int8", heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for seed in range(6):
        compare(part, 200 + seed, threads=1 + seed % 2)


@pytest.mark.parametrize("simd", instruction_sets())
def test_instruction_sets(simd: str) -> None:
    part = llama("int4_g32_zp", kv="fp8", window=19)
    for seed in range(3):
        compare(part, 300 + seed, simd=simd, threads=2)


def test_instruction_sets_and_threads_agree_on_a_tree() -> None:
    part = llama("int4_g64", kv="int8")
    nodes = tree(np.random.default_rng(4), 0, 21, 12)
    answers = []
    for simd in instruction_sets():
        for threads in (1, 2):
            executor = BACKEND.load(part, threads=threads, simd=simd)
            prefill(executor, 0, ids(21))
            answers.append(executor.forward(batch_of(nodes)).copy())
            executor.close()
    assert all(np.array_equal(a, answers[0]) for a in answers)


@pytest.mark.parametrize("window", [None, 3, 18])
@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_trees_equal_the_reference(window: int | None, kv: str) -> None:
    part = llama("f32", kv=kv, window=window)
    rng = np.random.default_rng(5)
    executor, oracle = BACKEND.load(part, threads=2), REFERENCE.load(part)
    for each in (executor, oracle):
        prefill(each, 0, ids(28))
        prefill(each, 2, ids(3))
    nodes = mixed(rng, tree(rng, 0, 28, 14), tree(rng, 2, 3, 6), plain(1, 0, ids(7)))
    got, want = executor.forward(batch_of(nodes)), oracle.forward(batch_of(nodes))
    assert np.abs(got - want).max() <= (1e-5 if kv == "f32" else 5e-3) * np.abs(want).max()
    assert np.abs(executor.hidden - oracle.hidden).max() <= 1e-2
    # And the oracle's own paths are plain sequences, to the rounding of its products
    end = max((n for n in nodes if n.sequence == 0), key=lambda n: len(n.path))
    want = want[[nodes.index(n) for n in end.path]]
    limit = (1e-4 if kv == "f32" else 5e-3) * np.abs(want).max()
    assert np.abs(as_plain(oracle, end) - want).max() <= limit
    executor.close()


def test_the_comparison_has_power() -> None:
    """A path that sees its sibling in place of its parent gives other numbers."""
    part = llama("int4_g64", kv="f16")
    executor = BACKEND.load(part)
    prefill(executor, 0, ids(20))
    root = Node(0, 5, 20, 20)
    first, second = Node(0, 6, 21, 21, root), Node(0, 7, 21, 22, root)
    right = executor.forward(batch_of([root, first, second, Node(0, 8, 22, 23, second)])).copy()
    wrong = executor.forward(batch_of([root, first, second, Node(0, 8, 22, 23, first)])).copy()
    assert np.array_equal(right[:3], wrong[:3])
    assert not np.array_equal(right[3], wrong[3])
    executor.close()


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_accepted_path_moves_to_its_positions(backend: str, kv: str) -> None:
    part = llama("f32", kv=kv)
    executor = (BACKEND if backend == "cpu" else REFERENCE).load(part)
    prefill(executor, 0, ids(13))
    nodes = tree(np.random.default_rng(7), 0, 13, 12)  # crosses into the second page
    for i, place in enumerate(sorted(n.place for n in nodes)):
        nodes[i].place = place
    executor.forward(batch_of(nodes))
    path = max((n.path for n in nodes), key=len)
    moved = [n for n in path if n.place != n.position]
    assert len(moved) > 2
    executor.move(TABLES[0], i32([n.place for n in moved]), i32([n.position for n in moved]))
    after = 13 + len(path)
    got = executor.forward(replace(step((0, after, ids(1, 3))), page_tables=TABLES)).copy()
    fresh = (BACKEND if backend == "cpu" else REFERENCE).load(part)
    prefill(fresh, 0, ids(13))
    fresh.forward(replace(step((0, 13, i32([n.token for n in path]))), page_tables=TABLES))
    want = fresh.forward(replace(step((0, after, ids(1, 3))), page_tables=TABLES))
    if backend == "cpu":
        assert np.array_equal(got, want)
    else:  # BLAS rounds by shape, and a narrow cache turns that into a step of its scale
        assert np.abs(got - want).max() <= 5e-3 * np.abs(want).max()
    executor.move(TABLES[0], i32([]), i32([]))
    executor.close()
    fresh.close()


# --- refusals ----------------------------------------------------------------------------------------------


def good() -> StepBatch:
    """Two branches above 14 cached tokens of sequence 0 and a token of sequence 1."""
    a = Node(0, 1, 14, 14)
    b, c = Node(0, 2, 15, 15, a), Node(0, 3, 15, 16, a)
    return batch_of([a, b, c, Node(0, 4, 16, 17, b), Node(1, 5, 0, 0), Node(0, 6, 16, 18, c)])


BAD = [
    ("parents", 3, 4, "token 3 names row 4 as its parent"),  # later
    ("parents", 3, 3, "token 3 names row 3 as its parent"),
    ("parents", 5, 4, "token 5 names row 4 as its parent"),  # another sequence
    ("parents", 3, 0, "token 3 names row 0 as its parent"),  # two positions before
    ("parents", 1, -2, "token 1 names row -2 as its parent"),
    ("places", 3, 13, "(token 3|places)"),  # below what it sees
    ("places", 3, -1, "(token 3|places)"),
    ("places", 3, 64, "(token 3|places)"),
    ("places", 3, 16, "(token 3 is the second|two tokens)"),
    ("positions", 1, 64, "(token 1|positions)"),
    ("page_tables", 1, -1, "token 2 at position 15 needs page -1|token 2 needs page -1"),  # of its place
    ("page_tables", 0, 12, "token 0 (at position 14 )?needs page 12"),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), BAD)
def test_bad_trees_are_refused(name: str, at: int, value: int, message: str) -> None:
    for backend in (BACKEND, REFERENCE):
        executor = backend.load(llama("f16"))
        prefill(executor, 0, ids(14))
        array = getattr(good(), name).copy()
        array.reshape(-1)[at] = value
        with pytest.raises(BadRequest, match=message):
            executor.forward(replace(good(), **{name: array}))
        executor.forward(good())
        executor.close()


def test_half_a_tree_is_refused() -> None:
    for backend in (BACKEND, REFERENCE):
        executor = backend.load(llama("f16"))
        for changes, message in (
            ({"parents": None}, "both parents and places"),
            ({"places": None}, "both parents and places"),
            ({"places": good().places[:2]}, "places has 2 entries for 6 tokens"),
            ({"parents": good().parents.astype(np.float32)}, "parents is 1-D float32"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.forward(replace(good(), **changes))
        executor.close()


def test_both_backends_refuse_the_same_steps() -> None:
    """Good steps with one number changed: what one backend takes, the other takes."""
    part = llama("f32", window=9)
    cpu, oracle = BACKEND.load(part), REFERENCE.load(part)
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(300):
        lengths = rng.integers(0, 40, 2).tolist()
        nodes = mixed(rng, tree(rng, 0, lengths[0], 6), plain(1, lengths[1], ids(3)))
        batch = batch_of(nodes)
        if rng.random() < 0.3:
            batch = replace(step((0, lengths[0], ids(4)), (1, 3, ids(2))), page_tables=TABLES)
        names = ["tokens", "positions", "sequence", "page_tables", "logit_rows"]
        names += ["parents", "places"] if batch.parents is not None else []
        name = names[rng.integers(len(names))]
        array = getattr(batch, name).copy()
        at = rng.integers(array.size)
        array.reshape(-1)[at] = rng.choice(
            [-2, -1, 0, 1, 11, 12, 63, 64, 70, array.flat[at] + 1, array.flat[at] - 1, rng.integers(70)]
        )
        batch = replace(batch, **{name: array})
        verdicts = []
        for executor in (cpu, oracle):
            try:
                executor.forward(batch)
                verdicts.append(True)
            except BadRequest:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1], (name, at, batch)
        refused += not verdicts[0]
    assert 50 < refused < 250
    cpu.close()


def test_bad_moves_are_refused() -> None:
    for backend in (BACKEND, REFERENCE):
        executor = backend.load(llama("f16"))
        for pages, sources, targets, message in (
            (TABLES[0], [3, 2], [0, 1], "sources must ascend"),
            (TABLES[0], [2, 3], [1, 1], "targets must ascend"),
            (TABLES[0], [2, 3], [1], "2 sources for 1 targets"),
            (TABLES[0], [2], [3], "at or above its target"),
            (TABLES[0], [64], [3], "sources holds 64"),
            (TABLES[0], [4], [-1], "targets holds -1"),
            (i32([0, -1]), [20], [3], "page -1 does not exist"),
            (i32([12]), [4], [3], "page 12 does not exist"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.move(pages, i32(sources), i32(targets))
        executor.close()
