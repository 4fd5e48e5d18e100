"""What the device tells of its own health, read from plain files: temperature, power mode, swap."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Health:
    """temperature_c: the hottest zone that is sensible. power_mode: nvpmodel's name of it, or its number.

    None and "": the device does not tell.
    """

    temperature_c: float | None = None
    zone: str = ""
    power_mode: str = ""
    swap_used_mib: int = 0


def read_health(root: Path = ROOT) -> Health:
    """Never raises: a sensor that is absent or broken is left out."""
    hottest: tuple[float, str] | None = None
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        try:
            degrees = int(_read(zone / "temp")) / 1000
        except ValueError:  # a zone that is switched off says nothing
            continue
        if -40.0 < degrees < 150.0 and (hottest is None or degrees > hottest[0]):
            hottest = degrees, _read(zone / "type").strip() or zone.name
    meminfo = _read(root / "proc/meminfo")
    swap = _kib(meminfo, "SwapTotal") - _kib(meminfo, "SwapFree")
    return Health(
        temperature_c=None if hottest is None else hottest[0],
        zone="" if hottest is None else hottest[1],
        power_mode=_power_mode(root),
        swap_used_mib=max(0, swap) >> 10,
    )


def _power_mode(root: Path) -> str:
    status = re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if status is None:
        return ""
    table = _read(root / "etc/nvpmodel.conf")
    name = re.search(rf"< *POWER_MODEL +ID={status[1]} +NAME=(?:MODE_)?(\S+) *>", table)
    return name[1] if name else status[1]


def _kib(meminfo: str, key: str) -> int:
    found = re.search(rf"^{key}: +(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) if found else 0


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(65536).decode("utf-8", "replace")
    except OSError:
        return ""
