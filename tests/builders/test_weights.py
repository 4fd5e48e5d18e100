"""f32 weights by blocks and by rows: fused projections, norm offsets, constants, and packed planes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import byte_tokenizer, llama_config
from safetensors.numpy import save_file

from builders.archs import Architecture, read_program
from builders.sources import open_source
from builders.weights import CheckpointWeights, EngineWeights, row_blocks
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.engine.packing import cpu_packing, pack
from edge_runtime.engine.plan import TensorPlan
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import BadCheckpoint

GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
CONFIGS = {
    "llama": llama_config(attention_bias=True, tie_word_embeddings=False),
    "phi3": llama_config(model_type="phi3", pad_token_id=0),
    "gemma2": llama_config(model_type="gemma2", **GEMMA),
}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Architecture, dict[str, Array]]:
    """A folder with every tensor that the architecture asks for, random, in the shapes it asks for."""
    architecture = read_program(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, made in architecture.sources.items():
        if made.constant is None:
            spec = architecture.program.tensors[name]
            rows = made.rows[1] if made.rows else spec.rows
            vector = spec.role == "vector"
            shape = ((rows if made.rows else spec.cols),) if vector else (rows, spec.cols)
            shapes[made.key] = max(shape, shapes.get(made.key, shape))
    rng = np.random.default_rng(4)
    tensors = {key: rng.normal(0, 1, shape).astype(np.float32) for key, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return architecture, tensors


@pytest.mark.parametrize("model_type", CONFIGS)
def test_blocks_equal_the_whole_tensors(model_type: str, tmp_path: Path) -> None:
    """Slices, shifts and constants as TensorSource describes them, taken from the tensors in memory."""
    architecture, tensors = write_checkpoint(tmp_path / "m", CONFIGS[model_type])
    with open_source(tmp_path / "m") as source:
        weights = CheckpointWeights(architecture, source)
        for name, made in architecture.sources.items():
            spec = architecture.program.tensors[name]
            want = made.constant if made.constant is not None else tensors[made.key]
            if made.rows is not None:
                want = want[made.rows[0] : made.rows[1]]
            want = (want + np.float32(made.offset)).reshape(spec.rows, spec.cols)
            np.testing.assert_array_equal(weights(name), want)
            blocks = [weights.block(name, a, b) for a, b in row_blocks(spec.rows, spec.cols, 7 * spec.cols)]
            np.testing.assert_array_equal(np.concatenate(blocks), want)
            ids = np.array([spec.rows - 1, 0, 0, spec.rows // 2])
            np.testing.assert_array_equal(weights.rows(name, ids), want[ids])
    kinds = {(m.rows is not None, m.offset != 0.0) for m in architecture.sources.values()}
    assert (model_type == "phi3") == any(rows for rows, _ in kinds)
    assert (model_type == "gemma2") == any(offset for _, offset in kinds)


def test_a_tensor_that_the_config_does_not_speak_of_is_refused(tmp_path: Path) -> None:
    """A bias left in the file would be left out of the model without a word."""
    architecture, tensors = write_checkpoint(tmp_path / "m", CONFIGS["phi3"])
    spare = {
        "model.layers.0.self_attn.o_proj.bias": np.ones(8, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file({**tensors, **spare}, tmp_path / "m" / "model.safetensors")
    with (
        open_source(tmp_path / "m") as source,
        pytest.raises(BadCheckpoint, match=r"holds 1 tensors.*o_proj\.bias"),
    ):
        CheckpointWeights(architecture, source)


def test_a_fused_tensor_that_is_too_short_is_refused(tmp_path: Path) -> None:
    architecture, tensors = write_checkpoint(tmp_path / "m", CONFIGS["phi3"])
    key = next(k for k in tensors if "qkv_proj" in k)
    tensors[key] = tensors[key][:-1].copy()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with open_source(tmp_path / "m") as source, pytest.raises(BadCheckpoint, match="qkv_proj"):
        CheckpointWeights(architecture, source)


@pytest.mark.parametrize("packing", ["rows", "cpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_packed_planes_decode_as_the_whole(name: str, packing: str) -> None:
    packing = cpu_packing(name) if packing == "cpu" else packing
    fmt, spec = get_format(name), TensorSpec(37, 70, "matrix")
    x = np.random.default_rng(6).normal(0, 1, (37, 70)).astype(np.float32)
    planes = fmt.encode(x)
    packed = pack(name, packing, planes, 37, 70)
    stored = {
        k: np.concatenate([v.view(np.uint8), np.zeros(13, np.uint8)])[: v.nbytes] for k, v in packed.items()
    }
    program = Program(ops=(), tensors={"w": spec}, buffers={}, cache=(), vocab_size=37, max_context=1)
    weights = EngineWeights(program, {"w": TensorPlan(name, packing)}, lambda tensor: stored)
    want = fmt.decode(planes, 37, 70)
    np.testing.assert_array_equal(weights("w"), want)
    np.testing.assert_array_equal(weights.block("w", 5, 21), want[5:21])
    np.testing.assert_array_equal(weights.rows("w", np.array([36, 0, 17, 17])), want[[36, 0, 17, 17]])


def test_row_blocks_cover_every_row_once() -> None:
    for rows, cols, items in ((1, 10, 5), (7, 3, 9), (100, 1, 1000), (5, 1 << 21, 1 << 20)):
        blocks = row_blocks(rows, cols, items)
        assert [r for a, b in blocks for r in range(a, b)] == list(range(rows))
        assert all((b - a) * cols <= max(items, cols) for a, b in blocks)
