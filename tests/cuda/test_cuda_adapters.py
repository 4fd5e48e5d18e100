"""Low-rank adapters on the fake GPU: near the reference, and to the bit whatever shares the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_counts import Counts
from cuda_engine import write_cuda
from device_programs import Loader, equal, i32, ids, model, opened, other, ready, step
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime import Request, Session, open_engine
from edge_runtime.backends.cuda.bindings_driver import BindingsDriver
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.adapter import MAX_RANK, Adapter, LowRank, updatable
from edge_runtime.engine.formats import Array
from edge_runtime.engine.memory import adapter_nbytes
from edge_runtime.errors import BackendUnavailable, BadRequest, DoesNotFit, NumericError


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    return lambda part: load(ready(part, tmp_path))


def low_rank(part: Part, ranks: dict[str, int], seed: int = 0, strength: float = 0.5) -> Adapter:
    """Random updates that change outputs about as much as `strength` of the weights do."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, rank in ranks.items():
        spec = part.program.tensors[name]
        a = rng.standard_normal((rank, spec.cols)) * spec.cols**-0.5
        b = rng.standard_normal((spec.rows, rank)) * rank**-0.5
        made[name] = LowRank(a.astype(np.float16), b.astype(np.float16), strength * (1 + 0.1 * len(made)))
    return made


def everywhere(part: Part, rank: int, seed: int = 0) -> Adapter:
    return low_rank(part, dict.fromkeys((op.weight for op in updatable(part.program)), rank), seed)


def using(batch: StepBatch, adapters: Iterable[int]) -> StepBatch:
    return replace(batch, adapters=i32([*adapters]))


def off(got: Array, want: Array) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


# f16 weights: inputs are rounded to f16; f16 keys: probabilities too
BOUND = {"f16": 4e-3, "int8_row": 0.08, "nf4_g64": 4e-3}


@pytest.mark.parametrize("fmt", BOUND)
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_near_the_reference(on_gpu: Loader, fmt: str, rank: int) -> None:
    """Every linear and the head updated; with bias, residuals, soft caps and scales."""
    part = model(fmt, kv="f16", softcap=6.0)
    adapter = everywhere(part, rank)
    batches = [step((0, 0, ids(19)), (1, 0, ids(6, 6))), step((0, 19, ids(1, 3)), (1, 6, ids(1, 4)))]
    oracle, plain = REFERENCE.load(part), REFERENCE.load(part)
    oracle.add_adapter(adapter)
    with opened(on_gpu(part)) as executor:
        assert executor.add_adapter(adapter) == 0
        for batch in batches:
            want = oracle.forward(using(batch, [0, 0, -1]))
            assert off(plain.forward(batch), want) > 3 * BOUND[fmt], "or this test shows nothing"
            assert off(executor.forward(using(batch, [0, 0, -1])), want) <= BOUND[fmt]


def run(executor: CudaExecutor, batch: StepBatch, adapters: Iterable[int] | None = None) -> Array:
    return executor.forward(batch if adapters is None else using(batch, adapters)).copy()


def test_each_matrix_alone(on_gpu: Loader) -> None:
    """Nothing but the named tensor changes; of a tied head the rows that tokens are looked up in do not."""
    for tied in (False, True):
        part = model("f16", kv="f16", layers=1, tied=tied)
        batch = step((0, 0, ids(9)))
        plain = other(REFERENCE, part, batch)[0]
        with opened(on_gpu(part)) as executor:
            for name in [op.weight for op in updatable(part.program)][-7 if tied else 0 :]:
                adapter = low_rank(part, {name: 5}, strength=2.0)
                oracle = REFERENCE.load(part)
                oracle.add_adapter(adapter)
                want = oracle.forward(using(batch, [0, -1, -1]))
                assert off(plain, want) > 1e-2, name
                number = executor.add_adapter(adapter)
                assert off(run(executor, batch, [number, -1, -1]), want) <= BOUND["f16"], name
                executor.drop_adapter(number)


