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
from itertools import pairwise
from pathlib import Path

ROWS, COLS = 3, 67  # an odd number of nibbles, a partial group for every group size
GOLDEN = Path(__file__).with_name("formats.json")

F32, F16, BF16 = (23, -126, 8), (10, -14, 5), (7, -126, 8)  # mantissa bits, least exponent, exponent bits
E4M3, E5M2, E2M1 = (3, -6, 4), (2, -14, 5), (1, 0, 2)
LOW_BITS = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4}  # of a code of so many bits, in plane q; the others in plane high
K_GROUPS = {2: 16, 3: 16, 4: 32, 5: 32, 6: 16}
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


def pack_bits(codes: list[int], bits: int) -> bytes:
    """The first code of a byte in its lowest bits."""
    count = 8 // bits
    padded = codes + [0] * (-len(codes) % count)
    runs = (padded[i : i + count] for i in range(0, len(padded), count))
    return bytes(sum(code << (bits * i) for i, code in enumerate(run)) for run in runs)


def code_planes(codes: list[int], bits: int) -> dict[str, bytes]:
    low = LOW_BITS[bits]
    planes = {"q": pack_bits([c & ((1 << low) - 1) for c in codes], low)}
    return planes if bits == low else planes | {"high": pack_bits([c >> low for c in codes], bits - low)}


def half(v: Fraction) -> bytes:
    """An f16 that holds v exactly."""
    return bits_of(v, F16, v < 0).to_bytes(2, "little")


def encode(name: str, rows: list[list[float]]) -> dict[str, bytes]:
    """The planes of a format, each as bytes in C order."""
    if name in ("f32", "f16", "bf16"):
        return {"w": floats(rows, {"f32": F32, "f16": F16, "bf16": BF16}[name])}
    if name == "fp8_e5m2":
        return {"q": floats(rows, E5M2)}
    if name == "fp8_e4m3_g128":
        return _e4m3_groups(rows)
    if name.startswith("fp8_e4m3"):
        return _e4m3(rows, name.endswith("tensor"))
    if name == "int8_row_o128":
        return _outliers(rows)
    if name == "nf4_g64_dq":
        return _double(rows)
    if "fp4" in name:
        return _microscaling(rows, name)
    joined: dict[str, bytes] = {}
    for row in rows:
        planes = _k_quant(int(name[1]), row) if name.endswith("_k") else _grouped(name, row)
        for plane, data in planes.items():
            joined[plane] = joined.get(plane, b"") + data
    return joined


def _grouped(name: str, row: list[float]) -> dict[str, bytes]:
    """The planes of a row of a format with one scale for every group."""
    group = len(row) if name.endswith("row") else int(name.split("_")[1][1:])
    grid = {"scale": b""}
    grid |= {"zero": b""} if name.endswith("_zp") else {"min": b""} if name.endswith("_min") else {}
    codes: list[int] = []
    for start in range(0, len(row), group):
        scale, other, part = _group(name, row[start : start + group])
        codes += part
        f32 = name in ("int8_row", "nf4_g64_f32")
        grid["scale"] += bits_of(scale, F32, False).to_bytes(4, "little") if f32 else half(scale)
        if "zero" in grid:
            grid["zero"] += bytes([int(other)])
        if "min" in grid:
            grid["min"] += half(other)
    if name.startswith("int8"):
        return {"q": bytes(c & 255 for c in codes)} | grid
    return code_planes(codes, 4 if name.startswith("nf4") else int(name[3])) | grid


def _group(name: str, part: list[float]) -> tuple[Fraction, Fraction | int, list[int]]:
    """Scale, zero point or minimum, and codes of the weights that share them."""
    largest = max(abs(Fraction(v)) for v in part)
    if name.startswith("int8"):
        scale = (f32_scale if name == "int8_row" else f16_scale)(largest / 127)
        return scale, 0, [clip(round(quotient(v, scale)), -127, 127) for v in part]
    if name.startswith("nf4"):
        scale = f32_scale(largest) if name.endswith("f32") else f16_scale(largest)
        return scale, 0, [nearest(quotient(v, scale), nf4_table()) for v in part]
    bits = int(name[3])
    low, high = min(0, *map(Fraction, part)), max(0, *map(Fraction, part))
    top = 2**bits - 1
    if name.endswith("_zp"):
        scale = f16_scale(to_float(high - low, F32) / top)
        zero = round(quotient(float(-low), scale))
        return scale, zero, [clip(round(quotient(v, scale)) + zero, 0, top) for v in part]
    if name.endswith("_min"):
        least = to_float(low, F16, math.floor)
        scale = f16_scale(to_float(high - least, F32) / top)
        return scale, least, shifted_codes(part, scale, least, top)
    top = 2 ** (bits - 1) - 1
    scale = f16_scale(largest / top)
    return scale, 0, [clip(round(quotient(v, scale)), -top - 1, top) + top + 1 for v in part]


