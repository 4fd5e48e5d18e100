"""Tensors without an exact home: the nearest format, how far it is, and a notice that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_cases import WIDE
from quantized_folders import (
    Array,
    Tensors,
    Writer,
    bnb_config,
    compressed_config,
    compressed_writer,
    gptq_config,
    gptq_writer,
    nf4_writer,
    write_quantized,
)
from safetensors.numpy import load_file, save_file

from builders.parts import read_architecture
from builders.pipeline import Options, build
from builders.planner import DEFAULT, Request
from builders.sources import open_source
from builders.weights import CheckpointWeights
from edge_runtime.engine.formats import get_format
from edge_runtime.errors import BadCheckpoint


def scaled(writer: Writer, by: float) -> Writer:
    """The same codes with f32 scales, all multiplied."""

    def write(module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        tensors, values = writer(module, weight, rng)
        for name in tensors:
            if name.endswith("scales"):
                tensors[name] = (tensors[name].astype(np.float32) * np.float32(by)).astype(np.float32)
        return tensors, values

    return write


CASES: dict[str, tuple[Writer, dict[str, Any], str, float, str]] = {
    # An f32 scale is rounded to f16: at most half a step of f16's 11 bits
    "f32-scales": (scaled(gptq_writer(), 1.0001), gptq_config(), "int4_g32", 2.0**-11, "are not f16 numbers"),
    "huge-scales": (scaled(gptq_writer(), 1e9), gptq_config(), "int8_row", 1 / 127, "beyond f16"),
    "group-16": (gptq_writer(group=16), gptq_config(group=16), "int8_g32", 1 / 127, "groups of 16"),
    "8-bit-zero-points": (
        compressed_writer(8, 32, symmetric=False),
        compressed_config("pack-quantized", 8, strategy="group", group_size=32, symmetric=False),
        "int8_g32",
        1 / 127,
        "zero points",
    ),
    "nf4-blocks-of-32": (nf4_writer(32), bnb_config(4), "int8_g32", 1 / 127, "blocks of 32"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_format_is_named_with_its_error(name: str, tmp_path: Path) -> None:
    writer, config, fmt, limit, why = CASES[name]
    write_quantized(tmp_path / "m", config, writer, **WIDE)
    with open_source(tmp_path / "m") as source:
        weights = CheckpointWeights(read_architecture(source.config, None), source)
        kept, notices = weights.kept()
        assert set(kept.values()) == {fmt}
        (notice,) = notices
        assert why in notice and fmt in notice and "7 tensors" in notice
        worst = 0.0
        for key in source.matrices:
            value, stored = source.tensor(key), source.stored(key)
            assert stored is not None
            planes = get_format(fmt).decode(stored.planes, *value.shape)
            span = get_format(fmt).span(value.shape[1])
            off = np.abs(planes.astype(np.float64) - value).reshape(value.shape[0], -1, span).max(2)
            most = np.abs(value).reshape(value.shape[0], -1, span).max(2)
            worst = max(worst, float((off / most).max()))
            assert off.max() > 0
        said = max(matrix.home().error for matrix in source.matrices.values())
        # It holds (to the rounding of one f32 product), is no exaggeration and no worse than expected
        assert worst <= said * (1 + 1e-3) + 2.0**-23 and said <= limit and said <= 3 * worst
        assert f"{said:.2g}" in notice


def test_the_values_stay_exact_for_other_weights(tmp_path: Path) -> None:
    """What has no exact home is still read exactly, so that other formats are made from the true values."""
    values = write_quantized(tmp_path / "m", gptq_config(group=16), gptq_writer(group=16), **WIDE)
    with open_source(tmp_path / "m") as source:
        for key, value in values.items():
            np.testing.assert_array_equal(source.tensor(key), value)


def test_a_build_says_so_and_measures_it(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", gptq_config(group=16), gptq_writer(group=16), **WIDE)
    request = Request(weights=DEFAULT, head_weights="f32", sequences=1)
    report = build(Options(tmp_path / "m", tmp_path / "m.edge", "cpu", request, text_tokens=64))
    assert any("groups of 16" in notice for notice in report.notices)
    assert report.manifest.quality is not None
    assert len(report.manifest.quality.sqnr_db) == 7
    assert all(db > 40 for db in report.manifest.quality.sqnr_db.values())  # 8 bits


def test_biases_of_zeros_beside_quantized_linears_mean_nothing(tmp_path: Path) -> None:
    """AutoGPTQ wrote one for every linear. Others are still refused: the model would mean something else."""
    write_quantized(tmp_path / "m", gptq_config(), gptq_writer(), **WIDE)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.bias"
    tensors[key] = np.zeros(512, np.float16)
    save_file(tensors, path)
    with open_source(tmp_path / "m") as source:
        CheckpointWeights(read_architecture(source.config, None), source)
    tensors[key][3] = 1
    save_file(tensors, path)
    with open_source(tmp_path / "m") as source, pytest.raises(BadCheckpoint, match=r"up_proj\.bias"):
        CheckpointWeights(read_architecture(source.config, None), source)
