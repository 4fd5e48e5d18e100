"""The cpu packings once more, item by item, written from the byte spec of edge_runtime/engine/packing.py.

`python tests/engine/golden/slow_packing.py` writes packed.json beside it: the planes of formats.json packed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("packed.json")
FORMATS_JSON = Path(__file__).with_name("formats.json")


def group_of(name: str) -> int:
    """The group that columns are padded to: that of the name, else 64."""
    return next((int(part[1:]) for part in name.split("_") if part[0] == "g"), 64)


def item_bytes(name: str, plane: str) -> int:
    if plane == "scale":
        return 4 if name in ("int8_row", "fp8_e4m3_row", "fp8_e4m3_tensor") else 2
    return {"f32": 4, "f16": 2, "bf16": 2}.get(name, 1)


def slow_pack(name: str, planes: dict[str, list[list[int]]], rows: int, cols: int) -> dict[str, list[int]]:
    """Packed planes, from codec planes given as rows of unsigned storage items."""
    group = group_of(name)
    panels, groups = -(-rows // 16), -(-cols // group)
    raw = planes["w" if "w" in planes else "q"]
    nibble = name.startswith(("int4", "nf4"))

    def code(row: int, col: int) -> int:
        if row >= rows or col >= cols:
            if name.endswith("_zp"):
                return planes["zero"][row][col // group] if row < rows else 0
            return 8 if name.startswith("int4") else 7 if name.startswith("nf4") else 0
        return raw[row][col // 2] >> (4 * (col % 2)) & 15 if nibble else raw[row][col]

    codes: list[int] = []
    for panel in range(panels):
        panel_rows = range(16 * panel, 16 * panel + 16)
        for start in range(0, groups * group, group):
            half = start + group // 2
            if name.startswith("int4"):
                for b in range(group // 8):
                    for r in panel_rows:
                        for i in range(4):
                            codes.append(code(r, start + 4 * b + i) + 16 * code(r, half + 4 * b + i))
            elif nibble:
                for j in range(group // 2):
                    codes += [code(r, start + j) + 16 * code(r, half + j) for r in panel_rows]
            elif name.startswith("int8"):
                for b in range(group // 4):
                    for r in panel_rows:
                        codes += [(code(r, start + 4 * b + i) + 128) % 256 for i in range(4)]
            else:
                for j in range(group):
                    codes += [code(r, start + j) for r in panel_rows]
    out = {"w" if "w" in planes else "q": codes}
    for plane in ("scale", "zero"):
        if plane not in planes:
            continue
        items = planes[plane]
        if name.endswith("tensor"):
            out[plane] = [items[0][0]]
            continue
        out[plane] = [
            items[16 * panel + r][g] if 16 * panel + r < rows else 0
            for panel in range(panels)
            for g in range(len(items[0]))
            for r in range(16)
        ]
    return out


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
            height = 1 if plane == "scale" and name.endswith("tensor") else rows
            width = len(items) // height
            lists[plane] = [items[i * width : (i + 1) * width] for i in range(height)]
        out[name] = {}
        for plane, packed in slow_pack(name, lists, rows, cols).items():
            data = b"".join(item.to_bytes(item_bytes(name, plane), "little") for item in packed)
            out[name][plane] = {"first": data[:64].hex(), "sha256": hashlib.sha256(data).hexdigest()}
    return out


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
