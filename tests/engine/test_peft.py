"""PEFT folders against their meaning, scale * B @ A worked out per checkpoint module; and hostile ones."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_folders import PREFIX, lora_config, module_shapes, random_weights, write_peft
from toy_engine import toy_origins, toy_program

from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.peft import read_peft
from edge_runtime.errors import BadCheckpoint, BadConfig, EdgeError, Unsupported, ValueOutOfRange

PROGRAM = toy_program()
ORIGINS = toy_origins(PROGRAM)  # gate and up are one module, as in Phi-3
SHAPES = module_shapes(PROGRAM, ORIGINS)
MODULES = [m for m in SHAPES if m.endswith(("q_proj", "gate_up_proj"))]
RANKS = dict.fromkeys(MODULES, 4)


def read(folder: Path) -> Adapter:
    return read_peft(folder, ORIGINS, PROGRAM)


def folder_of(tmp_path: Path, ranks: dict[str, int] | None = None, **changes: Any) -> Path:
    return write_peft(tmp_path / "lora", lora_config(**changes), random_weights(SHAPES, ranks or RANKS))


def check_meaning(adapter: Adapter, tensors: dict[str, np.ndarray], scales: dict[str, float]) -> None:
    """Every tensor's update is the rows of its module's scale * B @ A that the origin names, and no other."""
    expected = {t for t, o in ORIGINS.items() if o.key in scales and PROGRAM.tensors[t].role == "matrix"}
    assert set(adapter) == expected
    for tensor, update in adapter.items():
        module, first = ORIGINS[tensor].key, ORIGINS[tensor].row
        a, b = (tensors[f"{PREFIX}{module}.lora_{s}.weight"].astype(np.float64) for s in "AB")
        delta = scales[module] * (b @ a)
        rows = PROGRAM.tensors[tensor].rows
        got = update.scale * (update.b.astype(np.float64) @ update.a.astype(np.float64))
        np.testing.assert_allclose(got, delta[first : first + rows], rtol=1e-12)
        assert update.a.dtype == update.b.dtype == np.float16 and update.b.flags.c_contiguous


def test_updates_are_those_of_the_modules_fused_ones_by_rows(tmp_path: Path) -> None:
    adapter = read(folder_of(tmp_path))
    check_meaning(adapter, random_weights(SHAPES, RANKS), dict.fromkeys(MODULES, 16 / 4))
    assert {"layers.0.gate", "layers.0.up", "layers.1.q"} <= set(adapter)
    assert adapter["layers.0.gate"].a is adapter["layers.0.up"].a  # one A in memory
    assert list(adapter) == [t for t in PROGRAM.tensors if t in adapter]


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    adapter = read(folder_of(tmp_path, use_rslora=True, lora_alpha=6.5))
    check_meaning(adapter, random_weights(SHAPES, RANKS), dict.fromkeys(MODULES, 6.5 / 2))


def test_patterns_are_taken_in_order_the_first_match_counts(tmp_path: Path) -> None:
    ranks = {m: 2 if ".0." in m else 8 if m.endswith("q_proj") else 4 for m in MODULES}
    folder = folder_of(
        tmp_path,
        ranks,
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "layers.0.mlp.gate_up_proj": 2, "q_proj": 8},
        alpha_pattern={"gate_up_proj": 3, "0.mlp.gate_up_proj": 100},
    )
    scales = {m: (3 if "gate" in m else 16) / ranks[m] for m in MODULES}
    check_meaning(read(folder), random_weights(SHAPES, ranks), scales)


def test_a_pattern_matches_whole_names_only(tmp_path: Path) -> None:
    """`proj` ends q_proj as text, not as a name; ^ binds to the start."""
    adapter = read(folder_of(tmp_path, alpha_pattern={"proj": 1, "^q_proj": 1, "attn.q_proj": 1}))
    assert {u.scale for u in adapter.values()} == {4.0}


def test_layers_and_a_regular_expression_may_choose_modules(tmp_path: Path) -> None:
    some = {m: 4 for m in MODULES if ".1." in m}
    for changes in (
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\..*(q|gate_up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
    ):
        assert all(t.startswith("layers.1.") for t in read(folder_of(tmp_path, some, **changes)))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_stored_types(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = folder_of(tmp_path)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {k: torch.tensor(v).to(kinds[dtype]) for k, v in random_weights(SHAPES, RANKS).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    exact = {k: v.float().numpy() for k, v in tensors.items()}
    check_meaning(read(folder), exact, dict.fromkeys(MODULES, 4.0))


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], type[EdgeError], str]] = {
    "dora": ({"use_dora": True}, Unsupported, "'use_dora' is 'True': DoRA rescales"),
    "bias": ({"bias": "all"}, Unsupported, "changes the model's biases"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, Unsupported, "replaces whole modules"),
    "transposed": ({"fan_in_fan_out": True}, Unsupported, "transposed"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, Unsupported, "this start changes the base model"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, Unsupported, "LoftQ changes the base"),
    "another kind": ({"peft_type": "IA3"}, Unsupported, "only LoRA adapters are supported"),
    "1 is not true": ({"use_qalora": 1}, Unsupported, "QALoRA"),
    "unknown key": ({"lora_dropuot": 0.1}, BadConfig, "'lora_dropuot' is not known.*'lora_dropout'"),
    "rank 0": ({"r": 0}, BadConfig, "r is 0, expected a rank of 1 to 512"),
    "rank is true": ({"r": True}, BadConfig, "r is True"),
    "huge rank": ({"r": 10**9}, BadConfig, "r is 1000000000"),
    "no alpha": ({"lora_alpha": None}, BadConfig, "lora_alpha is None"),
    "huge alpha": ({"lora_alpha": 1e300}, BadConfig, "lora_alpha is 1e.300"),
    "stabilised": ({"use_rslora": "yes"}, BadConfig, "'use_rslora' is 'yes'"),
    "targets": ({"target_modules": [1]}, BadConfig, "expected names of modules"),
    "pattern": ({"rank_pattern": {"(a+)+$": 2}}, Unsupported, "only names of modules"),
    "pattern's value": ({"rank_pattern": {"q_proj": "2"}}, BadConfig, "rank_pattern 'q_proj' is 2"),
    "pattern's kind": ({"alpha_pattern": [1]}, BadConfig, "'alpha_pattern' is a list"),
    "target left out": ({"target_modules": ["q_proj"]}, BadCheckpoint, "'target_modules' does not speak"),
    "target absent": (
        {"target_modules": ["q_proj", "gate_up_proj", "k_proj"]},
        BadCheckpoint,
        "lacks 'model.layers.0.self_attn.k_proj'",
    ),
    "other rank": ({"r": 8}, BadCheckpoint, r"has shape \(4, 32\), the config and the model ask for \(8, 32"),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_what_would_mean_something_else_is_refused(tmp_path: Path, name: str) -> None:
    changes, error, message = REFUSED_CONFIGS[name]
    with pytest.raises(error, match=message):
        read(folder_of(tmp_path, **changes))


def test_a_key_that_is_null_is_not_in_use(tmp_path: Path) -> None:
    assert read(folder_of(tmp_path, some_future_config=None))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_key_that_must_be_there(tmp_path: Path, key: str) -> None:
    config = lora_config()
    del config[key]
    write_peft(tmp_path / "lora", config, random_weights(SHAPES, RANKS))
    with pytest.raises(BadConfig, match=f"has no '{key}'"):
        read(tmp_path / "lora")


def change(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    module = MODULES[0]
    a, b = (f"{PREFIX}{module}.lora_{s}.weight" for s in "AB")
    match name:
        case "nan":
            tensors[b][3, 1] = np.nan
        case "inf":
            tensors[a][0, 0] = -np.inf
        case "beyond f16":
            tensors[a][0, 0] = 7e4
        case "wrong shape":
            tensors[b] = tensors[b][:-1].copy()
        case "three axes":
            tensors[a] = tensors[a][None].copy()
        case "integers":
            tensors[a] = tensors[a].astype(np.int32)
        case "no B":
            del tensors[b]
        case "stranger":
            tensors |= {k.replace(module, "model.layers.7.self_attn.q_proj"): tensors[k] for k in (a, b)}
        case "head":
            rows = np.zeros((64, 4), np.float32)
            tensors |= {f"{PREFIX}lm_head.lora_A.weight": tensors[a], f"{PREFIX}lm_head.lora_B.weight": rows}
        case "dora":
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = np.ones(4, np.float32)
        case "embedding":
            tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = np.ones((4, 4), np.float32)
        case "bias":
            tensors[f"{PREFIX}{module}.lora_B.bias"] = np.ones(4, np.float32)
        case "saved module":
            tensors[f"{PREFIX}lm_head.weight"] = np.ones((4, 4), np.float32)
        case "nothing":
            tensors = {}
    return tensors


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nan", ValueOutOfRange, "q_proj.lora_B.weight' holds NaN or Inf"),
        ("inf", ValueOutOfRange, "q_proj.lora_A.weight' holds NaN or Inf"),
        ("beyond f16", ValueOutOfRange, "holds 70000, beyond f16"),
        ("wrong shape", BadCheckpoint, r"has shape \(31, 4\), the config and the model ask for \(32, 4\)"),
        ("three axes", BadCheckpoint, r"has shape \(1, 4, 32\)"),
        ("integers", BadCheckpoint, "has dtype I32"),
        ("no B", BadCheckpoint, "has only lora_A of 'model.layers.0.self_attn.q_proj'"),
        ("stranger", BadCheckpoint, "'model.layers.7.self_attn.q_proj', which is no linear layer.*did you"),
        ("head", BadCheckpoint, "'lm_head', which is no linear layer"),
        ("dora", Unsupported, "belongs to DoRA"),
        ("embedding", Unsupported, "on the embedding"),
        ("bias", Unsupported, "a bias, which is not supported"),
        ("saved module", Unsupported, "no update of low rank"),
        ("nothing", BadCheckpoint, "holds no tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, error: type[EdgeError], message: str
) -> None:
    targets = ["q_proj", "gate_up_proj", "lm_head"] if name == "head" else ["q_proj", "gate_up_proj"]
    tensors = change(random_weights(SHAPES, RANKS), name)
    write_peft(tmp_path / "lora", lora_config(target_modules=targets), tensors)
    with pytest.raises(error, match=message):
        read(tmp_path / "lora")


def test_broken_files(tmp_path: Path) -> None:
    good = folder_of(tmp_path)
    weights, config = good / "adapter_model.safetensors", good / "adapter_config.json"
    raw, text = weights.read_bytes(), config.read_bytes()

    def refused(path: Path, data: bytes, message: str) -> None:
        keep = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=message):
            read(good)
        path.write_bytes(keep)

    for cut in (0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1):
        refused(weights, raw[:cut], "truncated|damaged|not a safetensors file")
    refused(weights, (5 << 20).to_bytes(8, "little") + raw[8:], "expected at most 4194304; it is damaged")
    refused(weights, (2**64 - 1).to_bytes(8, "little") + raw[8:], "header of 18446744073709551615 bytes")
    refused(weights, b"PK\x03\x04" + raw[4:], "zip archive .torch.save")
    refused(weights, b"\x80\x02cos\nsystem\n" + raw[12:], "Python pickle, which may run code")
    for data, message in (
        (b"", "not valid JSON"),
        (b"[]", "JSON list, expected an object"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"r":4,' + text[1:], "appears twice"),
        (text.replace(b'"r": 4', b'"r": NaN'), "not a JSON number"),
        (b" " * (1 << 20) + text, "is larger than 1 MiB"),
    ):
        refused(config, data, message)
    read(good)


def test_missing_files_pickles_and_links_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="is not a folder"):
        read(tmp_path / "nowhere")
    folder = folder_of(tmp_path)
    os.rename(folder / "adapter_model.safetensors", tmp_path / "outside.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadCheckpoint, match=r"pickles .* are never read"):
        read(folder)
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(BadCheckpoint, match="is a link out of the model folder"):
        read(folder)
    os.remove(folder / "adapter_config.json")
    with pytest.raises(BadCheckpoint, match=r"has no adapter_config\.json"):
        read(folder)
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(BadCheckpoint, match="is not a regular file"):
        read(folder)


def test_mutations_end_in_a_typed_error_or_a_whole_adapter(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    raw, text = weights.read_bytes(), config.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(5)
    refused = 0
    for i in range(600):
        path, good, end = (weights, raw, header) if i % 2 else (config, text, len(text))
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(end)] = rng.integers(256)
        path.write_bytes(bad)
        try:
            adapter = read(folder)
        except EdgeError as error:
            refused += 1
            assert len(str(error)) < 2000
        else:
            for tensor, update in adapter.items():
                spec = PROGRAM.tensors[tensor]
                assert update.a.shape[1] == spec.cols and update.b.shape[0] == spec.rows
                assert update.a.shape[0] == update.b.shape[1] and math.isfinite(update.scale)
                assert np.isfinite(update.a).all() and np.isfinite(update.b).all()
        path.write_bytes(good)
    assert refused > 400
    json.loads(text)
