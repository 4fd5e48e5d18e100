"""Sources: every float type, shards, special ids; and what a model folder may not do."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import byte_tokenizer, llama_config, write_model
from safetensors.numpy import load_file, save_file

from builders.sources import open_source, read_config, read_vocabulary
from edge_runtime.errors import BadCheckpoint, EdgeError, Unsupported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changes))


def refused(folder: Path, *words: str, error: type[EdgeError] = BadCheckpoint) -> None:
    with pytest.raises(error) as caught, open_source(folder):
        pass
    for word in words:
        assert word in str(caught.value)


def test_every_tensor_reads_as_the_library_reads_it(folder: Path) -> None:
    want = load_file(folder / "model.safetensors")
    with open_source(folder) as source:
        assert source.keys() == sorted(want)
        for key, value in want.items():
            assert source.shapes()[key] == value.shape
            np.testing.assert_array_equal(source.tensor(key), value)
        key = "model.embed_tokens.weight"
        np.testing.assert_array_equal(source.tensor(key, (7, 19)), want[key][7:19])


def test_shards_give_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    sharded = write_model(tmp_path / "sharded", shards=3)
    with open_source(folder) as one, open_source(sharded) as many:
        assert one.keys() == many.keys()
        for key in many.shapes():
            np.testing.assert_array_equal(one.tensor(key), many.tensor(key))
        assert sum(name.endswith(".safetensors") for name in many.sha256()) == 3


def test_16_and_8_bit_floats_match_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    folder = write_model(tmp_path / "model")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(16, 16)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    tensors = {
        "e4m3": codes.view(torch.float8_e4m3fn).clone(),
        "e5m2": codes.view(torch.float8_e5m2).clone(),
        "bf16": halves.view(torch.bfloat16).clone(),
        "f16": halves.view(torch.float16).clone(),
        "f64": torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4),
    }
    save_torch(tensors, str(folder / "model.safetensors"))
    with open_source(folder) as source:
        for key, value in tensors.items():
            # Equal as numbers, NaN where torch has NaN: every code of each type
            np.testing.assert_array_equal(source.tensor(key), value.to(torch.float32).numpy())


def test_integers_are_not_weights(folder: Path) -> None:
    save_file({"x": np.arange(4)}, folder / "model.safetensors")
    with open_source(folder) as source, pytest.raises(BadCheckpoint, match="dtype I64"):
        source.tensor("x")


def test_a_missing_tensor_is_named_with_the_nearest(folder: Path) -> None:
    with (
        open_source(folder) as source,
        pytest.raises(BadCheckpoint, match=r"did you mean 'model\.norm\.weight'"),
    ):
        source.tensor("model.norms.weight")


def test_rows_beyond_the_tensor_are_refused(folder: Path) -> None:
    with open_source(folder) as source, pytest.raises(BadCheckpoint, match="do not exist"):
        source.tensor("model.norm.weight", (0, 33))


# --- special ids ------------------------------------------------------------------------------------------


def test_eos_ids_are_the_union_of_all_files(folder: Path) -> None:
    rewrite(folder, "generation_config.json", eos_token_id=[1, 2])
    rewrite(folder, "tokenizer_config.json", eos_token={"content": "<unk>"}, bos_token="<s>")
    with open_source(folder) as source:
        found = read_vocabulary(source, 300)
    assert found.eos == (1, 2, 0)
    assert found.bos == 1


def test_real_models_stop_at_both_ids(real_model: Path) -> None:
    with open_source(real_model) as source:
        assert read_vocabulary(source, 512).eos == (1, 2)


@pytest.mark.parametrize("value", [300, -1, True, "2", 1.5, [2, None]])
def test_an_eos_id_outside_the_vocabulary_is_refused(folder: Path, value: Any) -> None:
    rewrite(folder, "generation_config.json", eos_token_id=value)
    with open_source(folder) as source, pytest.raises(BadCheckpoint, match="eos_token_id"):
        read_vocabulary(source, 300)


def test_a_tokenizer_larger_than_the_vocabulary_is_noted(folder: Path) -> None:
    """Gemma 3 1B has one: its image token lies one beyond the text model's embedding."""
    with open_source(folder) as source:
        assert read_vocabulary(source, 258).size == 258
        assert "token id 258" in source.notices[0]


