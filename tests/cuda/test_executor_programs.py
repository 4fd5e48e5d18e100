"""Attention and whole programs of the cuda backend on the fake GPU against the reference and the cpu backend.

Integer weight formats quantize the inputs of their products to int8 by groups, as the cpu backend does;
other formats round inputs to f16 (bf16: to bf16). Bounds follow from that.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_programs import (
    AFTER,
    INTEGER,
    NAMES,
    Loader,
    decoder,
    formats_of,
    ids,
    model,
    opened,
    other,
    ready,
    rows,
    step,
)
from emulated_parts import load, packed, part_of, random_weights
from fake_cuda import FakeCuda

from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.protocol import Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.device_code import CACHES
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Attention, Gather, Input, KvAppend, Logits, Rope
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


# --- attention ---------------------------------------------------------------------------------------------

# Of the greatest value: a key or value on a rounding edge may land a step apart, and probabilities are f16
APART = {"f16": 2e-3, "int8": 8e-3, "fp8": 2e-2, "int4": 3e-2}


def attending(
    *,
    kv: str,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    window: int | None = None,
    softcap: float | None = None,
    page_tokens: int = 16,
    freqs: int | None = None,
    context: int = 64,
    pages: int = 12,
) -> Part:
    """Inputs hold queries, keys and values side by side; `hidden` is what attention makes of them."""
    q, side = heads * head_dim, kv_heads * head_dim
    freqs = head_dim // 2 if freqs is None else freqs
    program = Program(
        ops=(
            Input(out="x"),
            Gather(x="x", out="q", order="of_q"),
            Gather(x="x", out="k", order="of_k"),
            Gather(x="x", out="v", order="of_v"),
            Rope(x="q", inv_freq="inv_freq", head_dim=head_dim, scale=0.9),
            Rope(x="k", inv_freq="inv_freq", head_dim=head_dim, scale=0.9),
            KvAppend(k="k", v="v", layer=0),
            Attention(
                q="q", out="y", layer=0, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                scale=head_dim**-0.5, window=window, softcap=softcap,
            ),
            Logits(x="y", weight="head"),
        ),
        tensors={
            "of_q": TensorSpec(1, q, "vector"),
            "of_k": TensorSpec(1, side, "vector"),
            "of_v": TensorSpec(1, side, "vector"),
            "inv_freq": TensorSpec(1, freqs, "vector"),
            "head": TensorSpec(8, q, "head"),
        },
        buffers={"x": q + 2 * side, "q": q, "k": side, "v": side, "y": q},
        cache=(CacheSlot(kv_heads, head_dim, window),),
        vocab_size=8,
        max_context=context,
    )  # fmt: skip
    weights = random_weights(program, formats_of(program, "f16"))
    at = np.split(np.arange(q + 2 * side, dtype=np.float32), [q, q + side])
    for name, order in zip(("of_q", "of_k", "of_v"), at, strict=True):
        weights[name] = packed(order[None], "f32", "rows")
    return part_of(program, weights, kv=kv, tokens=40, page_tokens=page_tokens, pages=pages)


ATTENDING: list[dict[str, Any]] = [
    *({"kv": kv} for kv in CACHES),
    *({"kv": f"{k},{v}", "window": 9} for k, v in AFTER.items()),
    *({"kv": kv, "softcap": 2.0, "heads": 2} for kv in CACHES),
    {"kv": "int8", "heads": 4, "kv_heads": 4},
    {"kv": "int8", "heads": 6, "kv_heads": 1, "freqs": 4},
    {"kv": "int8", "head_dim": 20, "heads": 3, "kv_heads": 1},
    {"kv": "f16", "head_dim": 64, "heads": 2, "kv_heads": 2, "freqs": 1},
    {"kv": "int4", "head_dim": 128, "heads": 2, "kv_heads": 1},
    {"kv": "int8", "head_dim": 8, "heads": 34, "kv_heads": 2},
    {"kv": "f16", "window": 21, "softcap": 2.0},
    {"kv": "int4", "window": 1, "softcap": 3.0},
    {"kv": "f16", "window": 16},
]


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("shape", ATTENDING, ids=lambda s: "-".join(map(str, s.values())))
def test_attention_of_every_shape(on_gpu: Loader, shape: dict[str, Any], page_tokens: int) -> None:
    """Few tokens, many tokens, two sequences: what one step wrote the next reads."""
    part = attending(**shape, page_tokens=page_tokens)
    runs = [[(0, 0, 30)], [(0, 30, 1)], [(0, 31, 6), (1, 0, 20)], [(1, 20, 9), (0, 37, 12)], [(1, 29, 1)]]
    x = rows(64, part.program.buffers["x"])
    x /= np.abs(x).mean(axis=1, keepdims=True)
    oracle = REFERENCE.load(part)
    with opened(on_gpu(part)) as executor:
        for run in runs:
            inputs = np.concatenate([x[at : at + n] for _, at, n in run])
            batch = replace(step(*((s, at, np.zeros(n)) for s, at, n in run)), inputs=inputs)
            executor.forward(batch)
            oracle.forward(batch)
            off = np.abs(executor.hidden - oracle.hidden) / np.abs(oracle.hidden).max()
            assert off.max() <= max(APART[name] for name in shape["kv"].split(","))
            # keys and values of int4 are rounded to f16 when they are decoded, the others' are f16
            assert np.median(off) <= (8e-4 if "int4" in shape["kv"] else 3e-4)


def test_a_context_of_several_chunks(on_gpu: Loader) -> None:
    """More positions than a block of the split attention takes, and where its chunks end."""
    part = attending(kv="int8", context=600, page_tokens=32, pages=20)
    table = np.random.default_rng(3).permutation(20)[None].astype(np.int32)
    x = rows(600, part.program.buffers["x"])
    x /= np.abs(x).mean(axis=1, keepdims=True)
    oracle = REFERENCE.load(part)
    ends = [*range(0, 240, 40), 240, 254, 255, 256, 257, 258, *range(280, 520, 40), 511, 512, 513, 514]
    ends = sorted({*ends, 540, 570, 599, 600})
    with opened(on_gpu(part)) as executor:
        for at, end in pairwise(ends):
            batch = replace(step((0, at, np.zeros(end - at)), tables=table), inputs=x[at:end])
            executor.forward(batch)
            oracle.forward(batch)
            off = np.abs(executor.hidden - oracle.hidden) / np.abs(oracle.hidden).max()
            assert off.max() <= APART["int8"] and np.median(off) <= 3e-4


# --- whole programs ----------------------------------------------------------------------------------------


def off(got: Array, want: Array) -> tuple[float, float]:
    """Greatest and median difference, of the greatest value."""
    assert np.isfinite(want).all()
    apart = np.abs(got - want) / np.abs(want).max()
    return float(apart.max()), float(np.median(apart))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_decoders_of_every_format(on_gpu: Loader, name: str, kv: str) -> None:
    """Each weight format over each cache, against the reference; integers also against the cpu backend, whose
    inputs are quantized alike: only those that attention brought near an edge land a code apart."""
    turn = NAMES.index(name) + CACHES.index(kv)
    v = (kv, AFTER[kv])[turn // 2 % 2]
    part = model(name, kv=f"{kv},{v}", layers=1, tied=bool(turn % 2), page_tokens=16 << (turn % 3 == 0))
    batches = step((0, 0, ids(21)), (1, 0, ids(9, 6))), step((0, 21, ids(1, 8)))
    with opened(on_gpu(part)) as executor:
        got = np.concatenate([executor.forward(batch).copy() for batch in batches])
    most, median = off(got, np.concatenate(other(REFERENCE, part, *batches)))
    if name not in INTEGER:
        narrow = 1e-2 if name == "bf16" else 1e-3  # inputs rounded to bf16
        assert most <= narrow + 2 * max(APART[kv], APART[v]) and median <= 2e-3
        return
    assert most <= 0.08 and median <= 8e-3
    most, median = off(got, np.concatenate(other(CPU, part, *batches)))
    assert most <= 0.03 and median <= 4e-3


def test_layers_heads_windows_and_caps_together(on_gpu: Loader) -> None:
    part = model("f16", kv="f16", layers=3, window=13, softcap=4.0, head_dim=32, heads=4, kv_heads=2)
    batches = [step((0, first, ids(count, first))) for first, count in ((0, 40), (40, 1), (41, 9))]
    with opened(on_gpu(part)) as executor:
        for batch, want in zip(batches, other(REFERENCE, part, *batches), strict=True):
            most, median = off(executor.forward(batch), want)
            assert most <= 4e-3 and median <= 5e-4


def test_rows_wider_than_a_block_and_a_vocabulary_of_slices(on_gpu: Loader) -> None:
    program = decoder(width=1100, ffn=72, vocab=4100, layers=1)
    part = model("int4_g64", program=program, head="int8_row", tokens=8)
    batch = step((0, 0, ids(5, vocab=4100)))
    with opened(on_gpu(part)) as executor:
        got = executor.forward(batch).copy()
        most, median = off(got, other(CPU, part, batch)[0])
        assert most <= 0.02 and median <= 2e-3
        assert executor.likeliest(batch).tolist() == got.argmax(axis=1).tolist()
