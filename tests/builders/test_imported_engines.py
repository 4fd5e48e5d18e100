"""Engines of already quantized checkpoints: built, exact in the file, and answering on the cpu backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_cases import CASES, WIDE, saver
from quantized_folders import Values, write_quantized

from builders.parts import Extras, open_contents
from builders.pipeline import Options, Report, build
from builders.planner import KEEP, Request
from edge_runtime import open_engine
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.engine.file import read_engine


def build_kept(model: Path, target: Path, **changes: Any) -> Report:
    """A build that keeps what the checkpoint has, the head in f32, so that nothing in it is rounded."""
    with open_contents(model, Extras(), None) as contents:
        kept, _ = contents.target.weights.kept()
    request = Request(weights=KEEP, kept=kept, head_weights="f32", sequences=1, **changes)
    return build(Options(model, target, "cpu", request, text_tokens=64))


@pytest.mark.parametrize("name", CASES)
def test_an_engine_holds_the_values_and_answers(name: str, tmp_path: Path) -> None:
    writer, config, formats = CASES[name]
    values: Values = write_quantized(tmp_path / "m", config, writer, save=saver(config), **WIDE)
    report = build_kept(tmp_path / "m", tmp_path / "m.edge")
    quality = report.manifest.quality
    assert quality is not None and quality.sqnr_db == {}  # every tensor is exact
    with read_engine(tmp_path / "m.edge") as engine:
        part = engine.part("language")
        found = {t.format for n, t in part.plan.tensors.items() if part.program.tensors[n].role == "matrix"}
        assert found == formats
        for tensor, origin in part.origins.items():
            value = values[f"{origin.key}.weight"]
            got = decode(part.weights[tensor])
            if "act-order" in name and tensor.startswith("layers."):  # columns in the order of their Gather
                got, value = np.sort(got, axis=1), np.sort(value, axis=1)
            np.testing.assert_array_equal(got, value)
    with open_engine(tmp_path / "m.edge", backend="cpu") as session:
        tokens = [event.token for event in session.generate([1, 40, 50], max_tokens=5)]
    assert len(tokens) >= 1
