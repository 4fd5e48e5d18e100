"""GGUF files: every block type's values as ggml's own loops give them, the tokenizer, and whole engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import KINDS, spm_metadata, write_gguf_llama
from hf_folders import llama_config, llama_shapes
from test_imported_engines import answers, build_kept
from tokenizers import Tokenizer

from builders.planner import DEFAULT
from builders.sources import open_source, read_config, read_vocabulary
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.formats import get_format

CONFIG = llama_config(hidden_size=256, intermediate_size=512, vocab_size=300, head_dim=64)
FORMATS = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8_g32", "Q4_0": "int4_g32",
    "Q4_1": "int4_g32_min", "Q5_0": "int5_g32", "Q5_1": "int5_g32_min", "Q2_K": "q2_k", "Q3_K": "q3_k",
    "Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k",
}  # fmt: skip


def vocabulary() -> dict[str, Any]:
    """300 pieces: bytes, letters, and some words that are joined from them."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [["t", "h"], ["th", "e"], ["\u2581", "the"], ["a", "n"], ["an", "d"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<fill{i}>" for i in range(300 - len(tokens))]
    return spm_metadata({"model": {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}})


@pytest.fixture(scope="module", params=FORMATS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    config = CONFIG | {"num_hidden_layers": 1}
    values = write_gguf_llama(path, request.param, config, llama_shapes(config), vocabulary())
    return request.param, path, values


def test_every_block_type_is_exact(case: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    kind, path, values = case
    with open_source(path) as source:
        assert source.shapes() == {key: value.shape for key, value in values.items()}
        assert source.quantized == (kind not in ("F32", "F16", "BF16"))
        for key, value in values.items():
            np.testing.assert_array_equal(source.tensor(key), value)
            np.testing.assert_array_equal(source.tensor(key, (1, 5)), value[1:5])
            stored = source.stored(key)
            if stored is not None:
                assert stored.format == FORMATS[kind] and stored.error == 0.0
                planes = get_format(stored.format).decode(stored.planes, *value.shape)
                np.testing.assert_array_equal(planes, value)


def test_values_are_the_gguf_packages(case: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    kind, path, _ = case
    reader = gguf.GGUFReader(path)
    with open_source(path) as source:
        for tensor in reader.tensors:
            if tensor.name.startswith("blk.0.ffn") and tensor.name != "blk.0.ffn_norm.weight":
                want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                name = tensor.name.split(".")[2].removeprefix("ffn_")
                key = f"model.layers.0.mlp.{name}_proj.weight"
                np.testing.assert_array_equal(source.tensor(key), want)
                assert tensor.tensor_type.name == kind


def test_an_engine_holds_the_values_and_answers(
    case: tuple[str, Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    kind, path, values = case
    floats = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # not quantized: the format is asked for
    report = build_kept(path, tmp_path / "m.edge", floats.get(kind, DEFAULT))
    quality = report.manifest.quality
    assert quality is not None and quality.sqnr_db == {}
    assert set(report.manifest.provenance.source_sha256) == {"small.gguf"}
    with read_engine(tmp_path / "m.edge") as engine:
        part = engine.part("language")
        for tensor, origin in part.origins.items():
            np.testing.assert_array_equal(decode(part.weights[tensor]), values[f"{origin.key}.weight"])
            if tensor != "embed":
                assert part.plan.tensors[tensor].format == FORMATS[kind]
    assert answers(tmp_path / "m.edge", "the cat") >= 1


def test_a_real_model_comes_back_from_gguf(real_model: Path, tmp_path: Path) -> None:
    """Converted as llama.cpp does: the same config, tensors, tokens and special ids as the folder."""
    from gguf_files import gguf_bytes, gguf_name, llama_metadata, paired_rows

    with open_source(real_model) as folder:
        tokenizer = json.loads(folder.tokenizer_json)
        config = folder.config
        tensors = {}
        for key in sorted(folder.shapes()):
            values = folder.tensor(key)
            for side, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                if f".{side}_proj." in key:
                    values = paired_rows(values, config[heads])
            tensors[gguf_name(key)] = ("F32", values.shape, values.astype("<f4").tobytes())
        metadata = llama_metadata(config) | spm_metadata(tokenizer)
        metadata["tokenizer.chat_template"] = "{{ messages }}"
        path = tmp_path / "model.bin"  # what it is, is told by its content
        path.write_bytes(gguf_bytes(metadata, tensors))
        with open_source(path) as source:
            assert sorted(source.shapes()) == sorted(folder.shapes())
            for key in sorted(folder.shapes()):
                np.testing.assert_array_equal(source.tensor(key), folder.tensor(key))
            for key in (
                "hidden_size",
                "num_key_value_heads",
                "max_position_embeddings",
                "tie_word_embeddings",
            ):
                assert source.config[key] == config[key]
            assert source.chat_template == "{{ messages }}"
            ours, theirs = (
                Tokenizer.from_str(source.tokenizer_json.decode()),
                Tokenizer.from_str(json.dumps(tokenizer)),
            )
            texts = ["Once upon a time, there was a little girl.", "  two  spaces\n", "Zażółć 🦊 #42!", ""]
            for text in texts:
                assert ours.encode(text).ids == theirs.encode(text).ids
                assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
            assert read_vocabulary(source, 512).bos == 1 and read_vocabulary(source, 512).eos == (2,)
    assert read_config(path)[0] == source.config and read_config(path)[1] == "model"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path) -> None:
    """Its own way through the gguf package: every weight equal, and every text the same tokens."""
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it: pip install accelerate")
    path = tmp_path / "small.gguf"
    config = CONFIG | {"num_hidden_layers": 2, "head_dim": 64}
    metadata = vocabulary() | {"llama.rope.dimension_count": 64, "llama.vocab_size": 300}
    write_gguf_llama(path, kind, config, llama_shapes(config), metadata)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    with open_source(path) as source:
        state = model.state_dict()
        for key in sorted(source.shapes()):
            np.testing.assert_array_equal(source.tensor(key), state[key].float().numpy())
        assert model.config.num_key_value_heads == source.config["num_key_value_heads"]
        ours = Tokenizer.from_str(source.tokenizer_json.decode())
        # (Of a text that begins with a space transformers drops the one that llama.cpp puts before it)
        for text in ("the cat and a hat", "Zażółć 42", "the  the"):
            assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_kinds_are_those_of_the_package() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    for name, (number, values, nbytes) in KINDS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (kind.value, gguf.constants.GGML_QUANT_SIZES[kind]) == (number, (values, nbytes))