@pytest.mark.parametrize("fmt", ["int4_g64", "f16", "nf4_g64"])
def test_a_token_does_not_depend_on_what_shares_the_step(on_gpu: Loader, fmt: str) -> None:
    """Three sequences with two adapters and none: alone, together, in chunks of any size."""
    part = model(fmt, kv="int8")
    loaded = everywhere(part, 6, 1), low_rank(part, {"0.q": 20, "1.down": 3, "head": 12}, 2)
    texts = {0: ids(17, 1), 1: ids(11, 2), 2: ids(14, 3)}
    chosen = [0, -1, 1]
    want = {}
    for s, text in texts.items():
        with opened(on_gpu(part)) as executor:
            if chosen[s] < 0:
                want[s] = run(executor, step((s, 0, text)))
                continue
            for adapter in loaded[: chosen[s] + 1]:
                number = executor.add_adapter(adapter)
            want[s] = run(executor, step((s, 0, text)), [number if i == s else -1 for i in range(3)])
    rng = np.random.default_rng(5)
    with opened(on_gpu(part)) as executor:
        for adapter in loaded:
            executor.add_adapter(adapter)
        for _ in range(3):
            at = dict.fromkeys(texts, 0)
            while any(at[s] < len(texts[s]) for s in texts):
                sizes = {s: int(rng.integers(0, 10)) for s in rng.permutation(3).tolist()}
                runs = [(s, at[s], texts[s][at[s] : at[s] + n]) for s, n in sizes.items()]
                runs = [r for r in runs if len(r[2])]
                if not runs:
                    continue
                batch = step(*runs)
                rows = np.flatnonzero(rng.random(len(batch.tokens)) < 0.6).astype(np.int32)
                got = run(executor, replace(batch, logit_rows=rows), chosen)
                whole = np.concatenate([want[s][p : p + len(text)] for s, p, text in runs])
                assert equal(got, whole[rows])
                for s, p, text in runs:
                    at[s] = p + len(text)


def test_tokens_without_an_adapter_are_those_of_a_plain_session(on_gpu: Loader) -> None:
    part = model("int4_g64", kv="int8")
    batch = step((0, 0, ids(13)), (1, 0, ids(8, 4)))
    with opened(on_gpu(part)) as executor:
        want = run(executor, batch)
        for adapter in (everywhere(part, 8), everywhere(part, 3, 9)):
            executor.add_adapter(adapter)
        for numbers in ([-1, -1, -1], [-1, 0, 1], [0, -1, 0], [1, 1, 0]):
            got = run(executor, batch, numbers)
            for s in (0, 1):
                mine = batch.sequence == s
                assert equal(got[mine], want[mine]) == (numbers[s] == -1)
        assert equal(run(executor, batch), want)
        executor.drop_adapter(0)
        assert equal(run(executor, batch), want)


def test_the_head_caps_what_the_adapter_added(on_gpu: Loader) -> None:
    part = model("f16", kv="f16", softcap=2.0)
    adapter = low_rank(part, {"head": 4}, strength=30.0)
    batch = using(step((0, 0, ids(9))), [0, -1, -1])
    oracle = REFERENCE.load(part)
    oracle.add_adapter(adapter)
    with opened(on_gpu(part)) as executor:
        executor.add_adapter(adapter)
        got = run(executor, batch)
        assert np.abs(got).max() <= 2.0
        assert np.abs(got - oracle.forward(batch)).max() <= 30 * 2.0 * 1e-3  # of values 30 times as large
        assert executor.likeliest(batch).tolist() == got.argmax(axis=1).tolist()


def test_the_largest_rank(on_gpu: Loader) -> None:
    part = model("f16", kv="f16", layers=1)
    adapter = low_rank(part, {"0.k": MAX_RANK, "0.v": MAX_RANK - 1})
    batch = using(step((0, 0, ids(9))), [0, -1, -1])
    oracle = REFERENCE.load(part)
    oracle.add_adapter(adapter)
    with opened(on_gpu(part)) as executor:
        executor.add_adapter(adapter)
        assert off(run(executor, batch), oracle.forward(batch)) <= BOUND["f16"]


# --- graphs ------------------------------------------------------------------------------------------------

STEP = ("cuGraphLaunch", "cuStreamBeginCapture", "syncs")


