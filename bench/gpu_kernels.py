"""Parts `copy` and `attention`: the yardstick, and attention by itself as the executor launches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from gpu_executors import step
from gpu_models import attentions, formats_of, load_apart, noise, part_of
from gpu_report import Report
from gpu_sizes import SIZES
from gpu_timing import Job, graph_of, interleaved

from edge_runtime.backends.cuda.driver import Driver, open_driver
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part

CACHE_GOALS = {"int8": 1.6, "int4": 2.5}  # times faster than f16, by the issue


class Copy:
    """Two large blocks; `job` copies one to the other."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.nbytes = min(SIZES.copy_nbytes, driver.free_bytes()[0] // 4)
        self._blocks = [driver.allocate(self.nbytes) for _ in range(2)]
        for i, block in enumerate(self._blocks):
            driver.fill(block, self.nbytes, i + 1)

    def job(self) -> None:
        self._driver.copy(self._blocks[1], self._blocks[0], self.nbytes)

    def rate(self, ms: float) -> float:
        """Bytes read and written a second."""
        return 2 * self.nbytes / ms * 1e3

    def release(self) -> None:
        for block in self._blocks:
            self._driver.free(block)


def copy(report: Report) -> None:
    """The yardstick of memory-bound work: a device-to-device copy."""
    driver = open_driver()
    try:
        with driver.current:
            block = Copy(driver)
            jobs = {"copy": Job(block.job)}
            timed = interleaved(driver, jobs, SIZES.rounds, report.deadline)["copy"]
            rate = block.rate(timed.ms)
            report.put("bytes_per_s", rate)
            report.figure(f"copy of {block.nbytes / 1e9:.2f} GB, read and written", rate / 1e9, "GB/s")
    finally:
        driver.close()


@contextmanager
def loaded_apart(part: Part) -> Iterator[CudaExecutor]:
    executor = load_apart(part)
    try:
        yield executor
    finally:
        executor.close()


def attention(report: Report) -> None:
    """A token's attention over a long context, by KV format; ratios to f16 of the same run."""
    times: dict[str, float] = {}

    def piece(kv: str) -> None:
        times[kv] = _attention(report, kv, times.get(kv))

    for turn in (1, 2):  # each format twice, so that drift between them shows
        report.each({f"KV {kv}, turn {turn}": lambda kv=kv: piece(kv) for kv in SIZES.caches}, seconds=6)
    for kv, ms in times.items():
        if kv != "f16" and "f16" in times:
            name = f"KV {kv} at {SIZES.context}: times faster than f16"
            report.figure(name, times["f16"] / ms, "x", goal=CACHE_GOALS.get(kv))


def _attention(report: Report, kv: str, before: float | None) -> float:
    """Milliseconds of a layer's attention."""
    shape, context = SIZES.attention, SIZES.context
    layers = 1 if SIZES.times_l2 == 0 else 8
    program = attentions(shape, layers, context)
    part = part_of(program, noise(program, formats_of(program, "int4_g64")), kv=kv, context=context, tokens=8)
    with loaded_apart(part) as ours:
        driver, block = ours._driver, Copy(ours._driver)
        fill_pages(ours, part)
        ours.likeliest(step(part, {0: (context - 1, np.array([5]))}))
        launches = ours._launches_of((1, False, False))
        graph, append = (
            graph_of(driver, [la for la in launches if la.symbol.startswith(kind)])
            for kind in ("attention_", "rope_append")
        )
        jobs = {
            "copy": Job(block.job),
            "attention": Job(lambda: driver.launch_graph(graph)),
            "append": Job(lambda: driver.launch_graph(append)),
        }
        found = interleaved(driver, jobs, SIZES.rounds, report.deadline - 3)
        nbytes = sum(a.nbytes for a in ours._place.cache) / layers
        ms = found["attention"].ms / layers
        if before is None:
            report.figure(f"KV {kv} at {context}: a layer", ms * 1e3, "us")
            report.figure(f"KV {kv} at {context}: read", nbytes / ms / 1e6, "GB/s")
            share = 100 * nbytes / ms * 1e3 / block.rate(found["copy"].ms)
            report.figure(f"KV {kv} at {context}: of the copy", share, "%")
            report.figure(f"KV {kv}: store of a token", found["append"].ms / layers * 1e3, "us")
        else:
            report.note(f"KV {kv} at {context}, second turn: {ms * 1e3:.1f} us")
    return ms if before is None else min(ms, before)


def fill_pages(ours: CudaExecutor, part: Part) -> None:
    """Random keys and values of usual sizes in every page."""
    rng = np.random.default_rng(3)
    driver, place = ours._driver, ours._place
    for i, array in enumerate(place.cache):
        kind = np.dtype(array.dtype)
        count = min(array.nbytes // kind.itemsize, 1 << 20)
        if array.plane == "scale":
            values = rng.uniform(0.004, 0.02, count).astype(kind)
        elif kind.kind == "f":
            values = rng.standard_normal(count, np.float32).astype(kind)
        elif "fp8" in (part.kv.k if array.which == "k" else part.kv.v):
            values = rng.integers(0, 0x70, count, dtype=np.uint8).astype(kind)  # no NaN
        elif array.plane == "zero":
            values = np.full(count, 7, kind)
        else:
            values = np.frombuffer(rng.bytes(count * kind.itemsize), kind)
        start = place.page(i)
        driver.upload(start, values)
        done = values.nbytes
        while done < array.nbytes:  # doubling on the device
            some = min(done, array.nbytes - done)
            driver.copy(start + done, start, some)
            done += some
    driver.synchronize()