def shifted_codes(part: list[float], scale: Fraction, shift: Fraction, top: int) -> list[int]:
    if scale == 0:
        return [0] * len(part)
    steps = (to_float(to_float(Fraction(v) - shift, F32) / scale, F32) for v in part)
    return [clip(round(y), 0, top) for y in steps]


def whole_numbers(wanted: list[Fraction], most: int) -> tuple[Fraction, list[int]]:
    """An f16 unit for all, and each magnitude in units, rounded up, with its sign."""
    unit = f16_scale(max(map(abs, wanted)) / most)
    steps = [math.ceil(to_float(abs(w) / unit, F32)) if unit else 0 for w in wanted]
    return unit, [min(s, most) * (-1 if w < 0 else 1) for s, w in zip(steps, wanted, strict=True)]


def _k_quant(bits: int, row: list[float]) -> dict[str, bytes]:
    """The planes of a row of q2_k to q6_k."""
    codes: list[int] = []
    grid: dict[str, bytes] = {}
    for start in range(0, len(row), 256):
        block = row[start : start + 256]
        parts = [block[i : i + K_GROUPS[bits]] for i in range(0, len(block), K_GROUPS[bits])]
        made = _k_signed(bits, parts) if bits in (3, 6) else _k_minima(bits, parts)
        codes += made[0]
        grid = {plane: grid.get(plane, b"") + data for plane, data in made[1].items()}
    return code_planes(codes, bits) | grid


def _k_signed(bits: int, parts: list[list[float]]) -> tuple[list[int], dict[str, bytes]]:
    top = 2 ** (bits - 1) - 1
    wanted = []
    for part in parts:
        low, high = min(0, *map(Fraction, part)), max(0, *map(Fraction, part))
        plain = max(to_float(low / (-top - 1), F32), to_float(high / top, F32))
        flipped = max(to_float(high / (top + 1), F32), to_float(low / -top, F32))
        wanted.append(-flipped if flipped < plain else plain)
    unit, s = whole_numbers(wanted, 127)
    codes = []
    for part, scale in zip(parts, s, strict=True):
        codes += [clip(round(quotient(v, scale * unit)), -top - 1, top) + top + 1 for v in part]
    return codes, {"scale": bytes(v & 255 for v in s), "super": half(unit)}


def _k_minima(bits: int, parts: list[list[float]]) -> tuple[list[int], dict[str, bytes]]:
    top, most = 2**bits - 1, 15 if bits == 2 else 255
    unit_min, m = whole_numbers([-min(0, *map(Fraction, part)) for part in parts], most)
    spans = [max(0, *map(Fraction, p)) + least * unit_min for p, least in zip(parts, m, strict=True)]
    unit, s = whole_numbers([to_float(to_float(span, F32) / top, F32) for span in spans], most)
    codes = []
    for part, scale, least in zip(parts, s, m, strict=True):
        codes += shifted_codes(part, scale * unit, -least * unit_min, top)
    if bits == 2:
        shared = {"scale_min": bytes(a | b << 4 for a, b in zip(s, m, strict=True))}
    else:
        shared = {"scale": bytes(s), "min": bytes(m)}
    return codes, shared | {"super": half(unit), "super_min": half(unit_min)}


def _microscaling(rows: list[list[float]], name: str) -> dict[str, bytes]:
    group = int(name.split("_g")[1])
    unit = f32_scale(max(abs(Fraction(v)) for row in rows for v in row) / (448 * 6))
    planes = {"q": b"", "scale": b""}
    for row in rows:
        codes = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            largest = max(abs(Fraction(v)) for v in part)
            if name.startswith("mx"):
                code = clip(exponent_of(largest) - 2 + 127, 0, 254) if largest else 0
                scale = Fraction(2) ** (code - 127)
            else:
                wanted = to_float(to_float(largest / 6, F32) / unit, F32) if unit else Fraction(0)
                e4m3 = min(Fraction(448), to_float(wanted, E4M3))
                code, scale = bits_of(e4m3, E4M3, False), to_float(e4m3 * unit, F32)
            planes["scale"] += bytes([code])
            for v in part:
                y = max(Fraction(-6), min(Fraction(6), to_float(quotient(v, scale), E2M1)))
                codes.append(bits_of(y, E2M1, math.copysign(1, v) < 0))
        planes["q"] += pack_bits(codes, 4)
    whole = {"super": bits_of(unit, F32, False).to_bytes(4, "little")}
    return planes if name.startswith("mx") else planes | whole


