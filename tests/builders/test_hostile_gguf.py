"""Damaged and hostile GGUF files: each is refused with a typed error that says what is wrong, and none hangs.

The cases are those of llama.cpp's test-gguf and of its security reports (RELIABILITY.md, 1.1).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_bytes, gguf_name, llama_metadata, text, value, write_gguf_llama
from hf_folders import llama_config, llama_shapes
from test_gguf import vocabulary

from builders.archs import read_program
from builders.sources import open_source, read_config
from builders.weights import CheckpointWeights
from edge_runtime.errors import BadCheckpoint, EdgeError, Unsupported

CONFIG = llama_config(num_hidden_layers=1)
WIDE = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def metadata(**changes: Any) -> dict[str, Any]:
    return llama_metadata(CONFIG) | vocabulary() | changes


def tensors() -> dict[str, Any]:
    return {
        gguf_name(key): ("F32", shape, np.ones(shape, "<f4").tobytes())
        for key, shape in llama_shapes(CONFIG).items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def refused(path: Path, data: bytes, *words: str, error: type[EdgeError] = BadCheckpoint) -> None:
    path.write_bytes(data)
    with pytest.raises(error) as caught, open_source(path):
        pass
    for word in words:
        assert word in str(caught.value)


def test_the_file_that_the_cases_damage_is_good(path: Path) -> None:
    path.write_bytes(gguf_bytes(metadata(), tensors()))
    with open_source(path) as source:
        CheckpointWeights(read_program(source.config), source)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGUX", "m.gguf is not a GGUF file: it begins with b'GGUX', expected 'GGUF'"),
        (b"\0\0\0\0", "m.gguf is not a GGUF file: it begins with b'\\x00\\x00\\x00\\x00', expected 'GGUF'"),
        (None, "m.gguf is not a GGUF file: it is empty, expected 'GGUF'"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "m.gguf is a Git LFS pointer, not the weights; run",
        ),
    ],
)
def test_a_file_named_so_that_begins_as_no_gguf_is_told_what_it_lacks(
    path: Path, head: bytes | None, words: str
) -> None:
    data = b"" if head is None else head + gguf_bytes(metadata(), tensors())[len(head) :]
    refused(path, data, words)
    with pytest.raises(BadCheckpoint) as caught:  # --dry-run reads no weights
        read_config(path)
    assert words in str(caught.value) and "pickle" not in str(caught.value)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_versions_are_refused(path: Path, version: int) -> None:
    data = bytearray(gguf_bytes(metadata(), tensors()))
    struct.pack_into("<I", data, 4, version)
    words = "big-endian" if version > 4 else f"version {version}"
    refused(path, bytes(data), words, error=Unsupported)


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [n for n in WIDE if n > 1])
def test_counts_beyond_the_file_are_refused(path: Path, at: int, count: int) -> None:
    data = bytearray(gguf_bytes(metadata(), tensors()))
    struct.pack_into("<Q", data, at, count)
    refused(path, bytes(data))


def header(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


@pytest.mark.parametrize("length", [n for n in WIDE if n > 1])
def test_lengths_of_texts_and_arrays_beyond_the_file_are_refused(path: Path, length: int) -> None:
    refused(path, header(0, 1) + struct.pack("<Q", length) + b"key")
    for kind in (4, 8, 9, 12):
        array = text("key") + struct.pack("<IIQ", 9, kind, length)
        refused(path, header(0, 1) + array + bytes(64))


@pytest.mark.parametrize("kind", [13, 2**32 - 1])
def test_unknown_types_of_values_are_refused(path: Path, kind: int) -> None:
    refused(path, header(0, 1) + text("key") + struct.pack("<I", kind) + bytes(8), "'key'", "type")


def test_keys_and_tensors_that_appear_twice_are_refused(path: Path) -> None:
    pair = text("key") + value(1)
    refused(path, header(0, 2) + pair + pair, "'key'", "twice")
    info = text("a") + struct.pack("<IQIQ", 1, 8, 0, 0)
    refused(path, header(2, 0) + info + info + bytes(256), "'a'", "twice")


@pytest.mark.parametrize("dims", [[0], [8, 0], [2**32, 2**32], [2**63, 2], [2**64 - 1], [1 << 24, 1 << 24]])
def test_shapes_that_wrap_or_are_empty_are_refused(path: Path, dims: list[int]) -> None:
    info = text("a") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, 0)
    refused(path, header(1, 0) + info + bytes(256), "'a'")


@pytest.mark.parametrize("count", [0, 5, 2**32 - 1])
def test_dimensions_are_one_to_four(path: Path, count: int) -> None:
    refused(path, header(1, 0) + text("a") + struct.pack("<I", count) + bytes(256), "dimensions")


@pytest.mark.parametrize("offset", [8, 1 << 20, 2**63, 2**64 - 32])
def test_offsets_beyond_the_file_or_out_of_line_are_refused(path: Path, offset: int) -> None:
    info = text("a") + struct.pack("<IQIQ", 1, 8, 0, offset)
    refused(path, header(1, 0) + info + bytes(256), "'a'", "aligned")


def test_tensors_that_overlap_are_refused(path: Path) -> None:
    infos = b"".join(text(name) + struct.pack("<IQIQ", 1, 16, 0, at) for name, at in (("a", 0), ("b", 32)))
    refused(path, header(2, 0) + infos + bytes(256), "overlaps")


@pytest.mark.parametrize("alignment", [0, 3, 2**31, "32", True])
def test_bad_alignments_are_refused(path: Path, alignment: Any) -> None:
    refused(path, gguf_bytes(metadata(**{"general.alignment": alignment}), tensors()), "alignment")


@pytest.mark.parametrize("number", [4, 15, 16, 41, 2**32 - 1])
def test_types_without_a_home_are_named(path: Path, number: int) -> None:
    info = text("a") + struct.pack("<IQIQ", 1, 256, number, 0)
    refused(path, header(1, 0) + info + bytes(1024), "'a'", "Q4_K", error=Unsupported)


def test_one_of_several_files_is_refused(path: Path) -> None:
    refused(path, gguf_bytes(metadata(**{"split.count": 3}), tensors()), "merge", error=Unsupported)


def test_rows_must_be_whole_blocks(path: Path) -> None:
    info = text("a") + struct.pack("<IQIQ", 1, 100, 12, 0)
    refused(path, header(1, 0) + info + bytes(1024), "multiple of 256")


BAD_VALUES = {
    "llama.block_count": [0, 2**31, "2"],
    "llama.embedding_length": [0, "32", 1.5],
    "llama.attention.head_count": [0, [4, 0]],
    "llama.attention.head_count_kv": [0, [2, 1]],
    "llama.attention.layer_norm_rms_epsilon": ["x", float("nan"), -1.0],
    "llama.rope.freq_base": [float("inf"), "10000"],
    "llama.context_length": [0, 2**32 - 1],
    "general.architecture": ["clip", 7, ""],
    "tokenizer.ggml.tokens": [[1, 2, 3], "a", 4],
    "tokenizer.ggml.scores": [[1.0], ["a"] * 300, 1.0],
    "tokenizer.ggml.token_type": [[1], ["a"] * 300],
    "tokenizer.ggml.bos_token_id": [300, "1", 2**32 - 1],
    "tokenizer.ggml.eos_token_id": [300, [2]],
    "tokenizer.ggml.model": ["t5", 1],
}


@pytest.mark.parametrize(("key", "bad"), [(key, bad) for key, values in BAD_VALUES.items() for bad in values])
def test_wrong_metadata_is_a_typed_error(path: Path, key: str, bad: Any) -> None:
    path.write_bytes(gguf_bytes(metadata(**{key: bad}), tensors()))
    with pytest.raises(EdgeError), open_source(path) as source:
        CheckpointWeights(read_program(source.config), source)


def test_missing_tensors_and_shapes_are_named(path: Path) -> None:
    some = tensors()
    del some["blk.0.ffn_up.weight"]
    path.write_bytes(gguf_bytes(metadata(), some))
    with open_source(path) as source, pytest.raises(BadCheckpoint, match=r"mlp\.up_proj"):
        CheckpointWeights(read_program(source.config), source)
    some = tensors() | {"blk.0.ffn_up.weight": ("F32", (32, 32), bytes(4096))}
    path.write_bytes(gguf_bytes(metadata(), some))
    with open_source(path) as source, pytest.raises(BadCheckpoint, match=r"\(32, 32\).*\(64, 32\)"):
        CheckpointWeights(read_program(source.config), source)


def test_scales_that_are_no_numbers_are_refused(path: Path) -> None:
    write_gguf_llama(path, "Q8_0", CONFIG, llama_shapes(CONFIG), vocabulary())
    with open_source(path) as source:
        info = source._header.tensors["blk.0.ffn_up.weight"]  # where to put the NaN
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = b"\xff\x7f"
    path.write_bytes(data)
    with open_source(path) as source, pytest.raises(BadCheckpoint, match=r"blk\.0\.ffn_up\.weight.*NaN"):
        source.tensor("model.layers.0.mlp.up_proj.weight")


def test_a_file_truncated_anywhere_is_refused(path: Path) -> None:
    data = gguf_bytes(metadata(), tensors())
    for length in [*range(4, 200), *range(200, len(data), len(data) // 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(BadCheckpoint), open_source(path):
            pass


def test_flipped_bytes_give_typed_errors_or_a_model(path: Path) -> None:
    good = gguf_bytes(metadata(), tensors())
    head = good.index(b"blk.0.ffn_down.weight") + 64
    rng = np.random.default_rng(5)
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(4, head, rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with open_source(path) as source:
                CheckpointWeights(read_program(source.config), source)
        except EdgeError:
            pass
