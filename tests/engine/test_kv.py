"""Names, sizes and refusals of the KV cache's formats."""

from __future__ import annotations

import pytest

from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import (
    CHANNEL_FORMATS,
    K_FORMATS,
    KV_FORMATS,
    OPEN_PAGES,
    PAGE_TOKENS,
    cache_arrays,
    cache_nbytes,
    kv_pair,
    open_arrays,
    per_channel,
    row_nbytes,
    v_format,
)
from edge_runtime.engine.ops import Attention, Embed, KvAppend, Logits
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BadConfig

STEP = StepShape(context=64, sequences=3, tokens=24, logits=1)


def two_layers() -> Program:
    ops = [Embed(out="x", weight="w")]
    for layer, heads in ((0, 2), (1, 1)):
        ops += [
            KvAppend(k="x" if heads == 2 else "y", v="x" if heads == 2 else "y", layer=layer),
            Attention(q="x", out="y2", layer=layer, heads=2, kv_heads=heads, head_dim=48, scale=0.1),
            Embed(out="y", weight="half"),
        ]
    program = Program(
        ops=(*ops, Logits(x="x", weight="w")),
        tensors={"w": TensorSpec(10, 96, "embedding"), "half": TensorSpec(10, 48, "embedding")},
        buffers={"x": 96, "y": 48, "y2": 96},
        cache=(CacheSlot(2, 48), CacheSlot(1, 48)),
        vocab_size=10,
        max_context=64,
    )
    program.check()
    return program


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("int8", ("int8", "int8")),
        ("f16, int8", ("f16", "int8")),
        ("int4c", ("int4c", "int4")),
        ("int8c", ("int8c", "int8")),
        ("int4c,fp8", ("int4c", "fp8")),
    ],
)
def test_a_pair_of_names(text: str, pair: tuple[str, str]) -> None:
    assert kv_pair(text) == pair


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown KV format 'int9'; did you mean 'int8"),
        ("int4d", "did you mean 'int4"),
        ("int8,int4c", "V cannot be 'int4c': per channel is for K.*use int4c,int4"),
        ("int8c,int8c", "V cannot be 'int8c'"),
        ("int8,,int4", "expected one, or K,V"),
        ("", "unknown KV format ''"),
    ],
)
def test_pairs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        kv_pair(text)


def test_a_channel_of_a_page_has_one_scale() -> None:
    """Which the kernels rely on: the group is no smaller than the largest page."""
    for name in CHANNEL_FORMATS:
        assert per_channel(name) and name in K_FORMATS and name not in KV_FORMATS
        for tokens in PAGE_TOKENS:
            assert get_format(K_FORMATS[name]).shapes(48, tokens)["scale"] == (48, 1)
    assert not any(per_channel(name) for name in KV_FORMATS)
    with pytest.raises(BadConfig, match="V cannot be"):
        v_format("int4c")


@pytest.mark.parametrize(("name", "bits"), [("int8c", (9.0, 8.5)), ("int4c", (5.5, 4.75))])
def test_bits_of_a_key(name: str, bits: tuple[float, float]) -> None:
    """int8: f16 scale; int4: f16 scale and u8 zero point, each for a page of 16 or 32 tokens."""
    for tokens, want in zip(PAGE_TOKENS, bits, strict=True):
        assert row_nbytes(name, 128, tokens) * 8 / 128 == want
    assert row_nbytes("int8", 128, 16) == 128 + 4


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
def test_bytes_by_hand(page_tokens: int) -> None:
    kv = KvPlan(k="int4c", v="int8", page_tokens=page_tokens, pages=5)
    program = two_layers()
    pages = 5 * 3 * 48 * (page_tokens // 2)  # nibbles of three kv heads in all
    scales, zeros = (5 * 2 * 48 * 2, 5 * 48 * 2), (5 * 2 * 48, 5 * 48)  # of each layer
    values = 5 * 3 * page_tokens * (48 + 4)
    ring = 4 * 3 * OPEN_PAGES * page_tokens * (96 + 48)
    fresh = 4 * 24 * 96
    grids = sum(-(-n // 64) * 64 for n in (*scales, *zeros))
    assert cache_nbytes(program, kv, STEP) == pages + grids + values + ring + fresh
    shapes = {(a.layer, a.which, a.plane): a.shape for a in cache_arrays(program, kv)}
    assert shapes[0, "k", "q"] == (5, 2, 48, page_tokens // 2)
    assert shapes[1, "k", "zero"] == (5, 1, 48, 1)
    assert shapes[1, "v", "q"] == (5, 1, page_tokens, 48)


def test_only_a_per_channel_k_has_open_pages() -> None:
    program = two_layers()
    plain = KvPlan(k="int4", v="int4", page_tokens=16, pages=5)
    assert open_arrays(program, plain, STEP) is None
    found = open_arrays(program, KvPlan(k="int4c", v="int4", page_tokens=16, pages=5), STEP)
    assert found is not None
    assert found.pages == ((9, 16, 96), (9, 16, 48)) and found.fresh == (24, 96)
    with pytest.raises(BadConfig, match="V cannot be 'int4c'"):
        cache_arrays(program, KvPlan(k="int4", v="int4c", page_tokens=16, pages=5))