def test_adapters_come_and_go_under_the_same_graphs(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    """One launch a step, with adapters and without; what is loaded or dropped makes no new graph."""
    part = model("int4_g64")
    batch = step((0, 0, ids(5)), (1, 0, ids(3, 2)))
    with opened(on_gpu(part)) as executor:
        executor.add_adapter(everywhere(part, 4))
        executor.warm_up([8], [2])
        counts = Counts(fake_gpu, *STEP)
        first = run(executor, batch, [0, -1, -1])
        plain = run(executor, batch)
        assert [counts[name] for name in STEP] == [2, 0, 2]
        numbers = [executor.add_adapter(everywhere(part, rank, rank)) for rank in (70, 1)]
        assert numbers == [1, 2] and counts["syncs"] == 2  # of their uploads
        found = run(executor, batch, [2, 1, 0])
        executor.drop_adapter(0)
        assert executor.add_adapter(everywhere(part, 9, 3)) == 0
        again = run(executor, batch, [0, -1, -1])
        assert [counts[name] for name in STEP[:2]] == [2, 0]
        assert not equal(again, first) and equal(again[5:], plain[5:])
        executor.drop_adapter(0)
        executor.add_adapter(everywhere(part, 4))
        assert equal(run(executor, batch, [0, -1, -1]), first)
        assert equal(run(executor, batch, [2, 1, 0]), found)
        # A plain step has none of their launches
        counts = Counts(fake_gpu, "kernel low_rank_in", "kernel low_rank_out")
        run(executor, batch, [-1, -1, -1])
        assert counts["kernel low_rank_in"] == 0 == counts["kernel low_rank_out"]
        run(executor, batch, [1, -1, -1])
        assert counts["kernel low_rank_in"] == counts["kernel low_rank_out"] == 4 * 2 + 1


def test_chains_are_their_steps(on_gpu: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where launches are queued one by one, as with pycuda."""
    part = model("int8_row", kv="int8")
    for graphs in (True, False):
        monkeypatch.setattr(BindingsDriver, "graphs", graphs)
        with opened(on_gpu(part)) as executor:
            for rank in (6, 11):
                executor.add_adapter(everywhere(part, rank, rank))
            tokens, want = i32([3, 4, 5]), []
            for at in range(5):
                batch = using(step(*((s, at, tokens[s : s + 1]) for s in range(3))), [0, -1, 1])
                tokens = executor.likeliest(batch).copy()
                want.append(tokens)
            batch = using(step(*((s, 0, i32([3 + s])) for s in range(3))), [0, -1, 1])
            assert executor.chain(batch, 5).tolist() == np.array(want).tolist()


# --- loading and freeing -----------------------------------------------------------------------------------


def test_numbers_and_memory(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    """To the byte what the planner and the loader count, and what the driver gave."""
    part = model("int4_g64")
    adapters = [everywhere(part, 4, 1), low_rank(part, {"0.up": 9}, 2), everywhere(part, 7, 3)]
    ranks = [{name: low.rank for name, low in a.items()} for a in adapters]
    sizes = [adapter_nbytes(part.program, part.step, r, backend="cuda") for r in ranks]
    batch = step((0, 0, ids(7)))
    with opened(on_gpu(part)) as executor:
        empty, used = executor.memory_bytes, fake_gpu.used
        assert [executor.add_adapter(a) for a in adapters] == [0, 1, 2]
        want = [run(executor, batch, [n, -1, -1]) for n in range(3)]
        assert executor.memory_bytes == empty + sum(sizes) and fake_gpu.used == used + sum(sizes)
        executor.drop_adapter(1)
        assert executor.memory_bytes == empty + sizes[0] + sizes[2] == empty + fake_gpu.used - used
        assert equal(run(executor, batch, [2, -1, -1]), want[2])
        for numbers in ([1, -1, -1], [-1, 1, -1], [-2, -1, -1]):
            with pytest.raises(BadRequest, match=f"uses adapter {min(numbers) if -2 in numbers else 1}"):
                run(executor, batch, numbers)
            assert len(executor.hidden) == 0
        assert executor.add_adapter(adapters[0]) == 1
        assert equal(run(executor, batch, [1, -1, -1]), want[0])
        for number in (0, 1, 2):
            executor.drop_adapter(number)
        assert executor.memory_bytes == empty and fake_gpu.used == used
        for number in (0, 5, -1):
            with pytest.raises(BadRequest, match=f"adapter {number} is not loaded"):
                executor.drop_adapter(number)
        executor.add_adapter(adapters[0])  # and left to `close`
        executor.close()
        assert fake_gpu.used == 0 == executor.memory_bytes
        for call in (lambda: executor.add_adapter(adapters[0]), lambda: executor.drop_adapter(0)):
            with pytest.raises(BackendUnavailable, match="closed"):
                call()


def test_what_does_not_fit_leaves_nothing_behind(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    part = model("f16", kv="f16")
    batch = step((0, 0, ids(5)))
    with opened(on_gpu(part)) as executor:
        want, used = run(executor, batch), fake_gpu.used
        fake_gpu.fail("cuMemAlloc:1:2")
        with pytest.raises(DoesNotFit):
            executor.add_adapter(everywhere(part, 4))
        assert fake_gpu.used == used
        assert executor.add_adapter(everywhere(part, 4)) == 0
        executor.drop_adapter(0)
        assert fake_gpu.used == used and equal(run(executor, batch), want)


def test_an_adapter_is_copied(on_gpu: Loader) -> None:
    part = model("f16", kv="f16", layers=1)
    adapter = everywhere(part, 5)
    batch = using(step((0, 0, ids(7))), [0, -1, -1])
    with opened(on_gpu(part)) as executor:
        executor.add_adapter(adapter)
        want = run(executor, batch)
        for low in adapter.values():
            low.a[:] = np.nan
            low.b[:] = np.nan
        assert equal(run(executor, batch), want)


def test_bad_adapters_are_refused(on_gpu: Loader) -> None:
    """Each fault that `check_adapter` names is tested in tests/backends/test_adapters.py."""
    part = model("f16", kv="f16", layers=1)
    good = everywhere(part, 5)
    low = good["0.q"]
    batch = step((0, 0, ids(3)))
    with opened(on_gpu(part)) as executor:
        before = executor.memory_bytes
        for bad, message in (
            ({}, "has no updates"),
            ({"0.norm": low}, "'0.norm', which is no linear's weight"),
            (
                {**good, "0.q": LowRank(low.a[:, 1:], low.b, 1.0)},
                r"a of '0.q' is \(5, 71\), expected \(5, 72\)",
            ),
            ({**good, "0.q": LowRank(low.a, low.b[1:], 1.0)}, r"b of '0.q' is \(127, 5\)"),
            ({**good, "0.q": LowRank(low.a, low.b, float("inf"))}, "scale of '0.q' is inf"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.add_adapter(bad)
        assert executor.memory_bytes == before
        for numbers, message in (
            (i32([-1, -1]), "adapters has 2 entries for 3 sequences"),
            (np.array([-1.0, -1, -1]), "adapters is 1-D float64"),
            (np.full((3, 1), -1, np.int32), "adapters is 2-D int32"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.forward(replace(batch, adapters=numbers))
        run(executor, batch)


@pytest.mark.parametrize("name", ["0.down", "head", "0.v"])
def test_an_adapter_that_overflows_is_caught_in_the_step(on_gpu: Loader, name: str) -> None:
    part = model("int4_g64", kv="int8")
    low = low_rank(part, {name: 4})[name]
    batch = step((0, 0, ids(4)), (1, 0, ids(3, 2)))
    with opened(on_gpu(part)) as executor:
        want = run(executor, batch)
        executor.add_adapter({name: LowRank(low.a, np.full_like(low.b, 60000), 3e38)})
        with pytest.raises(NumericError):
            run(executor, batch, [0, -1, -1])
        assert equal(run(executor, batch), want)


# --- sessions ----------------------------------------------------------------------------------------------


def test_a_session_with_adapters(fake_gpu: FakeCuda, tmp_path: Path) -> None:
    """Requests with two adapters and none, in flight at once, answer as alone; memory is what was counted."""
    path = tmp_path / "e.edge"
    write_cuda(path, tmp_path)
    prompts = {None: [5, 9, 17, 11], "one": [5, 9, 17, 11], "two": [7, 300, 8]}

    def answers(session: Session, names: Iterable[str | None]) -> dict[str | None, list[int | None]]:
        numbers = {
            session.submit(Request(prompt=prompts[n], max_tokens=12, ignore_eos=True, adapter=n)): n
            for n in names
        }
        found: dict[str | None, list[int | None]] = {n: [] for n in numbers.values()}
        while session.in_flight:
            for event in session.step():
                assert event.error is None
                found[numbers[event.request]].append(event.token)
        return found

    with open_engine(path, backend="cuda", speculate="off") as session:
        program, shape = session.manifest.parts["language"].program, session.step_shape
        specs = {op.weight: program.tensors[op.weight] for op in updatable(program)}
        made = {}
        for seed, (name, rank) in enumerate({"one": 4, "two": 11}.items()):
            rng = np.random.default_rng(seed)
            made[name] = {
                tensor: LowRank(
                    rng.normal(0, s.cols**-0.5, (rank, s.cols)).astype(np.float16),
                    rng.normal(0, 0.3, (s.rows, rank)).astype(np.float16),
                    0.7,
                )
                for tensor, s in specs.items()
            }
        before = session.memory_used
        for name, adapter in made.items():
            session.load_adapter(name, adapter)
        ranks = [{n: low.rank for n, low in a.items()} for a in made.values()]
        more = sum(adapter_nbytes(program, shape, r, backend="cuda") for r in ranks)
        assert session.memory_used == before + more
        session.warm_up()
        together = answers(session, prompts)
        assert together[None] != together["one"]
        for name in prompts:
            session.forget_prefixes()
            assert answers(session, [name])[name] == together[name]
        session.drop_adapter("one")
        assert answers(session, ["two"])["two"] == together["two"]
    with open_engine(path, backend="cuda", speculate="off", adapters=made) as session:
        assert session.memory.adapters == more and session.memory_used == session.memory.need
