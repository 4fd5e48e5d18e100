"""The cpu packings once more, item by item, written from the byte spec of edge_runtime/engine/packing.py.

`python tests/engine/golden/slow_packing.py` writes packed.json beside it: the planes of formats.json packed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("packed.json")
FORMATS_JSON = Path(__file__).with_name("formats.json")


SIZES = {"scale2": 4, "offset": 4, "outlier": 2, "index": 4}


def one_row(name: str, plane: str) -> bool:
    """Whether the plane belongs to the matrix as a whole."""
    whole = {"nvfp4_g16": ("super",), "fp8_e4m3_tensor": ("scale",)}.get(name, ())
    return plane in ("offset", "index", *whole) or (plane == "super" and name.startswith("tcq"))


def group_of(name: str) -> int:
    """Weights that share a scale: that of the name, else 64."""
    if name.endswith("_k"):
        return 32 if name in ("q4_k", "q5_k") else 16
    return next((int(part[1:]) for part in name.split("_") if part[0] == "g"), 64)


def item_bytes(name: str, plane: str) -> int:
    if plane == "super":
        return 2 if name.endswith("_k") else 4
    if plane == "super_min" or (plane == "min" and name.endswith("_min")):
        return 2
    if plane == "scale" and not (name.endswith(("_k", "_dq")) or "fp4" in name or name.startswith("tcq")):
        wide = name.startswith(("int8_row", "fp8_e4m3")) or name.endswith("_f32")
        return 4 if wide else 2
    if plane in SIZES:
        return SIZES[plane]
    return {"f32": 4, "f16": 2, "bf16": 2}.get(name, 1)


def bits_of(name: str) -> int:
    """Bits of a code, in both planes."""
    return 4 if "nf4" in name or "fp4" in name else int(name[1] if name.endswith("_k") else name[3])


def weights_of(name: str, plane: str) -> int:
    """Weights that share an item of a plane."""
    if plane.startswith("super"):
        return 256
    return {"scale2": 512, "outlier": 128}.get(plane, group_of(name))


def slow_pack(name: str, planes: dict[str, list[list[int]]], rows: int, cols: int) -> dict[str, list[int]]:
    """Packed planes, from codec planes given as rows of unsigned storage items."""
    unit = max(group_of(name), 32)
    panels, width = -(-rows // 16), -(-cols // unit) * unit
    out: dict[str, list[int]] = {}
    for plane, items in planes.items():
        if plane in ("w", "q", "high"):
            out[plane] = _codes(name, plane, planes, rows, cols)
        elif one_row(name, plane):
            out[plane] = items[0]
        else:
            by_row = plane == "scale" and ("_row" in name)
            out[plane] = [
                items[16 * panel + r][g] if 16 * panel + r < rows and g < len(items[0]) else 0
                for panel in range(panels)
                for g in range(1 if by_row else -(-width // weights_of(name, plane)))
                for r in range(16)
            ]
    return out


def _codes(name: str, plane: str, planes: dict[str, list[list[int]]], rows: int, cols: int) -> list[int]:
    group, unit = group_of(name), max(group_of(name), 32)
    width = -(-cols // unit) * unit
    small = not name.startswith(("f", "bf16", "int8"))
    bits = 8
    if small:
        low = {2: 2, 3: 2}.get(bits_of(name), 4)
        bits = low if plane == "q" else bits_of(name) - low
    count = 8 // bits

    def code(row: int, col: int) -> int:
        if row < rows and col < cols:
            return (
                planes[plane][row][col // count] >> (bits * (col % count)) & ((1 << bits) - 1)
                if small
                else (planes[plane][row][col])
            )
        if (
            not small
            or "fp4" in name
            or name.startswith("tcq")
            or name.endswith("_min")
            or name in ("q2_k", "q4_k", "q5_k")
        ):
            return 0
        if name.endswith("_zp"):
            whole = planes["zero"][row][col // group] if row < rows else 0
        else:
            whole = 7 if name.startswith("nf4") else 2 ** (bits_of(name) - 1)
        return (whole if plane == "q" else whole >> low) & ((1 << bits) - 1)

    codes: list[int] = []
    for panel in range(-(-rows // 16)):
        panel_rows = range(16 * panel, 16 * panel + 16)
        for start in range(0, width, unit):
            if name.startswith("nf4"):
                for j in range(unit // 2):
                    codes += [code(r, start + j) + 16 * code(r, start + unit // 2 + j) for r in panel_rows]
            elif small:
                run = unit if name.startswith("int4") else 32
                for begin in range(start, start + unit, run):
                    for b in range(run // (4 * count)):
                        for r in panel_rows:
                            for first in range(begin + 4 * b, begin + 4 * b + 4):
                                shares = (code(r, first + p * run // count) << bits * p for p in range(count))
                                codes.append(sum(shares))
            elif name.startswith("int8"):
                for b in range(unit // 4):
                    for r in panel_rows:
                        codes += [(code(r, start + 4 * b + i) + 128) % 256 for i in range(4)]
            else:
                for j in range(unit):
                    codes += [code(r, start + j) for r in panel_rows]
    return codes


def golden() -> dict[str, dict[str, dict[str, str]]]:
    """For each format and packed plane: its first 64 bytes and the sha256 of all."""
    source = json.loads(FORMATS_JSON.read_text())
    rows, cols = source["rows"], source["cols"]
    out: dict[str, dict[str, dict[str, str]]] = {}
    for name, planes in source["planes"].items():
        lists = {}
        for plane, text in planes.items():
            data, size = bytes.fromhex(text), item_bytes(name, plane)
            items = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
            height = 1 if one_row(name, plane) else rows
            width = len(items) // height
            lists[plane] = [items[i * width : (i + 1) * width] for i in range(height)]
        out[name] = {}
        for plane, packed in slow_pack(name, lists, rows, cols).items():
            data = b"".join(item.to_bytes(item_bytes(name, plane), "little") for item in packed)
            out[name][plane] = {"first": data[:64].hex(), "sha256": hashlib.sha256(data).hexdigest()}
    return out


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