def test_a_padding_id_of_minus_one_means_none(folder: Path) -> None:
    rewrite(folder, "config.json", pad_token_id=-1)
    with open_source(folder) as source:
        assert read_vocabulary(source, 300).pad is None


def test_chat_template_is_found_in_each_place(folder: Path) -> None:
    def template() -> str | None:
        with open_source(folder) as source:
            return source.chat_template

    assert template() is None
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    rewrite(folder, "tokenizer_config.json", chat_template=named)
    assert template() == "D"
    rewrite(folder, "tokenizer_config.json", chat_template="{{ messages }}")
    assert template() == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("file")
    assert template() == "file"


# --- what is never read -----------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/edge-build-was-exploited",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_named_safetensors_is_refused_and_not_run(folder: Path, protocol: int) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    refused(folder, "pickle", "safetensors")
    assert not Path("/tmp/edge-build-was-exploited").exists()


def test_a_torch_archive_named_safetensors_is_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    refused(folder, "zip archive")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.pth"])
def test_a_folder_of_pickles_is_refused_with_what_to_do(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, name, "never read", "safe_serialization")
    refused(folder / name, "pickle")  # and when it is given itself


def test_gguf_and_lfs_pointers_say_what_they_are(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(64))
    refused(folder, "GGUF")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "git lfs pull")


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    rewrite(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("import os; os.mkdir('/tmp/edge-build-was-exploited')")
    with open_source(folder) as source:
        assert "auto_map" in source.notices[0]
    assert not Path("/tmp/edge-build-was-exploited").exists()


def test_an_unknown_way_of_quantizing_is_refused_with_the_known_ones(folder: Path) -> None:
    rewrite(folder, "config.json", quantization_config={"quant_method": "gtpq", "bits": 4})
    refused(folder, "'gtpq'", "did you mean 'gptq'", "awq, ", error=Unsupported)


# --- damaged folders --------------------------------------------------------------------------------------


def test_missing_files_are_named(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).unlink()
        refused(folder, name)
    refused(folder / "nowhere", "not a folder")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": NaN}',
        '{"model_type": "llama", "model_type": "qwen2"}',
        "[" * 100_000,
        "\ufeff{}",
        "\udcff",
    ],
)
def test_broken_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


def test_a_huge_config_is_refused(folder: Path) -> None:
    with open(folder / "config.json", "ab") as file:
        file.truncate(5 << 20)
    refused(folder, "larger than 4 MiB")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "m.bin",
        ".safetensors",
        "x\0.safetensors",
        3,
    ],
)
def test_an_index_may_not_leave_the_folder(tmp_path: Path, name: Any) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "plain *.safetensors file name")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    rewrite(folder, "model.safetensors.index.json", weight_map={"ghost": "model-00001-of-00002.safetensors"})
    refused(folder, "'ghost'")
    rewrite(folder, "model.safetensors.index.json", weight_map={"x": "model-00009-of-00002.safetensors"})
    refused(folder, "model-00009-of-00002.safetensors")
    rewrite(folder, "model.safetensors.index.json", weight_map={})
    refused(folder, "weight_map")


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(secret)
    refused(folder, "link out of the model folder")


def test_the_hub_cache_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--toy" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--toy" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"blob{i}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{i}")
    with open_source(snapshot) as source:
        assert source.name == "me--toy"
        assert source.tensor("model.norm.weight").shape == (32,)


def test_a_fifo_does_not_hang(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "not a regular file")


def test_every_truncation_of_the_weights_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "model.safetensors")


def test_offsets_that_lie_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    for entry in (
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},  # a hole
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
    ):
        header = json.dumps({"x": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        refused(folder, "model.safetensors")


def test_read_config_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / "config.json"
    lone.parent.mkdir()
    lone.write_text(json.dumps(llama_config()))
    assert read_config(lone) == (llama_config(), "lone")
    assert read_config(folder) == (llama_config(), "model")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        read_config(tmp_path / "absent")
