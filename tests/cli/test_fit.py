"""Costs of the speed model from measured seconds: seconds that known costs make give these costs again."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.cli import synthetic
from edge_runtime.cli.experiment import DECODERS, Experiment, Seen, experiments
from edge_runtime.cli.fit import Setting, fit
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.profile import FormatSpeed, Measured, QueryTime, load_profile
from edge_runtime.engine.roofline import Step, timer

FORMATS = ("int8_row", "int4_g64", "nf4_g64", "f16")
KEPT, STREAM = 6 << 20, 96 << 20
TRUTH = Measured(
    threads=2,
    request_us=110.0,
    step_us=40.0,
    small_step_us=30.0,
    token_us=1.5,
    stage_us=2.0,
    unit_us=0.2,
    value_ns=0.4,
    odd_head_ns=50.0,
    logit_ns=0.3,
    query=QueryTime(value_ns=0.03, score_ns=0.8),
    chunk_query=QueryTime(value_ns=0.02, score_ns=0.5),
    row_ns=4.0,
    odd_kv_ns=1.0,
    kv_ns={name: 0.05 + 0.02 * i for i, name in enumerate(K_FORMATS)},
    cache_bytes=24 << 20,
    stream_bytes=80 << 20,
    core_cache_bytes=1 << 20,
    formats={
        name: FormatSpeed(
            gbps=30.0 - 4 * i,
            cached_gbps=100.0 - 20 * i,
            gops=800.0 - 150 * i,
            output_ns=0.2 + 0.1 * i,
            chunk_output_ns=0.3 + 0.1 * i,
        )
        for i, name in enumerate(FORMATS)
    },
)


def seconds(seen: Seen, measured: Measured, call: float) -> float:
    """What the model says: a session's work only in a session, a call's in all others."""
    if not seen.hosted:
        nothing = dict.fromkeys(("step_us", "small_step_us", "token_us", "logit_ns"), 0.0)
        measured = msgspec.structs.replace(measured, **nothing)
    profile = load_profile("cpu").calibrated(measured)
    told = timer(seen.program, seen.tensors, seen.kv, profile, profile.mode())(seen.steps)
    return told + (0.0 if seen.hosted else call) + (1e-6 * measured.request_us if seen.begun else 0.0)


@pytest.fixture(scope="module")
def equations() -> list[Seen]:
    seen = []
    for e in experiments(FORMATS, KEPT, STREAM):
        made = e.seen([1.0] if isinstance(e, Experiment) else [1.0, 1.0, 2.0])
        seen += [taking(one, seconds(one, TRUTH, 5e-6)) for one in made]
    return seen


def taking(seen: Seen, taken: float) -> Seen:
    return dataclasses.replace(seen, seconds=taken)


def flat(figures: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in figures.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def setting(core_cache_bytes: int = TRUTH.core_cache_bytes) -> Setting:
    return Setting(TRUTH.threads, TRUTH.cache_bytes, TRUTH.stream_bytes, core_cache_bytes, FORMATS)


def test_costs_that_made_the_seconds_are_found_again(equations: list[Seen]) -> None:
    found = fit(load_profile("cpu"), setting(), equations)
    assert max(abs(e) for e in found.errors.values()) < 1e-6
    told, known = (flat(msgspec.to_builtins(m)) for m in (found.measured, TRUTH))
    assert told == pytest.approx(known, rel=1e-3)


def test_noise_moves_what_is_told_of_another_decoder_no_further(equations: list[Seen]) -> None:
    rng = np.random.default_rng(5)
    noisy = [taking(s, s.seconds * float(1 + 0.1 * rng.random())) for s in equations]
    profile = load_profile("cpu").calibrated(fit(load_profile("cpu"), setting(), noisy).measured)
    program = synthetic.decoder(1024, width=256, hidden=640, layers=7, heads=4, context=512)
    step = StepShape(context=512, sequences=1, tokens=128, logits=1)
    kv = synthetic.cache_of(program, "int8", "int8", step)
    for fmt in FORMATS:
        plans = synthetic.plans_of(program, fmt)
        for steps in ((Step(1, 300, True),), (Step(128, 0, False), Step(128, 128, True))):
            told = timer(program, plans, kv, profile, profile.mode())(steps)
            known = timer(program, plans, kv, load_profile("cpu").calibrated(TRUTH), profile.mode())(steps)
            assert 0.98 < told / known < 1.12


def test_where_no_decoder_is_small_a_small_one_s_step_is_any_step_s(equations: list[Seen]) -> None:
    found = fit(load_profile("cpu"), setting(core_cache_bytes=0), equations).measured
    assert found.small_step_us == found.step_us > 0


def test_experiments_have_names_of_their_own_and_decoders_of_every_size() -> None:
    names = [e.name for e in experiments(FORMATS, KEPT, STREAM)]
    assert len(set(names)) == len(names)
    sizes = [sum(s.size for s in d.program().tensors.values()) for d in DECODERS]
    assert sizes == sorted(sizes) and sizes[-1] > 50 * sizes[0]
