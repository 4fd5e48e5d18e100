"""Packing m16: round trips, and bytes against slow readings of the spec and of PTX's fragment layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from device_programs import NAMES

from edge_runtime.engine import mma_order, packing
from edge_runtime.engine.formats import ENCODINGS, FORMATS, Array, get_format
from edge_runtime.engine.formats.codes import pack_bits
from edge_runtime.engine.mma_order import chunk_columns, chunk_order, from_chunks, to_chunks
from edge_runtime.engine.packing import cuda_packing, pack, packed_nbytes, plane_items, unpack
from edge_runtime.errors import Unsupported, ValueOutOfRange

TAILS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 193, 255, 1023)
ENCODED = sorted({plane.encoding for name in NAMES for plane in get_format(name).codes})
COLUMNS = {"i8": 32, "f16": 16, "bf16": 16, "e4m3": 32, "e5m2": 32}  # of a chunk; others 64
INTEGER = ("i8", "u4", "u4o8", "u4o16", "u4o32", "u2", "u2o2", "u2o4", "u1")
GOLDEN = Path(__file__).parents[1] / "engine" / "golden"
PACKED = Path(__file__).with_name("packed_m16.json")


def random_planes(name: str, rows: int, cols: int) -> dict[str, Array]:
    """Planes with every code possible; unused last bits are 0, as the codec writes them."""
    rng = np.random.default_rng(rows * 10007 + cols)
    fmt = get_format(name)
    planes = fmt.encode(rng.uniform(-9, 5, (rows, cols)).astype(np.float32))
    for codes in fmt.codes:
        bits = ENCODINGS[codes.encoding].bits
        if bits < 8:
            planes[codes.name] = pack_bits(rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8), bits)
        else:
            data = planes[codes.name].view(np.uint8)
            data[:] = rng.integers(0, 256, data.shape)
    return planes


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    """Bit for bit, dtype and shape too."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


# --- the spec, item by item --------------------------------------------------------------------------------


def place(encoding: str, row: int, column: int) -> int:
    """In a chunk, where the code of a row and column lies: its item of a lane's bytes, from the module's
    table. Items are bits, pairs of them, nibbles, bytes or halves; those of a byte count from the lowest."""
    w_row, r = row // 8, row % 8
    if encoding in INTEGER and ENCODINGS[encoding].bits < 4:  # k = 32*m + 16*half + 4*q + i
        m, half, q, i = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        lane, word = 4 * r + q, 2 * half + w_row
        if encoding == "u1":  # bit 4m + w of byte i
            return (lane * 4 + i) * 8 + 4 * m + word
        return (lane * 8 + 4 * m + i) * 4 + word  # bits 2w, 2w + 1 of byte i of word m
    if encoding == "i8":  # k = 16*half + 4*q + i
        half, q, item = column // 16, column // 4 % 4, column % 4
        items = 4
    elif encoding in INTEGER:  # k = 32*m + 16*half + 4*q + i
        m, half, q, i = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        item, items = 2 * i + m, 8
    elif encoding in ("f16", "bf16"):  # k = 8*half + 2*q + i
        half, q, item = column // 8, column // 2 % 4, column % 2
        items = 2
    else:  # fp8 and tables: byte or nibble 2*m + i, k = 16*m + 8*half + 2*q + i
        m, half, q, i = column // 16, column // 8 % 2, column // 2 % 4, column % 2
        item, items = 2 * m + i, 4 if encoding in ("e4m3", "e5m2") else 8
    lane, word = 4 * r + q, 2 * half + w_row
    return (lane * 4 + word) * items + item


