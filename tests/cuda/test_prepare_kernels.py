"""Inputs of linear ops in the emulator: codes, scales and sums to the bit, and what comes before them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels, guarded
from running_step import RunningStep, rows_of

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array

WIDTHS = (1, 7, 63, 65, 288, 4096)
BUCKET = 16  # rows that the buffers hold
SOURCES = {
    "plain": "edge::PlainRows",
    "rms": "edge::NormRows<false>",
    "layer": "edge::NormRows<true>",
    "silu": "edge::ActivatedRows<edge::Activation::kSilu, false>",
    "silu_up": "edge::ActivatedRows<edge::Activation::kSilu, true>",
    "gelu_up": "edge::ActivatedRows<edge::Activation::kGelu, true>",
    "gelu_tanh": "edge::ActivatedRows<edge::Activation::kGeluTanh, false>",
    "relu_up": "edge::ActivatedRows<edge::Activation::kRelu, true>",
}
KINDS = {
    "int16": "edge::IntInputs<16>",
    "int32": "edge::IntInputs<32>",
    "int64": "edge::IntInputs<64>",
    "int128": "edge::IntInputs<128>",
    "half": "edge::HalfInputs",
    "bfloat": "edge::BfloatInputs",
    "float": "edge::FloatInputs",
}
CASES = [
    *[("plain", kind, 1) for kind in KINDS],
    *[("rms", kind, 2) for kind in KINDS],
    *[(source, "int64", 2) for source in SOURCES if source not in ("plain", "rms")],
    *[(source, "half", 1) for source in ("layer", "silu_up")],
    *[("rms", "int64", vectors) for vectors in (0, 1, 4)],
    *[("rms", "half", vectors) for vectors in (0, 4)],
]


def _symbol(source: str, kind: str, vectors: int, whole: bool) -> str:
    return f"{source}_{kind}_{vectors}_{int(whole)}"


@lru_cache(maxsize=1)
def library() -> Emulated:
    lines = ['#include "prepare.cuh"']
    for case in CASES:
        source, kind, vectors = case
        for whole in (False, True):
            call = f"edge::prepare<{SOURCES[source]}, {KINDS[kind]}, {vectors}, {int(whole)}>"
            lines.append(f"EDGE_KERNEL({_symbol(*case, whole)}, 256, EdgePrepare, {call})")
    return Emulated(compile_kernels("\n".join(lines)))


class Prepared:
    """What a launch left: `out` f32 (BUCKET, width), and inputs by token, read slowly from where they lie."""

    def __init__(
        self,
        case: tuple[str, str, int],
        x: Array,
        *,
        y: Array | None = None,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        count: int | None = None,
        logit_rows: tuple[int, ...] | None = None,
        blocks: int = 1,
        spare: int = 0,
        in_place: bool = False,
        whole: bool = True,  # vectors, where the width allows them
    ) -> None:
        _, self.kind, _ = case
        tokens, self.width = x.shape
        integer = self.kind.startswith("int")
        self.group = int(self.kind[3:]) if integer else 0
        self.item = 1 if integer else 4 if self.kind == "float" else 2
        unit = max(64 // self.item, self.group)
        padded = -(-self.width // unit) * unit + spare * unit
        self.chunks = padded * self.item // 64
        self.groups = padded // self.group if integer else 1
        self.rows = len(logit_rows) if logit_rows is not None else tokens if count is None else count
        self.step = RunningStep(tokens if count is None else count, logit_rows or ())
        full = np.full((max(tokens, BUCKET), self.width), np.nan, np.float32)
        full[:tokens] = x
        held = {"x": Guarded.of(full)}
        for name, given in (("y", y), ("weight", weight), ("bias", bias)):
            if given is not None:
                held[name] = Guarded.of(given)
        out = held["x"] if in_place else guarded(BUCKET * self.width * 4)
        codes = guarded(BUCKET * self.chunks * 64)
        scales = guarded(BUCKET * self.groups * 4)
        sums = guarded(BUCKET * self.groups * 4)
        record = rec.Prepare(
            step=self.step.record,
            inputs=rec.Inputs(
                codes.address, scales.address, sums.address if integer else 0, self.chunks, self.groups
            ),
            out=out.address,
            width=self.width,
            eps=eps,
            rows=int(logit_rows is not None),
        )
        for name, memory in held.items():
            setattr(record, name, memory.address)
        library().launch(_symbol(*case, whole and self.width % 4 == 0), (BUCKET, blocks), record)
        self.step.check()
        for memory in (*held.values(), out, codes, scales, sums):
            memory.check()
        self.out = out.view(np.float32, (BUCKET, self.width)).copy()
        self.codes = codes.view(np.uint8, (BUCKET // 8, self.chunks, 8, 64)).copy()
        self.scales = scales.view(np.float32, (BUCKET // 8, self.groups, 8)).copy()
        self.sums = sums.view(np.int32, (BUCKET // 8, self.groups, 8)).copy()
        self._unwritten = [np.resize(guarded(64).data, a.nbytes) for a in (self.codes, self.scales)]

    def values(self, token: int) -> Array:
        """Items of a token in the order of its columns: int8, f16, bf16 bits or f32 (padded width,)."""
        own = self.codes[token // 8, :, token % 8]  # (chunks, 64)
        count = 64 // self.item
        found = np.empty((self.chunks, count, self.item), np.uint8)
        for k in range(count):
            if self.item == 1:
                m, h, q, i = k // 32, k // 16 % 2, k // 4 % 4, k % 4
                byte = 16 * q + 8 * m + 4 * h + i
            elif self.item == 2:
                m, h, q, i = k // 16, k // 8 % 2, k // 2 % 4, k % 2
                byte = 16 * q + 8 * m + 4 * h + 2 * i
            else:
                byte = 4 * k
            found[:, k] = own[:, byte : byte + self.item]
        kind = {"half": np.float16, "bfloat": np.uint16, "float": np.float32}.get(self.kind, np.int8)
        return found.reshape(-1).view(kind)

    def check_inputs(self, values: Array) -> None:
        """All is what the definition makes of `values` f32 (rows, width); rows after them are untouched."""
        assert len(values) == self.rows
        padded = np.zeros((self.rows, self.chunks * 64 // self.item), np.float32)
        padded[:, : self.width] = values
        for t, row in enumerate(padded):
            scale = self.scales[t // 8, :, t % 8]
            if self.group:
                cut = row.reshape(-1, self.group)
                wanted = np.abs(cut).max(axis=1) / np.float32(127)
                divisor = np.where(wanted > 0, wanted, np.float32(np.inf))[:, None]
                code = np.clip(np.rint(cut / divisor), -127, 127).astype(np.int8)
                np.testing.assert_array_equal(self.values(t), code.reshape(-1))
                np.testing.assert_array_equal(
                    self.sums[t // 8, :, t % 8], code.astype(np.int32).sum(axis=1, dtype=np.int32)
                )
                np.testing.assert_array_equal(scale, wanted)
            elif self.kind == "half":
                power = math.frexp(float(np.abs(row).max()))[1] - 1 if row.any() else 0
                assert scale[0] == math.ldexp(1.0, power)
                exact = np.ldexp(row.astype(np.float64), -power)
                np.testing.assert_array_equal(self.values(t), exact.astype(np.float16))
            elif self.kind == "bfloat":
                assert scale[0] == 1
                kept = (self.values(t).astype(np.uint32) << 16).view(np.float32)
                np.testing.assert_array_equal(kept, _nearest_bfloat(row))
            else:
                assert scale[0] == 1
                np.testing.assert_array_equal(self.values(t), row)
        self.check_untouched()

    def check_untouched(self) -> None:
        """Rows at and beyond the count hold what they held before."""
        codes, scales = (
            f.view(a.dtype).reshape(a.shape)
            for f, a in zip(self._unwritten, (self.codes, self.scales), strict=True)
        )
        for t in range(self.rows, BUCKET):
            np.testing.assert_array_equal(self.codes[t // 8, :, t % 8], codes[t // 8, :, t % 8])
            assert self.scales[t // 8, :, t % 8].tobytes() == scales[t // 8, :, t % 8].tobytes()


def _nearest_bfloat(x: Array) -> Array:
    """By distance, in f64; of two equally near the one with the even last bit."""
    low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = ((low.view(np.uint32) >> 16) + 1 << 16).astype(np.uint32).view(np.float32)  # away from zero
    below, above = np.abs(x.astype(np.float64) - low), np.abs(high.astype(np.float64) - x)
    even = (low.view(np.uint32) >> 16) % 2 == 0
    return np.where((below < above) | ((below == above) & even), low, high)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_rows(kind: str, width: int) -> None:
    x = rows_of(width, 11, width)
    x[3] = 0
    x[5, width // 2 :] = 0  # groups of zeros
    x[7] = np.arange(width) % 253 - 126.5  # quotients halfway between codes,
    x[7, ::16] = 127  # as the scales are 1
    x[8] *= np.float32(1e-41) / max(np.abs(x[8]).max(), np.float32(1e-30))  # scales are denormal, or 0
    x[9] = x[9] / np.abs(x[9]).max() * np.finfo(np.float32).max * np.float32(0.99)
    x[10, width // 3] *= np.float32(1e12)
    made = Prepared(("plain", kind, 1), x, spare=1)
    made.check_inputs(x)
    np.testing.assert_array_equal(made.out[:11], x)
    assert made.step.status == 0


@pytest.mark.parametrize("kind", ["int16", "int64", "int128", "bfloat", "float"])
def test_a_row_may_be_shared_among_blocks(kind: str) -> None:
    x = rows_of(3, 9, 4090)
    alone = Prepared(("plain", kind, 1), x)
    for blocks in (2, 4, 7):
        shared = Prepared(("plain", kind, 1), x, blocks=blocks)
        assert shared.codes.tobytes() == alone.codes.tobytes()
        assert shared.scales.tobytes() == alone.scales.tobytes()
        assert shared.sums.tobytes() == alone.sums.tobytes()


def _norm(x: Array, weight: Array, bias: Array | None, eps: float, layer: bool) -> tuple[Array, Array]:
    """numpy_ops.norm of whole rows in f64, and a bound of what f32 in the kernels' order makes of it.

    A sum of a thread's 4 * ceil(width / 1024) values, then of 32 lanes and 8 warps: as many roundings, each
    at most 2^-24 of the sum of magnitudes.
    """
    wide = x.astype(np.float64)
    steps = 4 * -(-x.shape[1] // 1024) + 5 + 8 + 2
    mean = wide.mean(axis=1, keepdims=True) if layer else np.zeros((len(x), 1))
    slip = steps * 2.0**-24 * np.abs(wide).mean(axis=1, keepdims=True) * layer  # of the mean
    centred = wide - mean
    square = np.square(centred).mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt(square + eps)
    out = centred * inverse * weight
    relative = (steps / 2 + 5) * 2.0**-24 + slip * inverse  # the centred squares' slip too
    bound = np.abs(out) * relative + (slip + np.abs(wide) * 2.0**-24 * layer) * inverse * np.abs(weight)
    if bias is not None:
        out = out + bias
        bound = bound + np.abs(out) * 2.0**-24
    return out, bound * 1.01


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("source", "kind"), [("rms", kind) for kind in KINDS] + [("layer", "int64")])
def test_norm_rows(source: str, kind: str, width: int) -> None:
    x = rows_of(width + 1, 10, width) + np.float32(0.5)
    x[4] = 0
    rng = np.random.default_rng(width)
    weight, bias = rng.standard_normal((2, width)).astype(np.float32)
    with_bias = source == "layer"
    made = Prepared((source, kind, 2), x, weight=weight, bias=bias if with_bias else None, eps=1e-3)
    want, bound = _norm(x, weight, bias if with_bias else None, 1e-3, source == "layer")
    assert (np.abs(made.out[:10] - want) <= bound).all()
    made.check_inputs(made.out[:10])
    assert made.step.status == 0


@pytest.mark.parametrize("kind", ["int64", "half"])
@pytest.mark.parametrize("width", [7, 1024, 4096, 5000])
def test_registers_change_no_bit(kind: str, width: int) -> None:
    x, weight = rows_of(5, 3, width), rows_of(6, 1, width)[0]
    first = Prepared(("rms", kind, 2), x, weight=weight)
    first.check_inputs(first.out[:3])
    for vectors in (0, 1, 4) if kind == "int64" else (0, 4):
        again = Prepared(("rms", kind, vectors), x, weight=weight)
        for name in ("out", "codes", "scales"):
            assert getattr(again, name)[:1].tobytes() == getattr(first, name)[:1].tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: _symbol(*case, True))
def test_vectors_change_no_bit(case: tuple[str, str, int]) -> None:
    x, y, weight = rows_of(5, 3, 1292), rows_of(6, BUCKET, 1292), rows_of(7, 1, 1292)[0]
    fast, slow = (Prepared(case, x, y=y, weight=weight, whole=whole) for whole in (True, False))
    for name in ("out", "codes", "scales", "sums"):
        assert getattr(fast, name).tobytes() == getattr(slow, name).tobytes()
    fast.check_inputs(fast.out[:3])


def test_in_place() -> None:
    x, weight = rows_of(5, 3, 2100), rows_of(6, 1, 2100)[0]
    apart = Prepared(("rms", "half", 0), x, weight=weight)
    within = Prepared(("rms", "half", 0), x, weight=weight, in_place=True)
    assert within.out[:3].tobytes() == apart.out[:3].tobytes()
    assert within.codes.tobytes() == apart.codes.tobytes()


def _true_activation(source: str, x: Array) -> Array:
    """In f64."""
    wide = x.astype(np.float64)
    if source.startswith("silu"):
        return wide / (1 + np.exp(-wide))
    if source.startswith("gelu_tanh"):
        return 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    if source.startswith("gelu"):
        return wide * 0.5 * np.vectorize(math.erfc)(wide * -math.sqrt(0.5))
    return np.maximum(wide, 0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("plain", "rms", "layer")])
def test_activated_rows(source: str, width: int) -> None:
    x = rows_of(width, 9, width, spread=1.0)
    y = rows_of(width + 1, 9, width, spread=1.0) if source.endswith("_up") else None
    full = None
    if y is not None:
        full = np.zeros((BUCKET, width), np.float32)
        full[:9] = y
    made = Prepared((source, "int64", 2), x, y=full)
    factor = np.ones_like(x) if y is None else y
    want = _true_activation(source, x) * factor
    # silu within 4 ulp; the others lose what 1 + erf or tanh of a negative x cancels: 2^-22 of |x|
    slack = np.abs(want) if source.startswith("silu") else np.abs(x * factor)
    assert (np.abs(made.out[:9] - want) <= slack * 2.0**-21 + 1e-35).all()
    made.check_inputs(made.out[:9])
    assert made.step.status == 0


def test_logit_rows() -> None:
    x, weight = rows_of(8, 9, 130), rows_of(9, 1, 130)[0]
    for source, kind in (("plain", "int64"), ("rms", "half")):
        given = weight if source == "rms" else None
        whole = Prepared((source, kind, 1 if source == "plain" else 2), x, weight=given)
        chosen = (8, 0, 3, 3, 5)
        some = Prepared((source, kind, 1 if source == "plain" else 2), x, weight=given, logit_rows=chosen)
        assert some.out[:5].tobytes() == whole.out[list(chosen)].tobytes()
        some.check_inputs(whole.out[list(chosen)])


def test_a_token_does_not_depend_on_its_step() -> None:
    x, weight = rows_of(10, 13, 1500), rows_of(9, 1, 1500)[0]
    together = Prepared(("rms", "int32", 2), x, weight=weight)
    for t in (0, 7, 12):
        alone = Prepared(("rms", "int32", 2), x[t : t + 1], weight=weight)
        assert alone.out[0].tobytes() == together.out[t].tobytes()
        np.testing.assert_array_equal(alone.values(0), together.values(t))
        np.testing.assert_array_equal(alone.scales[0, :, 0], together.scales[t // 8, :, t % 8])


@pytest.mark.parametrize(
    "greatest", [2.0**-149, 3 * 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 1.999, 2.0**127, 3.4e38]
)
def test_powers_of_two_of_halves(greatest: float) -> None:
    x = np.zeros((2, 40), np.float32)
    x[0, 3] = -greatest
    x[0, 4] = greatest * 0.3
    x[0, 5] = 2.0**-149
    x[1, 39] = greatest / 2
    made = Prepared(("plain", "half", 1), x)
    made.check_inputs(x)
    assert made.step.status == 0
    if np.float32(greatest / 2) > 0:
        assert 1 <= abs(float(made.values(1)[39])) < 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_told(kind: str, bad: float) -> None:
    weight = np.ones(70, np.float32)
    for column in (0, 37, 69):
        x = rows_of(1, 5, 70)
        x[4, column] = bad
        for case in (("plain", kind, 1), ("rms", kind, 2)):
            given = weight if case[0] == "rms" else None
            assert Prepared(case, x, weight=given).step.status == rec.NOT_FINITE
            assert Prepared(case, x, weight=given, count=4).step.status == 0  # it has no part in the step
            rows = Prepared(case, x, weight=given, logit_rows=(3, 1))
            assert rows.step.status == 0


@pytest.mark.parametrize("source", ["silu", "silu_up", "gelu_up", "gelu_tanh", "relu_up"])
def test_activations_of_what_is_not_finite(source: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = rows_of(1, 1, 70)
        x[0, 69] = bad
        y = np.ones((BUCKET, 70), np.float32)
        assert Prepared((source, "int64", 2), x, y=y).step.status == rec.NOT_FINITE
    x = np.full((1, 70), 3e38, np.float32)  # the function's own overflow is none
    assert Prepared((source, "int64", 2), x, y=np.ones((BUCKET, 70), np.float32)).step.status == 0
    assert Prepared((source, "int64", 2), -x, y=np.ones((BUCKET, 70), np.float32)).step.status == 0
    if source.endswith("_up"):
        y = np.full((BUCKET, 70), 2, np.float32)
        assert Prepared((source, "int64", 2), x, y=y).step.status == rec.NOT_FINITE


def test_overflow_is_told() -> None:
    x = np.full((1, 70), 1e20, np.float32)  # squares are beyond f32
    for source in ("rms", "layer"):
        weight = np.ones(70, np.float32)
        x[0, 0] = -1e20
        made = Prepared((source, "int64", 2), x, weight=weight, bias=weight)
        assert made.step.status == rec.NOT_FINITE
    large = np.full((1, 70), np.finfo(np.float32).max, np.float32)  # rounds to Inf in bf16
    assert Prepared(("plain", "bfloat", 1), large).step.status == rec.NOT_FINITE
    for kind in ("int64", "half", "float"):
        assert Prepared(("plain", kind, 1), large).step.status == 0
