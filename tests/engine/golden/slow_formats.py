"""Every format once more, slowly: exact fractions, one weight at a time, no numpy, nothing of edge_runtime.

`python tests/engine/golden/slow_formats.py` writes formats.json beside it. The codecs are tested against that
file and this file is tested to reproduce it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path

ROWS, COLS = 3, 67  # an odd number of nibbles, a partial group for every group size
GOLDEN = Path(__file__).with_name("formats.json")

F32, F16, BF16 = (23, -126, 8), (10, -14, 5), (7, -126, 8)  # mantissa bits, least exponent, exponent bits
E4M3, E5M2 = (3, -6, 4), (2, -14, 5)
# Dettmers et al. 2023, appendix E.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def exponent_of(v: Fraction) -> int:
    """floor(log2(abs(v))), exactly; v is not 0."""
    guess = abs(v).numerator.bit_length() - v.denominator.bit_length()
    return guess if abs(v) >= Fraction(2) ** guess else guess - 1


def to_float(v: Fraction, kind: tuple[int, int, int], rounding=round) -> Fraction:
    """v rounded (half to even, or by math.ceil) to a binary float with gradual underflow, no upper limit."""
    if v == 0:
        return v
    mantissa, least, _ = kind
    step = Fraction(2) ** (max(exponent_of(v), least) - mantissa)
    return rounding(v / step) * step


def bits_of(v: Fraction, kind: tuple[int, int, int], negative: bool) -> int:
    """The bit pattern of a value that the float kind holds exactly."""
    mantissa, least, exponent_bits = kind
    a = abs(v)
    if a < Fraction(2) ** least:
        body = a / Fraction(2) ** (least - mantissa)
    else:
        exponent = exponent_of(a)
        fraction = (a / Fraction(2) ** exponent - 1) * 2**mantissa
        body = ((exponent - least + 1) << mantissa) + fraction
    assert body == int(body)
    return int(body) | (int(negative) << (mantissa + exponent_bits))


def values() -> list[list[float]]:
    """ROWS x COLS f32 values: ties and spread, zeros with one huge outlier, denormals of f16 and f32."""
    state, rows = 12345, []
    for row in range(ROWS):
        line = []
        for col in range(COLS):
            state = (state * 1103515245 + 12345) % 2**31
            uniform = state / 2**30 - 1
            if row == 0:
                v = uniform * 2.0 ** (col % 5) if col % 3 else (col - 33) / 2  # halves make ties
            elif row == 1:
                v = 9999.0 if col == 40 else (0.0 if col < 32 else uniform)
            else:
                v = uniform * (2.0**-23 if col < 32 else 2.0**-130 if col < 64 else 2.0**-148)
            line.append(struct.unpack("<f", struct.pack("<f", v))[0])
        rows.append(line)
    return rows


def floats(rows: list[list[float]], kind: tuple[int, int, int]) -> bytes:
    size = (1 + kind[0] + kind[2]) // 8
    codes = (bits_of(to_float(Fraction(v), kind), kind, math.copysign(1, v) < 0) for row in rows for v in row)
    return b"".join(code.to_bytes(size, "little") for code in codes)


def f16_scale(wanted: Fraction) -> Fraction:
    return to_float(to_float(wanted, F32), F16, math.ceil)


def f32_scale(wanted: Fraction) -> Fraction:
    return Fraction(0) if wanted == 0 else max(to_float(wanted, F32), Fraction(2) ** -126)


def quotient(v: float, scale: Fraction) -> Fraction:
    return to_float(Fraction(v) / scale, F32) if scale else Fraction(0)


def clip(v: int, low: int, high: int) -> int:
    return max(low, min(high, v))


def nibbles(codes: list[int]) -> bytes:
    padded = codes + [0] * (len(codes) % 2)
    return bytes(padded[i] | padded[i + 1] << 4 for i in range(0, len(padded), 2))


def encode(name: str, rows: list[list[float]]) -> dict[str, bytes]:
    """The planes of a format, each as bytes in C order."""
    if name in ("f32", "f16", "bf16"):
        return {"w": floats(rows, {"f32": F32, "f16": F16, "bf16": BF16}[name])}
    if name == "fp8_e5m2":
        return {"q": floats(rows, E5M2)}
    if name.startswith("fp8_e4m3"):
        return _e4m3(rows, name.endswith("tensor"))
    cols = len(rows[0])
    group = cols if name.endswith("row") else int(name.split("_")[1][1:])
    planes = {"q": b"", "scale": b""} | ({"zero": b""} if name.endswith("_zp") else {})
    for row in rows:
        codes: list[int] = []
        for start in range(0, cols, group):
            part = row[start : start + group]
            scale, zero, part_codes = _group(name, part)
            codes += part_codes
            f32 = name == "int8_row"
            planes["scale"] += bits_of(scale, F32 if f32 else F16, False).to_bytes(4 if f32 else 2, "little")
            if "zero" in planes:
                planes["zero"] += bytes([zero])
        planes["q"] += bytes(c & 255 for c in codes) if name.startswith("int8") else nibbles(codes)
    return planes


def _group(name: str, part: list[float]) -> tuple[Fraction, int, list[int]]:
    """Scale, zero point and codes of the weights that share them."""
    largest = max(abs(Fraction(v)) for v in part)
    if name.startswith("int8"):
        scale = (f32_scale if name == "int8_row" else f16_scale)(largest / 127)
        return scale, 0, [clip(round(quotient(v, scale)), -127, 127) for v in part]
    if name.startswith("nf4"):
        scale = f16_scale(largest)
        table = [to_float(Fraction(t), F32) for t in NF4.split()]
        return scale, 0, [min(range(16), key=lambda i: (abs(quotient(v, scale) - table[i]), i)) for v in part]
    if name.endswith("_zp"):
        low, high = min(0, *map(Fraction, part)), max(0, *map(Fraction, part))
        scale = f16_scale(to_float(high - low, F32) / 15)
        zero = round(quotient(float(-low), scale))
        return scale, zero, [clip(round(quotient(v, scale)) + zero, 0, 15) for v in part]
    scale = f16_scale(largest / 7)
    return scale, 0, [clip(round(quotient(v, scale)), -8, 7) + 8 for v in part]


def _e4m3(rows: list[list[float]], tensor: bool) -> dict[str, bytes]:
    largest = [max(abs(Fraction(v)) for v in row) for row in rows]
    scales = [f32_scale(a / 448) for a in ([max(largest)] if tensor else largest)]
    codes = bytearray()
    for i, row in enumerate(rows):
        scale = scales[0 if tensor else i]
        for v in row:
            y = max(Fraction(-448), min(Fraction(448), to_float(quotient(v, scale), E4M3)))
            codes.append(bits_of(y, E4M3, math.copysign(1, v) < 0))
    return {
        "q": bytes(codes),
        "scale": b"".join(bits_of(s, F32, False).to_bytes(4, "little") for s in scales),
    }


NAMES = (
    "f32", "f16", "bf16", "int8_row", "int8_g32", "int8_g64", "int8_g128", "int4_g32", "int4_g64",
    "int4_g128", "int4_g32_zp", "int4_g64_zp", "int4_g128_zp", "fp8_e4m3_row", "fp8_e4m3_tensor",
    "fp8_e5m2", "nf4_g64",
)  # fmt: skip


def golden() -> dict[str, object]:
    """The content of formats.json: hex of each plane, f32 values first."""
    rows = values()
    rows_e5m2 = [[v if abs(v) <= 57344 else 0.0 for v in row] for row in rows]
    planes = {n: {p: b.hex() for p, b in encode(n, rows_e5m2).items()} for n in NAMES}
    text = b"".join(struct.pack("<f", v) for row in rows for v in row)
    return {"rows": ROWS, "cols": COLS, "values_sha256": hashlib.sha256(text).hexdigest(), "planes": planes}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
