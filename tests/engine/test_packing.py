"""Packings: round trips over every format and tail, and the bytes against a slow reading of the byte spec."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge_runtime.engine import packing
from edge_runtime.engine.formats import ENCODINGS, FORMATS, get_format
from edge_runtime.engine.formats.codes import pack_bits
from edge_runtime.engine.formats.trellis import trellis_of
from edge_runtime.engine.packing import PACKINGS, cpu_packing, pack, packed_nbytes, plane_items, unpack
from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange

TAILS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 67, 127, 129, 193, 255, 1023)
NAMES = sorted(FORMATS)
GOLDEN_NAMES = [n for n in NAMES if trellis_of(get_format(n)) is None]  # whose codec has golden bytes
GOLDEN = Path(__file__).parent / "golden" / "packed.json"


def random_planes(name: str, rows: int, cols: int) -> dict[str, np.ndarray]:
    """Planes with every code possible; unused last bits are 0, as the codec writes them."""
    rng = np.random.default_rng(rows * 10007 + cols)
    fmt = get_format(name)
    if trellis_of(fmt) is None:
        planes = fmt.encode(rng.uniform(-9, 5, (rows, cols)).astype(np.float32))
    else:  # searching codes takes long, and any will do
        planes = {"super": np.array([[0.3]], np.float32)}
        planes["scale"] = rng.integers(0, 126, fmt.shapes(rows, cols)["scale"]).astype(np.uint8)
    for plane in fmt.codes:
        bits = ENCODINGS[plane.encoding].bits
        if bits < 8:
            planes[plane.name] = pack_bits(rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8), bits)
        elif bits == 8:
            planes[plane.name].view(np.uint8)[:] = rng.integers(0, 256, (rows, cols))
    return planes


def slow_packing() -> ModuleType:
    path = GOLDEN.with_name("slow_packing.py")
    spec = importlib.util.spec_from_file_location("slow_packing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLOW = slow_packing()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Bit for bit, dtype and shape too."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 67), (5, 129), (33, 130), (2, 31)])
def test_bytes_are_those_of_the_spec(name: str, shape: tuple[int, int]) -> None:
    planes = random_planes(name, *shape)
    packed = pack(name, cpu_packing(name), planes, *shape)
    raw = {n: a.view(f"<u{a.itemsize}").tolist() for n, a in planes.items()}
    want = SLOW.slow_pack(name, raw, *shape)
    assert {n: a.view(f"<u{a.itemsize}").tolist() for n, a in packed.items()} == want


def test_the_slow_packer_writes_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden == SLOW.golden()
    assert sorted(golden) == GOLDEN_NAMES


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_bytes(name: str) -> None:
    """The golden planes packed: a change of byte order is a change of the file format."""
    source = json.loads(SLOW.FORMATS_JSON.read_text())
    rows, cols = source["rows"], source["cols"]
    planes = {}
    for plane in get_format(name).planes:
        data = bytes.fromhex(source["planes"][name][plane.name])
        dtype = ENCODINGS[plane.encoding].dtype
        planes[plane.name] = np.frombuffer(data, dtype).reshape(plane.shape(rows, cols))
    packed = pack(name, cpu_packing(name), planes, rows, cols)
    digests = {
        n: {"first": a.tobytes()[:64].hex(), "sha256": hashlib.sha256(a.tobytes()).hexdigest()}
        for n, a in packed.items()
    }
    assert digests == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_every_tail(name: str) -> None:
    for tail in TAILS:
        for rows, cols in ((3, tail), (tail, 67), (tail, 8), (17, tail)):
            planes = random_planes(name, rows, cols)
            for order in ("rows", cpu_packing(name)):
                packed = pack(name, order, planes, rows, cols)
                items = {n: (a.size, a.dtype) for n, a in packed.items()}
                want = plane_items(name, order, rows, cols)
                assert items == {n: (count, np.dtype(dtype)) for n, (count, dtype) in want.items()}
                assert all(a.ndim == 1 and a.flags.c_contiguous for a in packed.values())
                assert same(unpack(name, order, packed, rows, cols), planes)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = random_planes(name, 150, 193)
    whole = pack(name, cpu_packing(name), planes, 150, 193)
    monkeypatch.setattr(packing, "_CHUNK", 5000)
    assert same(pack(name, cpu_packing(name), planes, 150, 193), whole)
    assert same(unpack(name, cpu_packing(name), whole, 150, 193), planes)


@pytest.mark.parametrize("name", NAMES)
def test_padding_decodes_to_zero(name: str) -> None:
    """Unpacked at the padded shape, everything beyond the matrix is 0.

    A group with a minimum has no code of 0 in general, nor has a trellis: only the next groups are 0.
    """
    rows, cols, fmt = 18, 67, get_format(name)
    unit = packing.unit_of(fmt)
    padded = (32, -(-cols // unit) * unit)
    x = np.random.default_rng(5).uniform(-2, 1, (rows, cols)).astype(np.float32)
    planes = fmt.encode(x)
    wide = unpack(name, cpu_packing(name), pack(name, cpu_packing(name), planes, rows, cols), *padded)
    decoded = fmt.decode(wide, *padded)
    assert np.array_equal(decoded[:rows, :cols], fmt.decode(planes, rows, cols))
    minima = fmt.plane("min") or fmt.plane("scale_min") or trellis_of(fmt)
    first = -(-cols // (fmt.group or 1)) * (fmt.group or 1) if minima else cols
    assert not decoded[rows:].any() and not decoded[:, first:].any()


def test_rows_are_the_codecs_planes_flattened() -> None:
    planes = random_planes("int4_g32_zp", 3, 67)
    packed = pack("int4_g32_zp", "rows", planes, 3, 67)
    assert all(packed[n].tobytes() == planes[n].tobytes() for n in planes)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_follow_from_the_record(name: str) -> None:
    """Whole panels and groups take exactly the format's bytes; each plane is rounded up to 64."""
    fmt = get_format(name)
    sizes = [p.nbytes(4096, 2048) for p in fmt.planes]
    want = sum(-(-n // 64) * 64 for n in sizes)
    assert packed_nbytes(name, cpu_packing(name), 4096, 2048) == want
    assert packed_nbytes(name, "rows", 4096, 2048) == want


@pytest.mark.parametrize(
    "name,nbytes",
    [
        ("f32", 16 * 64 * 4),
        ("bf16", 16 * 64 * 2),
        ("int8_row", 16 * 64 + 16 * 4),
        ("int8_g128", 16 * 128 + 64),  # 16 f16 scales, rounded up to 64 bytes
        ("int4_g32", 16 * 32 // 2 + 64),
        ("int4_g64_zp", 16 * 64 // 2 + 64 + 64),
        ("fp8_e4m3_tensor", 16 * 64 + 64),
        ("fp8_e5m2", 16 * 64),
        ("nf4_g64", 16 * 64 // 2 + 64),
        ("int3_g32", 16 * 32 // 4 + 16 * 32 // 8 + 64),
        ("q2_k", 16 * 32 // 4 + 64 + 64 + 64),  # two groups of 16 in the smallest unit
        ("q6_k", 16 * 32 // 2 + 16 * 32 // 4 + 64 + 64),
        ("nvfp4_g16", 16 * 32 // 2 + 64 + 64),
    ],
)
def test_one_weight_takes_one_panel_of_one_group(name: str, nbytes: int) -> None:
    assert packed_nbytes(name, cpu_packing(name), 1, 1) == nbytes


def test_integers_take_lanes_and_the_rest_takes_inputs() -> None:
    whole = ("int", "q", "mxfp4", "nvfp4", "tcq")
    assert {cpu_packing(n) for n in NAMES if n.startswith(whole)} == {"n16k4"}
    assert {cpu_packing(n) for n in NAMES if not n.startswith(whole)} == {"n16"}
    assert set(PACKINGS) == {"rows", "n16", "n16k4", "m16"}


def test_errors_name_what_is_wrong() -> None:
    planes = random_planes("int4_g64", 16, 64)
    with pytest.raises(BadConfig, match=r"unknown packing 'n16k8'; did you mean 'n16k4'\?"):
        pack("int4_g64", "n16k8", planes, 16, 64)
    with pytest.raises(Unsupported, match="int4_g64 has no packing 'n16'; use rows or n16k4 or m16"):
        plane_items("int4_g64", "n16", 16, 64)
    with pytest.raises(Unsupported, match="nf4_g64 has no packing 'n16k4'; use rows or n16 or m16"):
        packed_nbytes("nf4_g64", "n16k4", 16, 64)
    with pytest.raises(BadConfig, match="unknown format 'int7'"):
        cpu_packing("int7")
    with pytest.raises(ValueOutOfRange, match=r"plane 'q' is uint8 \(16, 32\), expected uint8 \(16, 33\)"):
        pack("int4_g64", "n16k4", planes, 16, 65)
    packed = pack("int4_g64", "n16k4", planes, 16, 64)
    with pytest.raises(ValueOutOfRange, match="in n16k4: plane 'scale' is missing, expected float16"):
        unpack("int4_g64", "n16k4", {"q": packed["q"]}, 16, 64)
    with pytest.raises(ValueOutOfRange, match=r"plane 'q' is uint8 \(511,\), expected uint8 \(512,\)"):
        unpack("int4_g64", "n16k4", packed | {"q": packed["q"][:-1]}, 16, 64)
    with pytest.raises(ValueOutOfRange, match="plane 'scale' is uint16"):
        unpack("int4_g64", "n16k4", packed | {"scale": packed["scale"].view(np.uint16)}, 16, 64)


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_vectorised(name: str) -> None:
    """32000 x 2048 in 1 s is 65 M weights a second of CPU time; here 4 M with slack for a slow machine."""
    planes = random_planes(name, 2000, 2048)
    start = time.process_time()
    packed = pack(name, cpu_packing(name), planes, 2000, 2048)
    unpack(name, cpu_packing(name), packed, 2000, 2048)
    assert time.process_time() - start < 1.0
