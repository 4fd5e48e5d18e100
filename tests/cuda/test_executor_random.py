"""Random programs on the fake GPU: near the reference, and the same bits whatever shares a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_programs import TABLES, equal, opened, ready
from emulated_parts import load, part_of, random_weights
from fake_cuda import load_fake
from hypothesis import HealthCheck, given, settings
from random_programs import VOCAB, programs

from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Gather
from edge_runtime.engine.program import Program
from edge_runtime.errors import NumericError

TOKENS = 21
Drawn = tuple[Program, dict[str, str]]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modules")


@contextmanager
def on_gpu(part: Part, folder: Path) -> Iterator[CudaExecutor]:
    """Loaded on a fake GPU of its own, whose guards are looked at in the end."""
    fake = load_fake()
    fake.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_FAKE_DEVICES", "1")
        patch.setenv("EDGE_FAKE_MODULES", str(folder))
        with opened(load(ready(part, folder))) as executor:
            yield executor
        found = fake.fault or fake.check()
        assert not found, found
        assert fake.used == 0
    fake.reset()


def part_for(drawn: Drawn) -> Part:
    program, formats = drawn
    weights = random_weights(program, formats)
    for op in program.ops:
        if isinstance(op, Gather):
            order = weights[op.order].planes["w"] % program.buffers[op.x]
            weights[op.order] = replace(weights[op.order], planes={"w": order})
    return part_of(program, weights, kv="f16", pages=12)


def batch_of(part: Part, first: int, count: int, sequence: int = 0) -> StepBatch:
    """Tokens first to first + count of one text, with their inputs where the program takes such."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, 64).astype(np.int32)
    width = part.program.input_width
    inputs = None if width is None else rng.standard_normal((64, width)).astype(np.float32)
    at = slice(first, first + count)
    positions = np.arange(64, dtype=np.int32)[at]
    rows = np.arange(count, dtype=np.int32)
    given_ = None if inputs is None else inputs[at]
    return StepBatch(tokens[at], positions, np.full(count, sequence, np.int32), TABLES, rows, inputs=given_)


def reference(part: Part, *batches: StepBatch) -> Array | None:
    """Hidden rows of the steps; None where a number is beyond f32."""
    oracle = REFERENCE.load(part)
    try:
        found = []
        for batch in batches:
            oracle.forward(batch)
            found.append(oracle.hidden.copy())
        return np.concatenate(found)
    except NumericError:
        return None


def shaken(part: Part) -> Part:
    """The part with weights a little off: how far its outputs go with them says how much it magnifies."""
    rng = np.random.default_rng(8)
    weights = dict(part.weights)
    for name, spec in part.program.tensors.items():
        tensor = weights[name]
        if spec.role == "vector" and not name.startswith(("order", "freqs")):
            noise = 1 + 2e-3 * rng.standard_normal(spec.cols)
            planes = {"w": (tensor.planes["w"] * noise).astype(np.float32)}
            weights[name] = replace(tensor, planes=planes)
        elif tensor.format == "f16":
            noise = 1 + 1e-3 * rng.standard_normal(tensor.planes["w"].size)
            weights[name] = replace(tensor, planes={"w": (tensor.planes["w"] * noise).astype(np.float16)})
    return replace(part, weights=weights)


@given(programs(("f16",)))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_near_the_reference(modules: Path, drawn: Drawn) -> None:
    part = part_for(drawn)
    batches = batch_of(part, 0, 13), batch_of(part, 13, 1), batch_of(part, 14, 7)
    want, moved = reference(part, *batches), reference(shaken(part), *batches)
    with on_gpu(part, modules) as executor:
        if want is None:
            with pytest.raises(NumericError):
                for batch in batches:
                    executor.forward(batch)
            return
        found = []
        for batch in batches:
            try:
                executor.forward(batch)
            except NumericError:  # keys beyond f16 by a hair, or squares beyond f32
                assert np.abs(want).max() > 1e3
                return
            found.append(executor.hidden.copy())
    assert moved is not None
    size = np.abs(want).max(axis=1, keepdims=True)
    bound = 0.02 * size + 8 * np.abs(moved - want).max(axis=1, keepdims=True)
    assert (np.abs(np.concatenate(found) - want) <= bound).all()


@given(programs(("int4_g64", "f16", "bf16", "int8_row", "nf4_g64")))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_same_bits_in_any_step(modules: Path, drawn: Drawn) -> None:
    """All at once; one by one; in pieces beside other tokens and in other pages."""
    part = part_for(drawn)
    with on_gpu(part, modules) as executor:
        try:
            want = executor.forward(batch_of(part, 0, TOKENS)).copy()
        except NumericError:
            return
        hidden = executor.hidden.copy()
        for sequence, size in ((1, 1), (0, 9)):
            logits, rows = [], []
            for at in range(0, TOKENS, size):
                batch = batch_of(part, at, min(size, TOKENS - at), sequence)
                logits.append(executor.forward(batch).copy())
                rows.append(executor.hidden.copy())
            assert equal(np.concatenate(logits), want) and equal(np.concatenate(rows), hidden)
