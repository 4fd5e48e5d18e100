"""What the device tells, read from fake trees of files."""

from __future__ import annotations

from pathlib import Path

from edge_nodes.sensors import Health, read_health


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_jetson(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "51500\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "63250\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",  # a sensor that is off
            "sys/class/thermal/thermal_zone3/temp": "",
            "proc/meminfo": "MemTotal: 8000 kB\nSwapTotal:     4096 kB\nSwapFree:      1024 kB\n",
            "var/lib/nvpmodel/status": "pmode:0002 fmode:cool\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MODE_15W >\n< POWER_MODEL ID=2 NAME=MODE_25W >\n",
        },
    )
    assert read_health(tmp_path) == Health(63.25, "gpu-thermal", "25W", 3)


def test_a_device_that_tells_nothing(tmp_path: Path) -> None:
    assert read_health(tmp_path) == Health(None, "", "", 0)


def test_a_mode_without_a_name_is_its_number(tmp_path: Path) -> None:
    write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0003"})
    assert read_health(tmp_path).power_mode == "3"
