"""A calibrated cpu profile of round numbers, for tests of plans and predictions."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.profile import FormatSpeed, Measured, Profile, QueryTime, load_profile


def measured(**changes: Any) -> Measured:
    """int formats read 10 GB/s, others 5; from the cache four times that; a chunk at 100 or 50 Gop/s."""
    speeds = {}
    for name in FORMATS:
        rate = 10.0 if get_format(name).kind == "int" else 5.0
        speeds[name] = FormatSpeed(
            gbps=rate, cached_gbps=4 * rate, gops=10 * rate, output_ns=0.25, chunk_output_ns=0.125
        )
    base = Measured(
        threads=2,
        request_us=100.0,
        step_us=50.0,
        small_step_us=30.0,
        token_us=1.0,
        stage_us=3.0,
        unit_us=0.25,
        value_ns=0.5,
        odd_head_ns=20.0,
        logit_ns=2.0,
        query=QueryTime(value_ns=0.125, score_ns=1.0),
        chunk_query=QueryTime(value_ns=0.0625, score_ns=0.5),
        row_ns=4.0,
        odd_kv_ns=2.0,
        kv_ns=dict.fromkeys(K_FORMATS, 0.25),
        cache_bytes=0,
        stream_bytes=0,
        core_cache_bytes=0,
        formats=speeds,
    )
    return msgspec.structs.replace(base, **changes)


def calibrated(**changes: Any) -> Profile:
    """The cpu profile with `measured(**changes)`."""
    return load_profile("cpu").calibrated(measured(**changes))
