"""Steps that are refused, contexts that are lost, executors that are closed: each says so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_programs import TABLES, Loader, equal, fed, i32, ids, model, opened, ready, rows, rows_part, step
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.ops import Norm
from edge_runtime.errors import (
    BackendUnavailable,
    BadRequest,
    EdgeError,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Iterator[Loader]:
    """Loads a part on the fake GPU; at the end nothing of it is left there."""
    yield lambda part: load(ready(part, tmp_path))
    gc.collect()
    assert fake_gpu.used == 0 and fake_gpu.count("leaked allocations") == 0


# --- steps that are refused --------------------------------------------------------------------------------


GOOD = step((0, 0, ids(12)), (1, 3, ids(5, 6)))


def changed(name: str, at: int, value: int) -> StepBatch:
    array = getattr(GOOD, name).copy()
    array.reshape(-1)[at] = value
    return replace(GOOD, **{name: array})


TREE = replace(GOOD, parents=i32(np.full(17, -1)), places=GOOD.positions)
BAD: list[tuple[StepBatch, str]] = [
    (changed("tokens", 3, 70), "tokens holds .*70, expected 0 to 69"),
    (changed("tokens", 3, -1), "tokens holds -1"),
    (changed("positions", 3, 64), "positions holds .*64, expected 0 to 63"),
    (changed("positions", 3, -1), "positions holds -1"),
    (changed("positions", 3, 4), "same sequence and position"),
    (changed("sequence", 16, 3), "sequence holds .*3, expected 0 to 2"),
    (changed("page_tables", 0, 12), "needs page 12"),
    (changed("page_tables", 4, -1), "needs page -1"),
    (changed("logit_rows", 5, 4), "must ascend"),
    (changed("logit_rows", 16, 17), "logit_rows holds .*17, expected"),
    (step((0, 0, ids(41))), "has 41 tokens, the executor was sized for 40"),
    (step((0, 0, ids(1)), tables=np.zeros((4, 4), np.int32)), "has 4 sequences, .* sized for 3"),
    (replace(GOOD, tokens=GOOD.tokens.astype(np.float32)), "tokens is 1-D float32"),
    (replace(GOOD, page_tables=TABLES[0]), "page_tables is 1-D"),
    (replace(GOOD, positions=GOOD.positions[:-1]), "positions has 16 entries for 17 tokens"),
    (replace(GOOD, inputs=np.zeros((17, 72), np.float32)), "looks its tokens up"),
    (replace(GOOD, adapters=i32([0, -1, -1])), "adapter 0, which is not loaded"),
    (replace(TREE, places=None), "both parents and places"),
    (replace(TREE, parents=i32([2, *[-1] * 16])), "token 0 names row 2 as its parent"),
    (replace(TREE, places=i32([64, *range(1, 12), *range(3, 8)])), "places holds .*64, expected"),
    (StepBatch(*(i32([]) for _ in range(3)), TABLES, i32([])), "0 tokens"),
]  # fmt: skip


def test_bad_steps_are_refused_and_leave_nothing(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    """By the same words as the reference has; nothing was queued for them."""
    part = model("f16", kv="f16", layers=1)
    oracle = REFERENCE.load(part)
    with opened(on_gpu(part)) as executor:
        want = executor.forward(GOOD).copy()
        queued = fake_gpu.count("cuGraphLaunch"), fake_gpu.count("HtoD")
        for batch, message in BAD:
            for call in (executor.forward, executor.likeliest, lambda b: executor.top(b, 2), oracle.forward):
                with pytest.raises(BadRequest, match=message):
                    call(batch)
        assert queued == (fake_gpu.count("cuGraphLaunch"), fake_gpu.count("HtoD"))
        assert equal(executor.forward(GOOD), want)


def test_bad_pages_moves_and_adapters_are_refused(on_gpu: Loader) -> None:
    with opened(on_gpu(model("f16", kv="f16", layers=1))) as executor:
        data = executor.read_page(0)
        for page in (-1, 12):
            for call in (
                lambda page=page: executor.read_page(page),
                lambda page=page: executor.write_page(page, data),
                lambda page=page: executor.copy_page(0, page),
                lambda page=page: executor.copy_page(page, 0),
            ):
                with pytest.raises(BadRequest, match=f"page {page} does not exist, the cache has 12"):
                    call()
        for bad in (data[:-1], data.view(np.int8), data[None], np.append(data, data[:1])):
            with pytest.raises(BadRequest, match=rf"a page is uint8 \({len(data)},\) in this cache"):
                executor.write_page(0, bad)
        for pages, sources, targets, message in (
            (TABLES[0], [3, 2], [0, 1], "sources must ascend"),
            (TABLES[0], [2, 3], [1, 1], "targets must ascend"),
            (TABLES[0], [2, 3], [1], "2 sources for 1 targets"),
            (TABLES[0], [2], [3], "at or above its target"),
            (TABLES[0], [64], [3], "sources holds 64"),
            (i32([0, -1]), [20], [3], "page -1 does not exist"),
            (i32([12]), [4], [3], "page 12 does not exist"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.move(pages, i32(sources), i32(targets))
        assert equal(executor.read_page(0), data)


def test_a_windowed_chain_needs_its_pages_all_along(on_gpu: Loader) -> None:
    """The page in the middle is seen neither by the first step nor by the last."""
    part = model("f16", kv="f16", layers=1, window=3)
    table = i32([[0, 1, -1, 3]])
    batch = step((0, 20, ids(1)), tables=table)
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 16, ids(4)), tables=table))
        assert executor.chain(batch, 12).shape == (12, 1)
        with pytest.raises(BadRequest, match="needs page -1 of its sequence's table"):
            executor.chain(batch, 40)


def test_inputs_come_exactly_when_they_are_wanted(on_gpu: Loader) -> None:
    part = rows_part([Norm(x="x", out="y", weight="n", eps=1e-5)], {"x": 20, "y": 20}, {}, {"n": np.ones(20)})
    x = rows(3, 20)
    with opened(on_gpu(part)) as executor:
        for bad, message in (
            (None, r"needs inputs f32 \(3, 20\)"),
            (x[:2], r"inputs is float32 \(2, 20\), expected float32 \(3, 20\)"),
            (x.astype(np.float64), "inputs is float64"),
            (x[0], r"inputs is float32 \(20,\)"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.forward(replace(fed(x), inputs=bad))
        want = executor.forward(fed(x)).copy()
        assert equal(executor.forward(fed(np.asfortranarray(x))), want)
        assert equal(executor.forward(replace(fed(x), tokens=i32([999] * 3))), want), "ids are not looked up"


# --- the end -----------------------------------------------------------------------------------------------


def test_closed_twice(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    executor = on_gpu(model("f16", kv="f16", layers=1))
    executor.forward(GOOD)
    view = executor.forward(GOOD)
    kept = view.copy()
    executor.close()
    executor.close()
    assert fake_gpu.used == 0 == executor.memory_bytes
    assert equal(view, kept), "logits that were given out stay"
    for call in (
        lambda: executor.forward(GOOD),
        lambda: executor.likeliest(GOOD),
        lambda: executor.top(GOOD, 2),
        lambda: executor.chain(step((0, 0, ids(1)), tables=TABLES[:1]), 2),
        lambda: executor.read_page(0),
        lambda: executor.write_page(0, np.zeros(1, np.uint8)),
        lambda: executor.page_nbytes,
        lambda: executor.hidden,
        lambda: executor.copy_page(0, 1),
        lambda: executor.move(TABLES[0], i32([1]), i32([0])),
        lambda: executor.warm_up([1]),
    ):
        with pytest.raises(BackendUnavailable, match="closed"):
            call()


def test_many_lives_leak_nothing(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    part = model("int4_g64", kv="int8", layers=1)
    for n in range(4):
        executor = on_gpu(part)
        executor.forward(GOOD)
        if n % 2:
            executor.close()
        del executor
        gc.collect()
        assert fake_gpu.used == 0
    retained, released = (fake_gpu.count(f"cuDevicePrimaryCtx{w}") for w in ("Retain", "Release"))
    assert retained == released >= 4


def test_a_context_that_memory_asked_for_is_used_by_load(
    on_gpu: Loader, fake_gpu: FakeCuda, tmp_path: Path
) -> None:
    backend = CudaBackend()
    part = ready(model("f16", kv="f16", layers=1), tmp_path)
    free, _ = backend.memory()
    assert backend.memory()[0] == free and fake_gpu.count("cuDevicePrimaryCtxRetain") == 1
    with opened(backend.load(part)) as executor:
        assert fake_gpu.count("cuDevicePrimaryCtxRetain") == 1
        executor.forward(GOOD)


@pytest.mark.parametrize("code", [700, 719])
@pytest.mark.parametrize("call", ["forward", "likeliest", "top", "chain", "read_page", "hidden"])
def test_a_lost_context_is_said_at_every_call(
    faulty_gpu: FakeCuda, tmp_path: Path, call: str, code: int
) -> None:
    part = ready(model("f16", kv="f16", layers=1), tmp_path)
    executor = load(part)
    executor.forward(GOOD)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: executor.forward(GOOD),
        "likeliest": lambda: executor.likeliest(GOOD),
        "top": lambda: executor.top(GOOD, 2),
        "chain": lambda: executor.chain(step((0, 20, ids(1)), tables=TABLES[:1]), 2),
        "read_page": lambda: executor.read_page(0),
        "hidden": lambda: executor.hidden,
    }
    faulty_gpu.fail(f"{'cuMemcpyDtoHAsync' if call in ('read_page', 'hidden') else 'cuGraphLaunch'}:1:{code}")
    with pytest.raises(BackendUnavailable, match="CUDA context is lost; close the engine and open it again"):
        calls[call]()
    for again in calls:
        if again != "hidden":
            with pytest.raises(BackendUnavailable, match="context is lost"):
                calls[again]()
    executor.close()
    executor.close()
    faulty_gpu.reset()
    assert faulty_gpu.used == 0
    with opened(load(part)) as executor:
        executor.forward(GOOD)


@pytest.mark.parametrize(
    "function", ["cuGraphLaunch", "cuGraphInstantiate", "cuMemcpyHtoDAsync", "cuStreamSynchronize"]
)
def test_a_failure_in_a_step_passes(on_gpu: Loader, fake_gpu: FakeCuda, function: str) -> None:
    """One that the context survives: the next step is as if it had not been."""
    with opened(on_gpu(model("f16", kv="f16", layers=1))) as executor:
        other = step((2, 0, ids(3)), tables=TABLES[::-1].copy())
        fake_gpu.fail(f"{function}:1:801")
        with pytest.raises(EdgeError, match="CUDA_ERROR_NOT_SUPPORTED"):
            executor.forward(other)
        want = executor.forward(GOOD).copy()
        fake_gpu.fail(f"{function}:1:801")
        with suppress(EdgeError):  # of a graph that is there already
            executor.forward(other)
        fake_gpu.fail("")
        executor.forward(other)
        assert equal(executor.forward(GOOD), want)
