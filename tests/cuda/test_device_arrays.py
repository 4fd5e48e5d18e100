"""Rows that stay in the GPU's memory: a step's inputs out of another's array, its results without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_counts import Counts
from device_programs import Loader, equal, fed, ids, model, opened, ready, rows, rows_part, step
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.cuda.device_array import as_address
from edge_runtime.backends.cuda.driver import Driver, open_driver
from edge_runtime.backends.protocol import Backend, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Linear
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError

WIDTH = 72


class Foreign:
    """Somebody else's array in device memory, through a driver of their own."""

    def __init__(self, driver: Driver, values: Array, **face: Any) -> None:
        self.address = driver.allocate(max(values.nbytes, 1))
        driver.upload(self.address, values)
        self.face: dict[str, Any] = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            **face,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.face


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    return lambda part: load(ready(part, tmp_path))


@contextmanager
def another() -> Iterator[Driver]:
    """Somebody else's use of the GPU in this process."""
    driver = open_driver()
    try:
        yield driver
    finally:
        driver.close()


@pytest.fixture
def part() -> Part:
    w = (np.random.default_rng(2).standard_normal((WIDTH, WIDTH)) * 0.1).astype(np.float32)
    ops = [Linear(x="x", out="y", weight="w")]
    return rows_part(ops, {"x": WIDTH, "y": WIDTH}, {"w": ("f16", w)}, {})


def test_inputs_on_the_device_are_those_of_the_host(on_gpu: Loader, part: Part, fake_gpu: FakeCuda) -> None:
    """To the bit, for every size of step, and nothing of them crosses the host."""
    with another() as theirs, opened(on_gpu(part)) as executor:
        for count in (1, 3, 17, 40):
            x = rows(count, WIDTH, count)
            want = executor.forward(fed(x)).copy()
            batch = replace(fed(x), inputs=Foreign(theirs, x))
            counts = Counts(fake_gpu, "HtoD bytes", "DtoD bytes")
            assert equal(executor.forward(batch), want)
            assert counts["DtoD bytes"] == x.nbytes
            sent = counts["HtoD bytes"]
            executor.forward(fed(x))
            assert counts["HtoD bytes"] == sent + x.nbytes
        strides = (4 * WIDTH, 4)
        x = rows(5, WIDTH)
        given = Foreign(theirs, x, strides=strides, stream=theirs.stream)
        want = executor.forward(fed(x)).copy()
        counts = Counts(fake_gpu, "cuStreamSynchronize")
        assert equal(executor.forward(replace(fed(x), inputs=given)), want)
        assert counts["cuStreamSynchronize"] == 2, "of their stream, and for the answer"


def test_results_stay_on_the_device(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    """Logits and hidden rows of the last step, whatever of it was asked for; a head goes on from there."""
    language = model("f16", kv="f16", softcap=3.0)
    width = language.program.hidden_width
    w = (np.random.default_rng(4).standard_normal((9, width)) * 0.1).astype(np.float32)
    ops = [Linear(x="x", out="y", weight="w")]
    head = rows_part(ops, {"x": width, "y": 9}, {"w": ("f16", w)}, {})
    with another() as theirs, opened(on_gpu(language)) as first, opened(on_gpu(head)) as second:
        assert first.device_hidden.shape == (0, width) and first.device_logits.shape == (0, 70)
        batch = replace(step((0, 0, ids(9))), logit_rows=np.array([2, 8], np.int32))
        logits = first.forward(batch).copy()
        hidden = first.hidden.copy()
        want = second.forward(fed(hidden)).copy()
        for ask in (first.forward, first.likeliest, lambda b: first.top(b, 5)):
            ask(batch)
            counts = Counts(fake_gpu, "DtoH", "HtoD", "syncs")
            on_device = first.device_hidden, first.device_logits
            assert (counts["DtoH"], counts["HtoD"], counts["syncs"]) == (0, 0, 0)
            for array, values in zip(on_device, (hidden, logits), strict=True):
                found = np.empty_like(values)
                theirs.follow(array)
                theirs.download(found, as_address(array, values.shape, np.float32))
                assert equal(found, values)
            assert equal(second.forward(replace(fed(hidden), inputs=on_device[0])), want)
        with pytest.raises(BadRequest):
            first.forward(replace(batch, tokens=batch.tokens + 70))
        assert first.device_logits.shape == (0, 70), "none of a step that was refused"
        first.forward(batch)
        first.close()
        for look in (lambda: first.device_logits, lambda: first.device_hidden):
            with pytest.raises(BackendUnavailable, match="closed"):
                look()


def test_inputs_that_are_none_are_refused(on_gpu: Loader, part: Part) -> None:
    x = rows(4, WIDTH)
    with another() as theirs, opened(on_gpu(part)) as executor:
        want = executor.forward(fed(x)).copy()
        for given, message in (
            (Foreign(theirs, x[:3]), rf"shape \(3, {WIDTH}\), expected \(4, {WIDTH}\)"),
            (Foreign(theirs, x.astype(np.float64)), "dtype float64, expected float32"),
            (Foreign(theirs, x, strides=(4, 16)), "make it contiguous"),
            (Foreign(theirs, x, mask=x), "has a mask"),
            (x.tolist(), rf"inputs is a list, expected float32 \(4, {WIDTH}\)"),
            (x.astype(np.float64), "inputs is float64"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.forward(replace(fed(x), inputs=given))
            assert len(executor.hidden) == 0
        x[2, 3] = np.nan
        with pytest.raises(NumericError, match="NaN or Inf"):
            executor.forward(replace(fed(x), inputs=Foreign(theirs, x)))
        x[2, 3] = 0
        executor.forward(fed(rows(4, WIDTH)))
        assert equal(executor.forward(fed(rows(4, WIDTH))), want)
    with (
        another() as theirs,
        opened(on_gpu(model())) as executor,
        pytest.raises(BadRequest, match="looks its tokens up"),
    ):
        executor.forward(replace(step((0, 0, ids(4))), inputs=Foreign(theirs, x)))


@pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_other_backends_say_whose_they_are(fake_gpu: FakeCuda, backend: Backend, part: Part) -> None:
    if not backend.available().ok:
        pytest.skip(backend.available().why)
    x = rows(4, WIDTH)
    executor = backend.load(part)
    with another() as theirs:
        for given, message in (
            (Foreign(theirs, x), "a Foreign in a GPU's memory, which the cuda backend alone takes; copy it"),
            (x.tolist(), "inputs is a list"),
        ):
            with pytest.raises(BadRequest, match=message):
                executor.forward(replace(fed(x), inputs=given))
    executor.forward(fed(x))
    executor.close()