def nf4_table() -> list[Fraction]:
    return [to_float(Fraction(t), F32) for t in NF4.split()]


def nearest(v: Fraction, table: list[Fraction]) -> int:
    """Index of the entry nearest to v, the lower one of two."""
    return min(range(len(table)), key=lambda i: (abs(v - table[i]), i))


def dynamic_table() -> list[Fraction]:
    """bitsandbytes' create_dynamic_map(signed=True): f32 steps of [0.1, 1], each end one fused operation."""
    table = [Fraction(0), Fraction(1)]
    first, last = to_float(Fraction(0.1), F32), Fraction(1)
    for i in range(7):
        count = 2**i
        step = to_float(to_float(last - first, F32) / count, F32)
        middle = (count + 1) // 2
        ends = [first + step * j if j < middle else last - step * (count - j) for j in range(count + 1)]
        ends = [to_float(e, F32) for e in ends]
        power = to_float(Fraction(10.0 ** (i - 6)), F32)
        for a, b in pairwise(ends):
            v = to_float(power * (to_float(a + b, F32) / 2), F32)
            table += [v, -v]
    return sorted(table)


def f32_bytes(values: list[Fraction]) -> bytes:
    return b"".join(bits_of(v, F32, v < 0).to_bytes(4, "little") for v in values)


def _double(rows: list[list[float]]) -> dict[str, bytes]:
    table, cols = dynamic_table(), len(rows[0])
    first = [[max(abs(Fraction(v)) for v in row[s : s + 64]) for s in range(0, cols, 64)] for row in rows]
    every = [a for line in first for a in line]
    offset = to_float(to_float(sum(every) / len(every), (52, -1022, 11)), F32)
    planes = {"q": b"", "scale": b"", "scale2": b"", "offset": f32_bytes([offset])}
    for row, line in zip(rows, first, strict=True):
        rest = [to_float(a - offset, F32) for a in line]
        codes: list[int] = []
        for start in range(0, len(rest), 8):
            scale2 = f32_scale(max(abs(v) for v in rest[start : start + 8]))
            planes["scale2"] += f32_bytes([scale2])
            for g in range(start, min(start + 8, len(rest))):
                code = nearest(quotient(rest[g], scale2), table)
                planes["scale"] += bytes([code])
                absmax = to_float(to_float(table[code] * scale2, F32) + offset, F32)
                codes += [nearest(quotient(v, absmax), nf4_table()) for v in row[64 * g : 64 * g + 64]]
        planes["q"] += pack_bits(codes, 4)
    return planes


def _outliers(rows: list[list[float]]) -> dict[str, bytes]:
    cols = len(rows[0])
    count = -(-cols // 128)
    size = [max(abs(row[c]) for row in rows) for c in range(cols)]
    taken = sorted(sorted((c for c in range(cols) if size[c]), key=lambda c: (-size[c], c))[:count])
    slots = taken + [-1] * (count - len(taken))
    planes = {"q": b"", "scale": b"", "outlier": b""}
    planes["index"] = b"".join((s % 2**32).to_bytes(4, "little") for s in slots)
    for row in rows:
        scale = f32_scale(max([abs(Fraction(v)) for c, v in enumerate(row) if c not in taken] or [0]) / 127)
        codes = [0 if c in taken else round(quotient(v, scale)) for c, v in enumerate(row)]
        planes["q"] += bytes(clip(c, -127, 127) & 255 for c in codes)
        planes["scale"] += f32_bytes([scale])
        planes["outlier"] += floats([[0.0 if s < 0 else row[s] for s in slots]], F16)
    return planes


def _e4m3_groups(rows: list[list[float]]) -> dict[str, bytes]:
    planes = {"q": b"", "scale": b""}
    for row in rows:
        for start in range(0, len(row), 128):
            made = _e4m3([row[start : start + 128]], True)
            planes = {p: planes[p] + made[p] for p in planes}
    return planes


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
    "fp8_e4m3_g128", "fp8_e5m2", "nf4_g64", "nf4_g64_f32", "nf4_g64_dq", "int8_row_o128",
    "int4_g32_min", "int5_g32_min", "mxfp4_g32", "nvfp4_g16",
    *(f"q{bits}_k" for bits in K_GROUPS),
    *(f"int{bits}_g{group}" for bits in (2, 3, 5, 6) for group in (32, 64, 128)),
    *(f"int{bits}_g{group}_zp" for bits in (2, 3) for group in (32, 64, 128)),
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
