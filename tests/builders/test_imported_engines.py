"""Engines of already quantized checkpoints: built, exact in the file, and answering on the cpu backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_cases import CASES, WIDE, saver
from quantized_folders import Values, gptq_config, gptq_writer, phi3_shapes, write_quantized

from builders.pipeline import Options, Report, build
from builders.planner import DEFAULT, Request
from edge_runtime import open_engine
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.ops import Gather
from edge_runtime.errors import BadConfig


def build_kept(model: Path, target: Path, weights: str = DEFAULT) -> Report:
    """A build as nobody asked otherwise, but the head in f32, so that nothing in it is rounded."""
    request = Request(weights=weights, head_weights="f32", sequences=1)
    return build(Options(model, target, "cpu", request, text_tokens=64))


def answers(path: Path, prompt: Any = (1, 40, 50)) -> int:
    """Tokens that an engine answers with on the cpu backend."""
    with open_engine(path, backend="cpu") as session:
        return sum(1 for _ in session.generate(prompt, max_tokens=4))


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
    assert answers(tmp_path / "m.edge") >= 1


def test_an_algorithm_that_calibrates_has_nothing_to_choose_where_weights_are_kept(tmp_path: Path) -> None:
    """It would do nothing, and the engine would name it."""
    write_quantized(tmp_path / "m", gptq_config(), gptq_writer(), **WIDE)
    asked = Options(tmp_path / "m", tmp_path / "m.edge", "cpu", Request(weights=DEFAULT), algorithm="gptq")
    with pytest.raises(BadConfig, match=r"--algorithm gptq.*kept"):
        build(asked)
    assert not list(tmp_path.glob("m.edge*"))


@pytest.mark.parametrize("act_order", [False, True])
def test_fused_projections_are_cut_by_rows(act_order: bool, tmp_path: Path) -> None:
    """Phi-3 stores q, k and v in one matrix: each gets its rows of the planes, and all share one order."""
    values = write_quantized(
        tmp_path / "m",
        gptq_config(desc_act=act_order),
        gptq_writer(act_order=act_order),
        shapes=phi3_shapes,
        model_type="phi3",
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=128,
    )
    report = build_kept(tmp_path / "m", tmp_path / "m.edge")
    assert report.manifest.quality is not None and report.manifest.quality.sqnr_db == {}
    with read_engine(tmp_path / "m.edge") as engine:
        part = engine.part("language")
        assert sum(isinstance(op, Gather) for op in part.program.ops) == (4 if act_order else 0)
        seen = 0
        for tensor, origin in part.origins.items():
            if not tensor.startswith("layers."):
                continue
            got = decode(part.weights[tensor])
            value = values[f"{origin.key}.weight"][origin.row : origin.row + len(got)]
            if act_order:  # columns in the order of their Gather
                got, value = np.sort(got, axis=1), np.sort(value, axis=1)
            np.testing.assert_array_equal(got, value)
            seen += 1
        assert seen == 7
    assert answers(tmp_path / "m.edge") >= 1
