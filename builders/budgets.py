"""Budgets as people write them: sizes with units, lists of formats."""

from __future__ import annotations

import re

from edge_runtime.engine.formats import FORMATS
from edge_runtime.errors import BadConfig, nearest

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)")
_UNITS = {
    "": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_MOST = 1 << 48  # bytes; as in a profile


def parse_bytes(option: str, text: str) -> int:
    """Bytes of "3GiB", "2.5 GB", "900MiB" or "1000000". Raises BadConfig naming the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadConfig(f"{option} {text!r:.40}: expected a size such as 3GiB, 900MiB, 2.5GB or bytes")
    number, unit = match.groups()
    if unit.lower() not in _UNITS:
        units = nearest(unit, ("KiB", "MiB", "GiB", "KB", "MB", "GB"))
        raise BadConfig(f"{option} {text!r:.40}: no unit {unit!r:.20}; {units}")
    found = int(float(number) * _UNITS[unit.lower()]) if "." in number else int(number) * _UNITS[unit.lower()]
    if not 1 <= found <= _MOST:
        raise BadConfig(f"{option} {text!r:.40}: expected 1 byte to 256 TiB")
    return found


def parse_formats(text: str) -> tuple[str, ...]:
    """Weight formats of "int4_g64,int8_row", each once, in order. Raises BadConfig on an unknown one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise BadConfig(f"--formats: unknown weight format {name!r:.40}; {nearest(name, FORMATS)}")
    return tuple(dict.fromkeys(names))
