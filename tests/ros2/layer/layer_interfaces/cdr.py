"""XCDR1 of ROS messages, little-endian on the way out, either on the way in.

One encoder and one decoder per definition, put together from closures once. Positions count from the start
of the body (after the four header bytes), as CDR's alignment does. A structure without fields holds one byte.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from layer_interfaces.definitions import Definition, Field

HEADER = b"\x00\x01\x00\x00"
# base: struct code, size, array.array code
PRIMITIVES = {
    "bool": ("?", 1, ""),
    "byte": ("B", 1, ""),
    "char": ("B", 1, "B"),
    "int8": ("b", 1, "b"),
    "uint8": ("B", 1, "B"),
    "int16": ("h", 2, "h"),
    "uint16": ("H", 2, "H"),
    "int32": ("i", 4, "i"),
    "uint32": ("I", 4, "I"),
    "int64": ("q", 8, "q"),
    "uint64": ("Q", 8, "Q"),
    "float32": ("f", 4, "f"),
    "float64": ("d", 8, "d"),
}

Write = Callable[[bytearray, Any], None]


class Reader:
    """A body to be decoded, with its position and byte order ("<" or ">")."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data = memoryview(data)
        self.at = 0
        self.order = order

    def align(self, size: int) -> None:
        self.at = (self.at + size - 1) & -size

    def number(self, code: str, size: int) -> Any:
        self.align(size)
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += size
        return value

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise ValueError(f"CDR body of {len(self.data)} bytes ends inside a field of {size} at {self.at}")
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def string(self) -> str:
        size = self.number("I", 4)
        return bytes(self.take(size)[:-1]).decode("utf-8") if size else ""


Read = Callable[[Reader], Any]


def _pad(out: bytearray, size: int) -> None:
    out.extend(bytes(-len(out) % size))


def _write_string(out: bytearray, value: str) -> None:
    _pad(out, 4)
    raw = value.encode("utf-8")
    out += struct.pack("<I", len(raw) + 1)
    out += raw
    out.append(0)


def _number_writer(base: str) -> Write:
    code, size, _ = PRIMITIVES[base]
    packer = struct.Struct("<" + code)
    if base == "byte":
        return lambda out, value: out.append(value[0])

    def write(out: bytearray, value: Any) -> None:
        _pad(out, size)
        out += packer.pack(value)

    return write


def _number_reader(base: str) -> Read:
    code, size, _ = PRIMITIVES[base]
    if base == "byte":
        return lambda reader: bytes(reader.take(1))
    return lambda reader: reader.number(code, size)


def _block_writer(base: str) -> Write:
    """Of many numbers at once, from array.array or numpy."""
    _, size, _ = PRIMITIVES[base]

    def write(out: bytearray, value: Any) -> None:
        if not len(value):
            return
        _pad(out, size)
        raw = value if sys.byteorder == "little" else np.asarray(value).byteswap()
        out += memoryview(raw).cast("B")

    return write


def _block_reader(base: str, fixed: bool) -> Callable[[Reader, int], Any]:
    _, size, code = PRIMITIVES[base]

    def read(reader: Reader, count: int) -> Any:
        if count:
            reader.align(size)
        raw = reader.take(count * size)
        values = array(code)
        values.frombytes(raw)
        if (reader.order == "<") != (sys.byteorder == "little"):
            values.byteswap()
        return np.array(values, dtype=np.dtype(code)) if fixed else values

    return read


def _one(field: Field, lookup: Callable[[str], Codec]) -> tuple[Write, Read]:
    if field.nested:
        codec = lookup(field.nested)
        return codec.write, codec.read
    if field.base == "string":
        return _write_string, Reader.string
    if field.base in PRIMITIVES:
        return _number_writer(field.base), _number_reader(field.base)
    raise NotImplementedError(f"field {field.name}: the layer has no CDR of {field.base}")


def _many(field: Field, one: tuple[Write, Read]) -> tuple[Write, Read]:
    assert field.count is not None
    kind, size = field.count
    fixed = kind == "array"
    blocks = field.base in PRIMITIVES and PRIMITIVES[field.base][2] != ""
    write_one, read_one = one

    def write(out: bytearray, value: Any) -> None:
        if not fixed:
            _pad(out, 4)
            out.extend(struct.pack("<I", len(value)))
        if blocks:
            write_block(out, value)
        else:
            for item in value:
                write_one(out, item)

    def read(reader: Reader) -> Any:
        count = size if fixed else reader.number("I", 4)
        if count > len(reader.data):
            raise ValueError(f"CDR: a sequence of {count} in a body of {len(reader.data)} bytes")
        return read_block(reader, count) if blocks else [read_one(reader) for _ in range(count)]

    if blocks:
        write_block, read_block = _block_writer(field.base), _block_reader(field.base, fixed)
    return write, read


class Codec:
    """Encodes and decodes one structure. `make` builds the decoded object from field values in order."""

    def __init__(
        self,
        definition: Definition,
        lookup: Callable[[str], Codec],
        make: Callable[[list[Any]], Any],
    ) -> None:
        self._make = make
        self._fields: list[tuple[str, Write, Read]] = []
        for field in definition.fields:
            pair = _one(field, lookup)
            if field.count is not None:
                pair = _many(field, pair)
            self._fields.append((f"_{field.name}", *pair))

    def write(self, out: bytearray, message: Any) -> None:
        if not self._fields:
            out.append(0)
        for name, write, _ in self._fields:
            write(out, getattr(message, name))

    def read(self, reader: Reader) -> Any:
        if not self._fields:
            reader.take(1)
        return self._make([read(reader) for _, _, read in self._fields])

    def encode(self, message: Any, prefix: bytes = b"") -> bytes:
        """Header and body, a multiple of four bytes; prefix goes before the fields (a request's header)."""
        out = bytearray(prefix)
        self.write(out, message)
        _pad(out, 4)
        return HEADER + bytes(out)

    def decode(self, data: bytes, skip: int = 0) -> Any:
        """The message in data, whose body begins with `skip` other bytes.

        Raises:
            ValueError: no CDR, or it ends too early.
        """
        if len(data) < 4 or data[0] != 0 or data[1] > 1:
            raise ValueError(f"not XCDR1: the header is {data[:4].hex()}")
        reader = Reader(data[4:], "<" if data[1] else ">")
        reader.at = skip
        try:
            return self.read(reader)
        except struct.error as error:
            raise ValueError(f"CDR body of {len(data) - 4} bytes ends inside a field") from error
