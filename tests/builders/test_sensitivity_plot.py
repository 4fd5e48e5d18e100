"""The picture of a sensitivity file: what is in it, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.sensitivity import Sensitivity
from builders.sensitivity_plot import draw, grid

FOUND = Sensitivity(
    unit="kl",
    algorithm="gptq",
    text="self",
    tokens=2048,
    losses={
        "embed": {"int4_g64": 1e-2, "int8_row": 1e-5, "f32": 0.0},
        "layers.0.q": {"int4_g64": 1e-3, "int8_row": 1e-6, "f32": 0.0},
        "layers.0.down": {"int4_g64": 5e-2, "f32": 0.0},
    },
    measured=("int4_g64",),
)


def test_rows_are_tensors_and_columns_go_from_gentle_to_harsh() -> None:
    tensors, formats, values = grid(FOUND)
    assert tensors == ["embed", "layers.0.q", "layers.0.down"]
    assert formats == ["f32", "int8_row", "int4_g64"]
    np.testing.assert_array_equal(values, [[0.0, 1e-5, 1e-2], [0.0, 1e-6, 1e-3], [0.0, np.nan, 5e-2]])


def test_the_picture_names_all_and_repeats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(FOUND, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for word in ("layers.0.down", "int8_row", "gptq on self, 2048 tokens", "nats a token"):
        assert word in text
    draw(FOUND, tmp_path / "a.png")
    draw(FOUND, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_disk_that_takes_no_picture_costs_no_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    draw(FOUND, tmp_path / "nowhere" / "a.png")
    said = capsys.readouterr().err
    assert said.startswith("note: ") and "a.png cannot be written: No such file" in said
    assert said.count("\n") == 1
