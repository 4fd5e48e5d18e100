"""Every registered format: closed-form error bounds, golden bytes, sizes, tails, odd values, typed errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
import tracemalloc
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import numpy as np
import pytest
from format_bounds import GROUPED, NAMES, TENSOR, check, matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.engine.formats import (
    ENCODINGS,
    FORMATS,
    Format,
    Plane,
    abi_hash,
    get_format,
    register,
    scaled,
)
from edge_runtime.engine.formats.c_header import c_header
from edge_runtime.engine.formats.nf4 import NF4
from edge_runtime.errors import BadConfig, ValueOutOfRange

GOLDEN = Path(__file__).parent / "golden"
TAILS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 67, 127, 129, 193, 255, 1023)


def slow_formats() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slow_formats", GOLDEN / "slow_formats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLOW = slow_formats()


@pytest.mark.parametrize("name", NAMES)
def test_error_bound_holds_for_a_million_values(name: str) -> None:
    check(name, matrix(1000, 1000))


@pytest.mark.parametrize("name", NAMES)
def test_error_bound_is_broken_by_codes_that_are_off_by_one(name: str) -> None:
    fmt, x = FORMATS[name], matrix(4, 256)
    planes = {n: a.copy() for n, a in fmt.encode(x).items()}
    stored = planes[fmt.planes[0].name]
    codes = stored.view(f"u{stored.itemsize}")
    bits = ENCODINGS[fmt.planes[0].encoding].bits
    codes ^= {1: 0xFF, 2: 0x55, 4: 0x11}.get(bits, 1)  # the neighbouring code, in all of a byte's codes
    error = np.abs(x - fmt.decode(planes, *x.shape).astype(np.float64))
    assert (error > fmt.bound(x, planes)).mean() > 0.99  # a tie lies half a step from both


@pytest.mark.parametrize("name", NAMES)
def test_every_tail_size(name: str) -> None:
    for seed, tail in enumerate(TAILS):
        check(name, matrix(3, tail, seed))
        check(name, matrix(tail, 5, seed))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_decode_to_zero(name: str) -> None:
    _, decoded = check(name, np.zeros((3, 130), np.float32))
    assert not decoded.any()
    negative = FORMATS[name].encode(np.full((3, 130), -0.0, np.float32))
    assert not FORMATS[name].decode(negative, 3, 130).any()
    for plane in FORMATS[name].grid_planes:
        neutral = {"index": -1, "scale": 127 if name == "nf4_g64_dq" else 0}.get(plane.name, 0)
        assert (negative[plane.name] == neutral).all()
        assert plane.name == "index" or not np.signbit(negative[plane.name]).any()


@pytest.mark.parametrize("name", NAMES)
def test_one_huge_outlier_costs_its_own_group_only(name: str) -> None:
    """Two-level formats: its own super-block only."""
    x = matrix(4, 300)
    usual = FORMATS[name].encode(x)
    x[1, 200] = 50000.0
    planes, decoded = check(name, x)
    assert decoded[1, 200] == pytest.approx(50000.0, rel=2.0**-3)
    if name in GROUPED:
        before = FORMATS[name].decode(usual, 4, 300)
        if name.endswith("_k"):
            assert np.array_equal(decoded[:, 256:], before[:, 256:])
            assert np.array_equal(decoded[[0, 2, 3]], before[[0, 2, 3]])
            return
        group = FORMATS[name].group or 0
        other = np.arange(planes["scale"].shape[1]) != 200 // group
        assert np.array_equal(planes["scale"][:, other], usual["scale"][:, other])
        assert np.array_equal(decoded[:, :128], before[:, :128])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 2.0**-126, 1e-30, 2.0**-25, 2.0**-24, 1e-6])
def test_denormals_stay_within_the_bound(name: str, magnitude: float) -> None:
    x = (np.random.default_rng(1).uniform(-1, 1, (3, 200)) * magnitude).astype(np.float32)
    x[0, 0] = magnitude
    planes, _ = check(name, x)
    scale = planes.get("scale")
    if name == "nf4_g64_dq":
        scale = planes["scale2"]
    if scale is not None and scale.dtype == np.float32:
        assert (np.abs(scale[scale != 0]) >= 2.0**-126).all()  # kernels may flush denormals


@pytest.mark.parametrize(
    "name",
    [
        "f32",
        "bf16",
        "int8_row",
        "fp8_e4m3_row",
        "fp8_e4m3_tensor",
        "fp8_e4m3_g128",
        "nf4_g64_f32",
        "nf4_g64_dq",
    ],
)
def test_the_ends_of_f32_do_not_overflow(name: str) -> None:
    largest = 3.3e38 if name == "bf16" else float(np.finfo(np.float32).max)
    check(name, np.array([[largest, 1.0, 0.0], [-largest, 1e38, 1e-45], [1e-45, 3e-45, -1e-39]], np.float32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_values_in_any_shape(name: str, data: st.DataObject) -> None:
    limit = {"fp8_e5m2": 57344.0}.get(name, 65000.0)
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=140))
    values = st.floats(-limit, limit, width=32)
    check(name, data.draw(hnp.arrays(np.float32, shape, elements=values, fill=values)))


def test_the_slow_reference_writes_the_golden_file() -> None:
    assert json.loads((GOLDEN / "formats.json").read_text()) == SLOW.golden()


def test_the_golden_file_covers_the_registry() -> None:
    assert sorted(SLOW.golden()["planes"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name: str) -> None:
    golden = json.loads((GOLDEN / "formats.json").read_text())
    x = np.array(SLOW.values(), np.float32)
    assert hashlib.sha256(x.tobytes()).hexdigest() == golden["values_sha256"]
    planes = FORMATS[name].encode(x)
    assert {n: a.tobytes().hex() for n, a in planes.items()} == golden["planes"][name]


@pytest.mark.parametrize("name", NAMES)
def test_codec_equals_the_slow_reference_on_random_bits(name: str) -> None:
    rng = np.random.default_rng(7)
    cols = 291 if name.endswith("_k") else 131  # more than a super-block
    bits = rng.integers(0, 2**32, (6, cols), dtype=np.uint32)
    x = bits.view(np.float32)
    limit = 57344 if name == "fp8_e5m2" else 65504
    x = np.where(np.isfinite(x) & (np.abs(x) <= limit), x, np.float32(1.5))
    x[3:] = np.round(rng.standard_normal((3, cols)) * 8) / 16  # many ties
    slow = SLOW.encode(name, [[float(v) for v in row] for row in x])
    assert {n: a.tobytes() for n, a in FORMATS[name].encode(x).items()} == slow


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_codes_and_values_equal_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, kind)
    rng = np.random.default_rng(3)
    limit = 448.0 if kind == "float8_e4m3fn" else 57344.0
    all_f16 = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    any_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([all_f16, any_bits, rng.standard_normal(100_000).astype(np.float32)])
    x = x[np.isfinite(x) & (np.abs(x) <= limit)][None]
    want = torch.from_numpy(x).to(dtype)
    if kind == "float8_e4m3fn":
        grid = {"scale": np.ones((1, 1), np.float32)}
        planes = get_format("fp8_e4m3_row").encode_on_grid(x, grid)
        decoded = get_format("fp8_e4m3_row").decode(planes, *x.shape)
    else:
        planes = get_format("fp8_e5m2").encode(x)
        decoded = get_format("fp8_e5m2").decode(planes, *x.shape)
    assert np.array_equal(planes["q"], want.view(torch.uint8).numpy())
    assert np.array_equal(decoded, want.float().numpy())


@pytest.mark.parametrize("name,kind", [("fp8_e4m3_tensor", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_every_fp8_code_decodes_as_torch_does(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)[None]
    planes = {"q": codes, "scale": np.ones((1, 1), np.float32)}
    want = torch.from_numpy(codes).view(getattr(torch, kind)).float().numpy()
    got = FORMATS[name].decode(planes, 1, 256)
    finite = np.isfinite(want)
    assert np.array_equal(got[finite], want[finite])
    assert np.isnan(got[~finite]).all()  # infinities and NaN are never written


def test_bf16_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(4).integers(0, 2**32, (10, 20_000), dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.where(np.abs(x) < 3.3e38, x, np.float32(-1.0))  # also drops NaN
    want = torch.from_numpy(x).to(torch.bfloat16)
    planes = get_format("bf16").encode(x)
    assert np.array_equal(planes["w"], want.view(torch.uint16).numpy())
    assert np.array_equal(get_format("bf16").decode(planes, *x.shape), want.float().numpy())


def test_nf4_table_is_the_published_construction() -> None:
    """Quantiles of N(0, 1), 8 below and 7 above zero, scaled to [-1, 1] (QLoRA, section 3)."""
    normal, end = NormalDist(), 0.9677083
    above = [-normal.inv_cdf(end + (0.5 - end) * i / 7) for i in range(7)]
    below = [normal.inv_cdf(end + (0.5 - end) * i / 8) for i in range(8)]
    values = np.array(sorted([*above, 0.0, *below]))
    assert np.abs(values / np.abs(values).max() - NF4).max() < 2e-7
    assert NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TENSOR])
def test_a_row_does_not_depend_on_its_neighbours_or_on_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = matrix(37, 90)
    whole = FORMATS[name].encode(x)
    decoded = FORMATS[name].decode(whole, *x.shape)
    for i in range(37):
        alone = FORMATS[name].encode(x[i : i + 1])
        assert all(np.array_equal(alone[p][0], whole[p][i]) for p in whole)
    monkeypatch.setattr(scaled, "CHUNK", 200)
    assert all(np.array_equal(a, whole[p]) for p, a in FORMATS[name].encode(x).items())
    assert np.array_equal(FORMATS[name].decode(whole, *x.shape), decoded)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_values_and_planes_are_refused(name: str) -> None:
    fmt = FORMATS[name]
    for bad in (np.nan, np.inf, -np.inf):
        x = matrix(3, 40)
        x[1, 17] = bad
        with pytest.raises(ValueOutOfRange, match="NaN or Inf"):
            fmt.encode(x)
    for shape in ((5,), (0, 4), (2, 3, 4)):
        with pytest.raises(ValueOutOfRange, match="a matrix"):
            fmt.encode(np.zeros(shape, np.float32))
    planes = fmt.encode(matrix(3, 40))
    for plane in fmt.planes:
        with pytest.raises(ValueOutOfRange, match=f"plane '{plane.name}' is missing"):
            fmt.decode({n: a for n, a in planes.items() if n != plane.name}, 3, 40)
        with pytest.raises(ValueOutOfRange, match=f"plane '{plane.name}' is"):
            fmt.decode(planes | {plane.name: planes[plane.name][:, :0]}, 3, 40)
        with pytest.raises(ValueOutOfRange, match=f"plane '{plane.name}' is complex64"):
            fmt.decode(planes | {plane.name: planes[plane.name].astype(np.complex64)}, 3, 40)


@pytest.mark.parametrize(
    "name,largest,message",
    [
        ("f16", 65505, "f16: the tensor holds 65505"),
        ("bf16", 3.4e38, "bf16: a value rounds beyond"),
        ("fp8_e5m2", 57345, "fp8_e5m2: the tensor holds 57345"),
        ("int8_g64", 127 * 65520, "scale 65520"),
        ("int4_g128", 7 * 65520, "scale 65520"),
        ("int4_g32_zp", 15 * 65520, "scale 65520"),
        ("int4_g32_zp", 3.4e38, "int4_g32_zp: a group needs the scale"),
        ("int5_g32_min", 65520, "int5_g32_min: a group begins at -65520, but its f16 minimum ends at -65504"),
        ("q6_k", 127 * 32 * 65520, "q6_k: a group needs the scale"),
        ("q4_k", 255 * 65520, "q4_k: a group needs the scale"),
        ("nf4_g64", 65520, "scale 65520"),
        ("int8_row_o128", 65520, "an outlier column holds 65520"),
    ],
)
def test_values_beyond_the_range_are_refused(name: str, largest: float, message: str) -> None:
    x = matrix(3, 200)
    x[2, 199] = -largest
    with pytest.raises(ValueOutOfRange, match=message):
        FORMATS[name].encode(x)


@pytest.mark.parametrize(
    "name,largest",
    [
        ("f16", 65504),
        ("bf16", 3.3895e38),
        ("fp8_e5m2", 57344),
        ("int8_g64", 127 * 65504),
        ("int4_g128", 7 * 65504),
        ("int4_g32_zp", 15 * 65504),
        ("int3_g64", 3 * 65504),
        ("int5_g32_min", 65504),
        ("q6_k", 127 * 32 * 65504),
        ("mxfp4_g32", 3.4e38),
        ("nvfp4_g16", 3.4e38),
        ("nf4_g64", 65504),
        ("int8_row_o128", 65504),
    ],
)
def test_values_at_the_end_of_the_range_are_held(name: str, largest: float) -> None:
    x = -np.abs(matrix(3, 200))
    x[2, 199] = -largest
    check(name, x)


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(BadConfig, match=r"unknown format 'int4_g65'; did you mean 'int4_g64"):
        get_format("int4_g65")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(BadConfig, match="'f16' is registered twice"):
        register(get_format("f16"))


def test_the_registry_holds_what_the_architecture_asks_for() -> None:
    kinds = [(b, z) for b in (2, 3, 4, 5, 6, 8) for z in ("", "_zp") if b < 5 or not z]
    groups = [f"int{b}_g{g}{z}" for b, z in kinds for g in (32, 64, 128)]
    homes = ["int4_g32_min", "int5_g32_min", *(f"q{b}_k" for b in (2, 3, 4, 5, 6)), "mxfp4_g32", "nvfp4_g16"]
    fp8 = ["fp8_e4m3_row", "fp8_e4m3_tensor", "fp8_e5m2"]
    other = ["fp8_e4m3_g128", "nf4_g64", "nf4_g64_f32", "nf4_g64_dq", "int8_row_o128"]
    assert sorted(["f32", "f16", "bf16", "int8_row", *groups, *homes, *fp8, *other]) == NAMES


@pytest.mark.parametrize(
    "name,bits",
    [
        ("f32", 32),
        ("bf16", 16),
        ("int8_row", 8 + 32 / 4096),
        ("int8_g64", 8.25),
        ("int4_g64", 4.25),
        ("int4_g128", 4.125),
        ("int4_g32_zp", 4.75),
        ("fp8_e4m3_tensor", 8 + 2.0**-19),
        ("nf4_g64", 4.25),
        ("int2_g128", 2.125),
        ("int3_g64", 3.25),
        ("int3_g64_zp", 3.375),
        ("int6_g64", 6.25),
        ("int5_g32_min", 6),
        ("q2_k", 2.625),
        ("q3_k", 3.5625),
        ("q4_k", 4.625),
        ("q5_k", 5.625),
        ("q6_k", 6.5625),
        ("mxfp4_g32", 4.25),
        ("nvfp4_g16", 4.5 + 2.0**-19),
        ("nf4_g64_f32", 4.5),
        ("nf4_g64_dq", 4 + 8 / 64 + 32 / 512 + 2.0**-19),
        ("int8_row_o128", 8 + 32 / 4096 + 16 / 128 + 2.0**-14),
        ("fp8_e4m3_g128", 8.25),
    ],
)
def test_bits_per_weight_of_a_4096_square(name: str, bits: float) -> None:
    assert get_format(name).bits_per_weight(4096, 4096) == bits


@pytest.mark.parametrize("name", NAMES)
def test_byte_count_is_that_of_the_planes(name: str) -> None:
    for rows, cols in ((1, 1), (3, 67), (16, 128), (5, 1023)):
        planes = FORMATS[name].encode(matrix(rows, cols))
        assert FORMATS[name].nbytes(rows, cols) == sum(a.nbytes for a in planes.values())


def test_a_new_format_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dummy joins sizes, hash and C header by being registered, and nothing else."""
    before, base = abi_hash(), get_format("int8_g64")
    dummy = Format(
        "int8_g16",
        (Plane("q", "i8", 1), Plane("scale", "f16", 16)),
        base.encode_rows, base.decode_rows, base.bound, "int",
    )  # fmt: skip
    register(dummy)
    try:
        assert dummy.bits_per_weight(64, 64) == 9.0
        assert '"int8_g16", 16, EDGE_ENC_I8, 16, 0' in c_header()
        assert abi_hash() != before
    finally:
        monkeypatch.delitem(FORMATS, "int8_g16")
    monkeypatch.undo()
    FORMATS.pop("int8_g16", None)
    assert abi_hash() == before


def test_abi_hash_sees_a_change_of_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    before, fmt = abi_hash(), get_format("int4_g64")
    changed = Format(
        fmt.name, (Plane("q", "u4", 1), fmt.planes[1]), fmt.encode_rows, fmt.decode_rows, fmt.bound, "int"
    )
    monkeypatch.setitem(FORMATS, fmt.name, changed)
    assert abi_hash() != before


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_vectorised_and_lean(name: str) -> None:
    """At most twice the matrix in temporary memory; 32000 x 2048 in 2 s is 32 M weights a second."""
    x = matrix(1000, 2048)
    fmt = FORMATS[name]
    start = time.process_time()
    planes = fmt.encode(x)
    assert time.process_time() - start < 1.0
    tracemalloc.start()
    try:
        fmt.encode(x)
        fmt.decode(planes, *x.shape)
        assert tracemalloc.get_traced_memory()[1] < 2 * x.nbytes + 3 * 4 * scaled.CHUNK
    finally:
        tracemalloc.stop()
