"""What a step costs: one graph launch, one wait, no allocation; graphs by size, tables where they change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_programs import TABLES, Loader, equal, fed, i32, ids, model, opened, ready, rows, rows_part, step
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime.backends.cuda.executor import CudaExecutor, bucket
from edge_runtime.engine.ops import Linear
from edge_runtime.errors import BadRequest

ALLOCATIONS = ("cuMemAlloc", "cuMemAllocAsync", "cuMemHostRegister", "cuMemAllocHost", "cuMemHostAlloc")
MADE = ("cuStreamBeginCapture", "cuGraphInstantiate", "cuModuleLoadData", "cuModuleGetFunction")
COUNTED = (*ALLOCATIONS, *MADE, "cuGraphLaunch", "cuLaunchKernel", "syncs", "HtoD", "DtoH", "DtoD", "fills")


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


@contextmanager
def costs(gpu: FakeCuda, **wanted: int) -> Iterator[None]:
    """What the block does, by the fake's counters: `wanted`, and nothing else of COUNTED."""
    before = {name: gpu.count(name) for name in COUNTED}
    yield
    found = {name: gpu.count(name) - before[name] for name in COUNTED}
    assert {name: n for name, n in found.items() if n} == wanted


def test_a_step_is_one_graph_launch(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    with opened(on_gpu(model())) as executor:
        executor.forward(step((0, 0, ids(20))))
        executor.forward(step((0, 20, ids(1))))
        executor.likeliest(step((0, 21, ids(1))))
        decode = [step((0, n, ids(1))) for n in range(22, 30)]
        for batch in decode[:3]:  # the record up; logits and the status down
            with costs(fake_gpu, cuGraphLaunch=1, syncs=1, HtoD=1, DtoH=2):
                executor.forward(batch)
        for batch in decode[3:6]:  # ids and the status lie together
            with costs(fake_gpu, cuGraphLaunch=1, syncs=1, HtoD=1, DtoH=1):
                executor.likeliest(batch)
        with costs(fake_gpu, cuGraphLaunch=1, syncs=1, HtoD=1, DtoH=1):
            executor.forward(replace(decode[6], logit_rows=i32([])))
        with costs(fake_gpu, cuGraphLaunch=1, cuLaunchKernel=2, syncs=1, HtoD=1, DtoH=3):
            executor.top(decode[7], 5)
        with costs(fake_gpu, cuGraphLaunch=1, syncs=1, HtoD=1, DtoH=2):
            executor.forward(step((0, 0, ids(20))))
        with costs(fake_gpu, syncs=2, DtoH=1):  # to memory that is not pinned, which waits by itself
            assert executor.hidden.shape[0] == 20
        with costs(fake_gpu):
            assert executor.hidden.shape[0] == 20


def test_a_chain_waits_once(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    batch = step((0, 3, ids(1)), tables=TABLES[:1])
    with opened(on_gpu(model())) as executor:
        executor.forward(step((0, 0, ids(3)), tables=TABLES[:1]))
        executor.chain(batch, 1)
        for count in (1, 8, 60):
            with costs(fake_gpu, cuGraphLaunch=count, syncs=1, HtoD=1, DtoH=2):
                executor.chain(batch, count)


def test_inputs_go_up_with_the_record(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    matrices = {"w": ("f16", np.eye(20, dtype=np.float32))}
    part = rows_part([Linear(x="x", out="y", weight="w")], {"x": 20, "y": 20}, matrices, {})
    with opened(on_gpu(part)) as executor:
        executor.forward(fed(rows(3, 20)))
        with costs(fake_gpu, cuGraphLaunch=1, syncs=1, HtoD=2, DtoH=2):
            executor.forward(fed(rows(3, 20)))


def test_page_tables_go_up_when_they_change(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    part = model()
    text = ids(20)
    with opened(on_gpu(part)) as executor:
        want = executor.forward(step((0, 0, text))).copy()
        once = {"cuGraphLaunch": 1, "syncs": 1, "DtoH": 2}
        with costs(fake_gpu, HtoD=1, **once):
            executor.forward(step((0, 0, text), tables=TABLES.copy()))
        turned = TABLES[::-1].copy()
        with costs(fake_gpu, HtoD=2, **once):
            got = executor.forward(step((0, 0, text), tables=turned))
            assert equal(got, want)
        with costs(fake_gpu, HtoD=1, **once):
            executor.forward(step((0, 0, text), tables=turned))
        turned[0, 1] = 11  # in the array that was shown before
        turned[2] = -1
        with costs(fake_gpu, HtoD=2, **once):
            assert equal(executor.forward(step((0, 0, text), tables=turned)), want)
        # The same numbers in another shape, and wider than any sequence needs
        for tables, up in ((TABLES[:2], 2), (TABLES[:2, :2], 2), (TABLES[:2, :2].reshape(1, 4), 2),
                           (np.tile(TABLES, 3), 2), (np.tile(TABLES, 3), 1)):  # fmt: skip
            with costs(fake_gpu, HtoD=up, **once):
                got = executor.forward(step((0, 0, text), tables=np.ascontiguousarray(tables)))
                assert equal(got, want)


def test_a_refused_step_leaves_the_tables_as_they_are(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    text = ids(20)
    with opened(on_gpu(model())) as executor:
        want = executor.forward(step((0, 0, text))).copy()
        bad = TABLES.copy()
        bad[0, 0] = 99
        with costs(fake_gpu), pytest.raises(BadRequest):
            executor.forward(step((0, 0, text), tables=bad))
        with costs(fake_gpu, cuGraphLaunch=1, syncs=1, DtoH=2, HtoD=1):
            assert equal(executor.forward(step((0, 0, text))), want)


def test_one_graph_for_each_size(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    with opened(on_gpu(model(layers=1))) as executor:
        sizes = set()
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 40, 1, 3, 39, 12):
            sizes.add(bucket(count, 40))
            executor.forward(step((0, 0, ids(count))))
            assert fake_gpu.count("cuGraphInstantiate") == len(sizes)
        assert sizes == {1, 2, 4, 8, 16, 32, 40}


def test_warm_up_captures_all(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    with opened(on_gpu(model(layers=1))) as executor:
        executor.warm_up([1, 3, 40], [1, 2])
        assert fake_gpu.count("cuGraphLaunch") == 0 == fake_gpu.count("kernels")
        made = fake_gpu.count("cuGraphInstantiate")
        assert made == 5
        executor.warm_up([1, 4], [2])
        for count in (1, 3, 4, 33):
            executor.forward(step((0, 0, ids(count))))
        executor.chain(step((0, 4, ids(1)), (1, 0, ids(1)), tables=TABLES[:2]), 3)
        assert fake_gpu.count("cuGraphInstantiate") == made


SIZES = [(1, 1, 1), (1, 40, 1), (2, 40, 2), (3, 40, 4), (33, 40, 40), (40, 40, 40), (5, 5, 5), (65, 512, 128)]


@pytest.mark.parametrize(("tokens", "most", "size"), SIZES)
def test_sizes_are_powers_of_two_or_the_greatest(tokens: int, most: int, size: int) -> None:
    assert bucket(tokens, most) == size


def test_two_threads_take_turns(on_gpu: Loader) -> None:
    """Each one's sequence is stored as it is when they come one after the other."""
    part = model("int4_g64")
    texts = [ids(24, seed) for seed in (1, 2)]

    def serve(executor: CudaExecutor, s: int) -> None:
        for n in range(24):
            executor.likeliest(step((s, n, texts[s][n : n + 1])))

    found = []
    for together in (False, True):
        with opened(on_gpu(part)) as executor:
            threads = [threading.Thread(target=serve, args=(executor, s)) for s in (0, 1)]
            for thread in threads:
                thread.start()
                if not together:
                    thread.join()
            for thread in threads:
                thread.join()
            found.append([executor.read_page(page) for page in TABLES[:2, :2].reshape(-1).tolist()])
    assert all(equal(a, b) for a, b in zip(*found, strict=True))
    assert not equal(found[0][0], found[0][2])


def test_what_moves_nothing_costs_nothing(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    part = model("f16", kv="f16", layers=1)
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, ids(20))))
        with costs(fake_gpu):
            executor.copy_page(3, 3)
            executor.move(TABLES[0], i32([2, 7]), i32([2, 7]))
            executor.move(TABLES[0], i32([]), i32([]))
        executor.copy_page(3, 9)
        assert equal(executor.read_page(9), executor.read_page(3))
