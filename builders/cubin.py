"""The ELF of a cubin, as far as a build must trust it: its sm, who loads it, which kernels it has.

Read from what ptxas of CUDA 12.4 to 13.0 writes (NVIDIA documents none of it): the sm is in the flags, whose
layout came anew with CUDA 13; section `.nv.info` lists attributes, among them the registers of each function.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.errors import BuildError

_CUDA = 190  # EM_CUDA
_ABI_12, _ABI_13 = (51, 7), (65, 8)  # (OS ABI, its version) of ptxas 12.x and 13.x
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = 24  # bytes of one
_ATTRIBUTE = struct.Struct("<BBH")  # format, attribute, its size or value
_SIZED = 4  # the format of which `size` bytes follow
_REGISTERS = 0x2F


@dataclass(frozen=True, slots=True)
class Cubin:
    """oldest: the first CUDA whose drivers load it. registers: function -> registers of a thread."""

    sm: int
    oldest: tuple[int, int]
    registers: dict[str, int]


def read_cubin(data: bytes) -> Cubin:
    """Raises BuildError for anything but a cubin of a known kind."""
    try:
        return _read(data)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise BuildError(f"a cubin of {len(data)} bytes cannot be read: {error}") from None


def _read(data: bytes) -> Cubin:
    if data[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", data, 18)[0] != _CUDA:
        raise ValueError("it is no 64-bit ELF file for CUDA")
    abi, (flags,) = (data[7], data[8]), struct.unpack_from("<I", data, 48)
    if abi not in (_ABI_12, _ABI_13):
        raise ValueError(f"its ABI is {abi[0]} version {abi[1]}, known are those of CUDA 12 and 13")
    sections = _sections(data)
    symbols, strings = sections[".symtab"][0], sections[".strtab"][0]
    registers = {}
    for attribute, at in _attributes(data, *sections[".nv.info"]):
        if attribute == _REGISTERS:
            symbol, count = struct.unpack_from("<II", data, at)
            (name,) = struct.unpack_from("<I", data, symbols + _SYMBOL * symbol)
            registers[_text(data, strings + name)] = count
    if abi == _ABI_12:
        return Cubin(flags & 0xFF, (12, 0), registers)
    return Cubin(flags >> 8 & 0xFF, (13, 0), registers)


def _sections(data: bytes) -> dict[str, tuple[int, int]]:
    """name -> offset and bytes in the file."""
    (start,) = struct.unpack_from("<Q", data, 40)
    count, names = struct.unpack_from("<HH", data, 60)
    rows = [_SECTION.unpack_from(data, start + i * _SECTION.size) for i in range(count)]
    return {_text(data, rows[names][4] + row[0]): (row[4], row[5]) for row in rows}


def _attributes(data: bytes, at: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """(attribute, offset of its bytes), of those that have some."""
    end = at + nbytes
    while at < end:
        form, attribute, size = _ATTRIBUTE.unpack_from(data, at)
        at += _ATTRIBUTE.size
        if form == _SIZED:
            yield attribute, at
            at += size


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("ascii")