def slow_codes(name: str, plane: str, planes: dict[str, Array], rows: int, cols: int) -> bytes:
    """A plane of codes, placed one by one."""
    fmt = get_format(name)
    record = fmt.plane(plane)
    assert record is not None
    bits, per = ENCODINGS[record.encoding].bits, COLUMNS.get(record.encoding, 64)
    unit = max(fmt.group or 64, 64)
    chunks = -(-cols // unit) * unit // per
    panels = -(-rows // 16)
    out = [0] * (panels * chunks * 16 * per)
    raw = planes[plane].view(f"<u{planes[plane].itemsize}").tolist()
    share = max(1, 8 // bits)  # codes of a byte
    for row in range(rows):
        for col in range(cols):
            value = raw[row][col // share] >> (bits * (col % share)) & ((1 << bits) - 1)
            start = (row // 16 * chunks + col // per) * 16 * per
            out[start + place(record.encoding, row % 16, col % per)] = value
    if bits < 8:
        joined = zip(*(out[i::share] for i in range(share)), strict=True)
        return bytes(sum(value << bits * i for i, value in enumerate(byte)) for byte in joined)
    return b"".join(value.to_bytes(bits // 8, "little") for value in out)


def slow_shared(name: str, plane: str, planes: dict[str, Array], rows: int, cols: int) -> bytes:
    """Scales and the like: [panel][run][r][row r, row r + 8][items of a run], one a row, or one in all."""
    fmt = get_format(name)
    record = fmt.plane(plane)
    assert record is not None
    data = planes[plane]
    raw = data.view(f"<u{data.itemsize}").tolist()
    if record.whole:
        return data.tobytes()
    panels, unit = range(-(-rows // 16)), max(fmt.group or 64, 64)
    width = -(-cols // unit) * unit
    if record.per == "row":
        items = [(16 * panel + row, 0) for panel in panels for row in range(16)]
    else:
        run = max(unit, int(record.per))  # columns
        each = run // int(record.per)
        items = [
            (16 * panel + row, at * each + item)
            for panel in panels
            for at in range(-(-width // run))
            for r in range(8)
            for row in (r, r + 8)
            for item in range(each)
        ]
    out = [raw[row][g] if row < rows and g < len(raw[row]) else 0 for row, g in items]
    return b"".join(value.to_bytes(data.itemsize, "little") for value in out)


def slow(name: str, plane: str, planes: dict[str, Array], rows: int, cols: int) -> bytes:
    is_codes = plane in {p.name for p in get_format(name).codes}
    return (slow_codes if is_codes else slow_shared)(name, plane, planes, rows, cols)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 67), (5, 129), (33, 130), (2, 31)])
def test_bytes_are_those_of_the_spec(name: str, shape: tuple[int, int]) -> None:
    """Padding codes, scales and zero points are 0: the slow reading leaves 0 where it puts nothing."""
    planes = random_planes(name, *shape)
    packed = pack(name, "m16", planes, *shape)
    for plane, data in packed.items():
        assert data.tobytes() == slow(name, plane, planes, *shape), plane


# --- PTX: which value of A a lane holds in which register --------------------------------------------------


def ptx_element(bits: int, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element a_i of A, as the PTX ISA has it: m16n8k32 with 8-bit, m16n8k16 with 16-bit.

    groupID = lane >> 2, threadID_in_group = lane % 4.
    8 bits:  row = groupID for 0 <= i < 4 or 8 <= i < 12, else groupID + 8;
             col = threadID_in_group * 4 + (i & 3), + 16 for i >= 8.
    16 bits: row = groupID for 0 <= i < 2 or 4 <= i < 6, else groupID + 8;
             col = threadID_in_group * 2 + (i & 1), + 8 for i >= 4.
    """
    group, thread = lane >> 2, lane % 4
    if bits == 8:
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_lane_s_words_are_its_fragments(encoding: str) -> None:
    """A lane's bytes, decoded as the kernels do, are fragments of consecutive products: registers in PTX's
    order, of bytes or halves. The columns of A are those of the inputs, in products of 32 or 16. (Those of 16
    columns of bytes, m16n8k16, have the first or the last two registers of one of 32.)"""
    bits = ENCODINGS[encoding].bits
    integer = encoding in INTEGER
    columns = chunk_columns(encoding)
    codes = np.arange(16 * columns).reshape(16, columns)
    stored = to_chunks(codes, encoding).reshape(32, -1, 32 // bits)  # lane, word, item
    product = 32 if integer else 16  # columns of one
    for step in range(columns // product):
        for lane in range(32):
            for i in range(16 if integer else 8):
                row, col = ptx_element(8 if integer else 16, lane, i)
                each = 4 if integer else 2  # elements of a register
                word, within = i // each, i % each
                if bits == 16 or encoding == "i8":
                    item = within
                elif encoding == "u1":  # bit 4m + w of the byte
                    word, item = 0, 8 * within + 4 * step + word
                elif bits == 2:  # w-th two bits of the byte, in a word for each product
                    word, item = step, 4 * within + word
                elif integer:  # low or high nibble of the byte
                    item = 2 * within + step
                else:  # byte or nibble 2m + i
                    item = 2 * step + within
                assert stored[lane, word, item] == row * columns + product * step + col


@pytest.mark.parametrize("encoding", ENCODED)
def test_orders_are_permutations(encoding: str) -> None:
    order = chunk_order(encoding)
    columns = COLUMNS.get(encoding, 64)
    assert chunk_columns(encoding) == columns and order.size == 16 * columns
    assert np.array_equal(np.sort(order), np.arange(order.size))
    codes = np.random.default_rng(1).integers(0, 99, (48, 3 * chunk_columns(encoding)))
    stored = to_chunks(codes, encoding)
    assert stored.ndim == 1 and np.array_equal(from_chunks(stored, encoding, codes.shape[1]), codes)
    assert not np.array_equal(stored, codes.reshape(-1))


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_every_tail(name: str) -> None:
    for tail in TAILS:
        for rows, cols in ((3, tail), (tail, 67), (17, tail)):
            planes = random_planes(name, rows, cols)
            packed = pack(name, "m16", planes, rows, cols)
            items = {n: (a.size, a.dtype) for n, a in packed.items()}
            want = plane_items(name, "m16", rows, cols)
            assert items == {n: (count, np.dtype(dtype)) for n, (count, dtype) in want.items()}
            assert all(a.ndim == 1 and a.flags.c_contiguous for a in packed.values())
            assert same(unpack(name, "m16", packed, rows, cols), planes)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_large_matrix_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = random_planes(name, 150, 193)
    whole = pack(name, "m16", planes, 150, 193)
    monkeypatch.setattr(packing, "_CHUNK", 5000)
    assert same(pack(name, "m16", planes, 150, 193), whole)
    assert same(unpack(name, "m16", whole, 150, 193), planes)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_zero_bits(name: str) -> None:
    """All codes are ones, so what is 0 is padding: exactly as many codes as the matrix has not."""
    rows, cols, fmt = 18, 67, get_format(name)
    planes = random_planes(name, rows, cols)
    for codes in fmt.codes:
        bits = ENCODINGS[codes.encoding].bits
        if bits < 8:
            planes[codes.name] = pack_bits(np.full((rows, cols), (1 << bits) - 1, np.uint8), bits)
        else:
            planes[codes.name].view(np.uint8)[:] = 0xFF
    packed = pack(name, "m16", planes, rows, cols)
    for codes in fmt.codes:
        data = packed[codes.name].view(np.uint8)
        set_bits = int(np.unpackbits(data).sum())
        assert set_bits == rows * cols * ENCODINGS[codes.encoding].bits < data.size * 8


@pytest.mark.parametrize("name", NAMES)
def test_sizes_follow_from_the_record(name: str) -> None:
    """Whole panels and units take exactly the format's bytes, as in every packing."""
    fmt = get_format(name)
    want = sum(-(-p.nbytes(4096, 2048) // 64) * 64 for p in fmt.planes)
    assert packed_nbytes(name, "m16", 4096, 2048) == want == packed_nbytes(name, "rows", 4096, 2048)
    unit = max(fmt.group or 0, mma_order.UNIT)
    assert packed_nbytes(name, "m16", 1, 1) == packed_nbytes(name, "m16", 16, unit)


def test_which_formats_have_it() -> None:
    assert {name for name in FORMATS if cuda_packing(name) == "m16"} == set(NAMES)
    for name in ("f32", "int8_row_o128"):
        assert cuda_packing(name) == "rows"
        with pytest.raises(Unsupported, match=f"{name} has no packing 'm16'; use rows or n16"):
            plane_items(name, "m16", 16, 64)
    packed = pack("int4_g64", "m16", random_planes("int4_g64", 16, 64), 16, 64)
    with pytest.raises(
        ValueOutOfRange, match=r"in m16: plane 'q' is uint8 \(511,\), expected uint8 \(512,\)"
    ):
        unpack("int4_g64", "m16", packed | {"q": packed["q"][:-1]}, 16, 64)


# --- golden bytes ------------------------------------------------------------------------------------------


def golden_digests() -> dict[str, dict[str, dict[str, str]]]:
    """First bytes and sha256 of the golden planes packed by the slow reading."""
    source = json.loads((GOLDEN / "formats.json").read_text())
    rows, cols = source["rows"], source["cols"]
    out: dict[str, dict[str, dict[str, str]]] = {}
    for name in NAMES:
        fmt, planes = get_format(name), {}
        for plane in fmt.planes:
            data = bytes.fromhex(source["planes"][name][plane.name])
            dtype = ENCODINGS[plane.encoding].dtype
            planes[plane.name] = np.frombuffer(data, dtype).reshape(plane.shape(rows, cols))
        out[name] = {}
        for plane in fmt.planes:
            data = slow(name, plane.name, planes, rows, cols)
            out[name][plane.name] = {"first": data[:64].hex(), "sha256": hashlib.sha256(data).hexdigest()}
            packed = pack(name, "m16", planes, rows, cols)[plane.name]
            assert packed.tobytes() == data
    return out


def test_golden_bytes() -> None:
    """A change of byte order is a change of the file format. `python test_packing_m16.py` writes the file."""
    assert golden_digests() == json.loads(PACKED.read_text())


if __name__ == "__main__":
    PACKED.write_text(json.dumps(golden_digests(), indent=1) + "\n")
