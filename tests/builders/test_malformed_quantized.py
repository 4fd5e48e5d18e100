"""Already quantized folders that are damaged or not understood: refused, and what is wrong named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_cases import saver
from quantized_folders import (
    awq_config,
    awq_writer,
    bnb_config,
    compressed_config,
    compressed_writer,
    fp8_writer,
    gptq_config,
    gptq_writer,
    int8_writer,
    nf4_writer,
    write_quantized,
)
from safetensors.numpy import load_file, save_file

from builders.sources import open_source
from edge_runtime.errors import BadCheckpoint, BadConfig, EdgeError, Unsupported

UP = "model.layers.0.mlp.up_proj"
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq_writer(), gptq_config()),
    "awq": (awq_writer(), awq_config()),
    "nf4": (nf4_writer(), bnb_config(4)),
    "int8": (int8_writer(), bnb_config(8)),
    "ct": (
        compressed_writer(group=32, symmetric=False),
        compressed_config("pack-quantized", 4, strategy="group", group_size=32, symmetric=False),
    ),
    "ct-int8": (compressed_writer(8, packed=False), compressed_config("int-quantized", 8)),
}


def make(folder: Path, kind: str) -> Path:
    writer, config = KINDS[kind]
    write_quantized(folder, config, writer, hidden_size=64, intermediate_size=128)
    return folder


def refused(folder: Path, *words: str, error: type[EdgeError] = BadCheckpoint) -> None:
    with pytest.raises(error) as caught, open_source(folder) as source:
        source.tensor(f"{UP}.weight")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace or (None) drop tensors of the up projection."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for suffix, value in tensors.items():
        key = f"{UP}.{suffix.replace('__', '.')}"
        del found[key]
        if value is not None:
            found[key] = value
    save_file(found, path)


SHAPES = [
    ("gptq", "qweight", np.zeros((8, 127), np.int32), "(2, 127)"),
    ("gptq", "qzeros", np.zeros((2, 15), np.int32), "(2, 16)"),
    ("gptq", "scales", np.zeros((2, 64), np.float16), "(2, 128)"),
    ("gptq", "g_idx", np.zeros(40, np.int32), "expected (5, 128)"),
    ("gptq", "qweight", np.zeros((8, 128), np.float32), "F32"),
    ("awq", "qweight", np.zeros((64, 15), np.int32), "(2, 120)"),
    ("awq", "qzeros", np.zeros((1, 16), np.int32), "(2, 16)"),
    ("awq", "scales", np.zeros((3, 128), np.float16), "(2, 128)"),
    ("nf4", "weight", np.zeros((4095, 1), np.uint8), "4096 bytes"),
    ("nf4", "weight__absmax", np.zeros(127, np.float32), "(128,)"),
    ("nf4", "weight__quant_map", np.zeros(15, np.float32), "(16,)"),
    ("int8", "SCB", np.zeros(127, np.float32), "(128,)"),
    ("ct", "weight_packed", np.zeros((128, 7), np.int32), "(128, 64)"),
    ("ct", "weight_scale", np.zeros((128, 3), np.float16), "(128, 2)"),
    ("ct", "weight_zero_point", np.zeros((15, 2), np.int32), "(16, 2)"),
    ("ct", "weight_shape", np.zeros(3, np.int64), "(2,)"),
    ("ct-int8", "weight_scale", np.zeros((127, 1), np.float16), "(128, 1)"),
]


@pytest.mark.parametrize(("kind", "suffix", "value", "words"), SHAPES, ids=[f"{s[0]}-{s[1]}" for s in SHAPES])
def test_wrong_shapes_are_named(tmp_path: Path, kind: str, suffix: str, value: Any, words: str) -> None:
    folder = make(tmp_path / "m", kind)
    change(folder, **{suffix: value})
    refused(folder, UP, words)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        ("awq", "qzeros"),
        ("nf4", "weight__absmax"),
        ("ct", "weight_shape"),
    ],
)
def test_missing_pieces_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    folder = make(tmp_path / "m", kind)
    change(folder, **{suffix: None})
    refused(folder, f"{UP}.{suffix.replace('__', '.')}", "incomplete")


@pytest.mark.parametrize(("kind", "suffix"), [("gptq", "scales"), ("int8", "SCB"), ("ct", "weight_scale")])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    folder = make(tmp_path / "m", kind)
    scales = load_file(folder / "model.safetensors")[f"{UP}.{suffix}"]
    scales.reshape(-1)[5] = np.inf
    change(folder, **{suffix: scales})
    refused(folder, UP, "NaN or Inf")


@pytest.mark.parametrize("groups", [np.arange(64) // 16, np.r_[np.zeros(24), np.ones(40)], np.full(64, -1)])
def test_groups_of_unequal_size_are_refused(tmp_path: Path, groups: np.ndarray) -> None:
    folder = make(tmp_path / "m", "gptq")
    change(folder, g_idx=groups.astype(np.int32))
    refused(folder, f"{UP}.g_idx", "expected")


CONFIGS: list[tuple[str, dict[str, Any], type[EdgeError], str]] = [
    ("gptq", {"bits": 5}, Unsupported, "bits is 5"),
    ("gptq", {"bits": "4"}, BadConfig, "'bits'"),
    ("gptq", {"group_size": 0}, BadConfig, "group_size"),
    ("gptq", {"checkpoint_format": "marlin"}, Unsupported, "marlin"),
    ("gptq", {"quant_method": "quip"}, Unsupported, "known: awq"),
    ("awq", {"version": "gemv"}, Unsupported, "gemm"),
    ("awq", {"bits": 8}, Unsupported, "bits is 8"),
    ("nf4", {"bnb_4bit_quant_type": "fp4"}, Unsupported, "nf4"),
    ("ct", {"format": "marlin-24"}, Unsupported, "marlin-24"),
    ("ct", {"transform_config": {"config_groups": {"a": 1}}}, Unsupported, "rotated"),
    ("ct", {"sparsity_config": {"format": "sparse-24-bitmask"}}, Unsupported, "sparse"),
    ("ct", {"config_groups": None}, BadConfig, "config_groups"),
]


@pytest.mark.parametrize(("kind", "changes", "error", "words"), CONFIGS)
def test_configs_that_are_not_understood_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], error: type[EdgeError], words: str
) -> None:
    folder = make(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, words, error=error)


def test_a_config_without_such_tensors_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "bitsandbytes", "no tensor quantized so")


def test_fp8_blocks_and_nan_are_named(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    writer = fp8_writer("block", "weight_scale_inv", (32, 32))
    write_quantized(tmp_path / "m", config, writer, save=saver(config))
    refused(tmp_path / "m", "weight_scale_inv", "(1, 2)", "(2, 4)")


def test_unknown_keys_are_noticed_not_obeyed(tmp_path: Path) -> None:
    config = gptq_config(new_trick=True)
    write_quantized(tmp_path / "m", config, gptq_writer())
    with open_source(tmp_path / "m") as source:
        assert any("new_trick" in notice for notice in source.notices)


def test_a_side_file_says_it_too(tmp_path: Path) -> None:
    """AutoGPTQ's first versions wrote quantize_config.json and left config.json alone."""
    folder = make(tmp_path / "m", "gptq")
    config = json.loads((folder / "config.json").read_text())
    found = config.pop("quantization_config")
    found.pop("quant_method")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(found))
    with open_source(folder) as source:
        assert source.quantized and "quantize_config.json" in source.sha256()


def test_scales_of_activations_are_set_aside_and_said(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    write_quantized(tmp_path / "m", config, fp8_writer("tensor"), save=saver(config))
    with open_source(tmp_path / "m") as source:
        assert not any("input_scale" in key for key in source.shapes())
        (notice,) = source.notices
        assert "14 scales of activations" in notice and "input_scale" in notice


def test_other_8_bit_floats_are_refused(tmp_path: Path) -> None:
    config = {"quant_method": "fp8"}
    write_quantized(tmp_path / "m", config, fp8_writer("tensor"), save=saver(config))
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F8_E4M3"', b'"F8_E5M2"'))
    refused(tmp_path / "m", "F8_E5M2", "F8_E4M3", error=Unsupported)


def test_the_first_awq_files_said_it_in_other_words(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "awq")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    found = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(found))
    with open_source(folder) as source:
        assert source.quantized and not source.notices
