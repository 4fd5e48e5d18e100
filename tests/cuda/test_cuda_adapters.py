"""Low-rank adapters on the fake GPU: near the reference, and to the bit whatever shares the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_programs import (
    Loader,
    i32,
    ids,
    model,
    opened,
    ready,
    step,
)
from emulated_parts import load
from fake_cuda import FakeCuda

from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.adapter import Adapter, LowRank, updatable
from edge_runtime.engine.formats import Array


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
