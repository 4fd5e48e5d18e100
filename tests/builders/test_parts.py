"""Draft, Medusa heads and adapters beside a model: what is planned, written, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hf_folders import byte_tokenizer, llama_config, llama_shapes, write_model
from peft_folders import lora_config, random_weights, write_peft
from safetensors.numpy import load_file, save_file

from builders.cli import main
from builders.parts import Extras
from builders.pipeline import Options, Report, build
from builders.planner import PLAN_THREADS, Request
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.cli import inspect
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.memory import adapter_nbytes, part_nbytes
from edge_runtime.errors import BadCheckpoint, BadConfig, EdgeError

Captured = pytest.CaptureFixture[str]
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}


def write_heads(folder: Path, *, count: int = 2, hidden: int = 32, vocab: int = 300, seed: int = 4) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for k in range(1, count + 1):
        for key, shape in (
            ("proj.weight", (hidden, hidden)),
            ("proj.bias", (hidden,)),
            ("head.weight", (vocab, hidden)),
        ):
            tensors[f"heads.{k}.{key}"] = rng.normal(0, 0.2, shape).astype(np.float16)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "heads": count,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "base": "toy",
        "base_sha256": {"model.safetensors": "ab" * 32},
    }
    (folder / "medusa_config.json").write_text(json.dumps(config))
    return folder


def write_lora(folder: Path, config: dict[str, Any], *, rank: int = 4, seed: int = 0) -> Path:
    shapes = {k.removesuffix(".weight"): s for k, s in llama_shapes(config).items() if len(s) == 2}
    ranks = {m: rank for m in shapes if m.endswith(("q_proj", "down_proj"))}
    said = lora_config(target_modules=["q_proj", "down_proj"], r=rank)
    return write_peft(folder, said, random_weights(shapes, ranks, seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("parts")
    return {
        "model": write_model(top / "toy"),
        "draft": write_model(top / "small", llama_config(**SMALL), seed=1),
        "medusa": write_heads(top / "heads"),
        "tidy": write_lora(top / "tidy", llama_config()),
        "carry": write_lora(top / "carry", llama_config(), rank=8, seed=1),
    }


def extras(folders: dict[str, Path]) -> Extras:
    adapters = {name: folders[name] for name in ("tidy", "carry")}
    return Extras(draft=folders["draft"], medusa=folders["medusa"], adapters=adapters)


def run(folders: dict[str, Path], target: Path, **changes: Any) -> Report:
    request = Request(weights=changes.pop("weights", "int8_row"), **changes.pop("request", {}))
    beside = changes.pop("extras", extras(folders))
    made = Options(folders["model"], target, "cpu", request, beside, text_tokens=64, measure=False, **changes)
    return build(made)


def test_everything_is_in_the_file_in_its_own_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run(folders, tmp_path / "m.edge", weights="f32")
    assert list(done.manifest.parts) == ["language", "draft", "medusa-1", "medusa-2"]
    with read_engine(tmp_path / "m.edge") as engine:
        for name, folder in (("language", "model"), ("draft", "draft")):
            want = load_file(folders[folder] / "model.safetensors")
            got = [decode(t) for t in engine.part(name).weights.values()]
            for key, value in want.items():
                same = (g for g in got if g.size == value.size)
                assert any(np.array_equal(g.reshape(value.shape), value) for g in same), key
        heads = load_file(folders["medusa"] / "model.safetensors")
        for k in (1, 2):
            weights = engine.part(f"medusa-{k}").weights
            for tensor, key in (("proj", "proj.weight"), ("proj_bias", "proj.bias"), ("head", "head.weight")):
                want_rows = heads[f"heads.{k}.{key}"].astype(np.float32)
                np.testing.assert_array_equal(decode(weights[tensor]).reshape(want_rows.shape), want_rows)
        for name, rank in (("tidy", 4), ("carry", 8)):
            tensors = load_file(folders[name] / "adapter_model.safetensors")
            adapter = engine.adapter(name)
            assert set(adapter) == {f"layers.{i}.{m}" for i in (0, 1) for m in ("q", "down")}
            update, key = adapter["layers.1.q"], "base_model.model.model.layers.1.self_attn.q_proj.lora"
            assert (update.rank, update.scale) == (rank, 16 / rank)
            np.testing.assert_array_equal(update.a, tensors[f"{key}_A.weight"])
            np.testing.assert_array_equal(update.b, tensors[f"{key}_B.weight"])
        origins = engine.part("language").origins
        assert origins["layers.1.down"].key == "model.layers.1.mlp.down_proj"


def test_the_plan_counts_every_part_as_it_will_be_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    manifest = run(folders, tmp_path / "m.edge").manifest
    language = manifest.parts["language"].plan
    beside = 0
    for name in ("draft", "medusa-1", "medusa-2"):
        program, plan = manifest.parts[name].program, manifest.parts[name].plan
        need = part_nbytes(program, plan.tensors, plan.kv, plan.step, threads=PLAN_THREADS)
        assert plan.memory.need == need
        assert plan.step.sequences == plan.step.logits == language.step.sequences
        beside += need
    assert language.memory.draft == beside
    draft = manifest.parts["draft"].plan
    assert (draft.kv, draft.step.tokens) == (language.kv, language.step.tokens)
    ranks = [{t: u.rank for t, u in a.targets.items()} for a in manifest.adapters.values()]
    program = manifest.parts["language"].program
    assert language.memory.adapters == sum(adapter_nbytes(program, language.step, r) for r in ranks)


@pytest.mark.parametrize(
    ("which", "request_changes", "logits"),
    [
        ((), {}, 4),
        (("draft",), {}, 4 * 9),
        (("draft",), {"draft_length": 0}, 4),
        (("draft",), {"draft_length": 40}, 128),  # a step has no more rows than tokens
        ((), {"draft_length": 3}, 4 * 4),  # look-up needs no part
        (("medusa",), {"sequences": 2}, 2 * 32),
        (("medusa",), {"sequences": 2, "draft_length": 0}, 2),
        (("draft", "medusa"), {"sequences": 1, "draft_length": 50}, 51),
    ],
)
def test_a_step_can_hold_the_verification(
    folders: dict[str, Path],
    tmp_path: Path,
    which: tuple[str, ...],
    request_changes: dict[str, int],
    logits: int,
) -> None:
    beside = Extras(**{name: folders[name] for name in which})
    done = run(folders, tmp_path / "m.edge", extras=beside, request=request_changes)
    assert done.manifest.parts["language"].plan.step.logits == logits


def test_a_draft_may_have_formats_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    request = {"draft_weights": "f16", "draft_kv": ("f16", "int4"), "kv_k": "int8", "kv_v": "int8"}
    done = run(folders, tmp_path / "m.edge", request=request, weights="int4_g32")
    formats = {
        name: {t.format for n, t in part.plan.tensors.items() if part.program.tensors[n].role == "matrix"}
        for name, part in done.manifest.parts.items()
    }
    four = {"int4_g32"}
    assert formats == {"language": four, "draft": {"f16"}, "medusa-1": four, "medusa-2": four}
    kv = done.manifest.parts["draft"].plan.kv
    assert (kv.k, kv.v, kv.pages) == ("f16", "int4", done.manifest.parts["language"].plan.kv.pages)


def test_companions_change_nothing_of_the_language_part(folders: dict[str, Path], tmp_path: Path) -> None:
    alone = run(folders, tmp_path / "alone.edge", extras=Extras()).manifest
    full = run(folders, tmp_path / "full.edge").manifest
    assert {n: d for n, d in full.planes.items() if n in alone.planes} == alone.planes
    assert full.known_answer == alone.known_answer


def test_the_same_inputs_give_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        run(folders, tmp_path / place / "m.edge")
    assert (tmp_path / "a" / "m.edge").read_bytes() == (tmp_path / "b" / "m.edge").read_bytes()


def test_provenance_names_the_files_of_all_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    found = run(folders, tmp_path / "m.edge").manifest.provenance.source_sha256
    assert {n.split("/")[0] for n in found if "/" in n} == {"draft", "medusa", "lora.tidy", "lora.carry"}
    assert {"draft/model.safetensors", "medusa/medusa_config.json", "lora.tidy/adapter_config.json"} <= set(
        found
    )
    assert str(tmp_path).encode() not in (tmp_path / "m.edge").read_bytes()


def test_heads_of_another_base_are_worth_a_word(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run(folders, tmp_path / "m.edge")
    assert any("trained on other weights" in notice for notice in done.notices)


# --- what does not go together -----------------------------------------------------------------------------


def refused(
    folders: dict[str, Path], tmp_path: Path, kind: type[EdgeError], words: str, **which: Any
) -> None:
    with pytest.raises(kind, match=words):
        run(folders, tmp_path / "m.edge", extras=Extras(**which))
    assert not list(tmp_path.glob("*.edge")) and not list(tmp_path.glob(".*"))


def test_a_draft_must_have_the_same_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", llama_config(**SMALL, vocab_size=299))
    refused(
        folders, tmp_path, BadCheckpoint, "'other' and 'toy' have vocabularies of 299 and 300", draft=other
    )
    swapped = write_model(tmp_path / "swapped", llama_config(**SMALL))
    tokenizer = byte_tokenizer()
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = "draft 'swapped': 'swapped' and 'toy' differ in 2 tokens, such as id 100: 'b' and 'a'"
    refused(folders, tmp_path, BadCheckpoint, words, draft=swapped)
    ends = write_model(tmp_path / "ends", llama_config(**SMALL, eos_token_id=5))
    refused(folders, tmp_path, BadCheckpoint, r"'ends' and 'toy' end a text with ids \[5\]", draft=ends)


def test_an_equal_vocabulary_in_other_bytes_will_do(folders: dict[str, Path], tmp_path: Path) -> None:
    draft = write_model(tmp_path / "spaced", llama_config(**SMALL))
    (draft / "tokenizer.json").write_text(json.dumps(byte_tokenizer(), indent=2))
    done = run(folders, tmp_path / "m.edge", extras=Extras(draft=draft))
    assert "draft" in done.manifest.parts


def test_a_draft_must_reach_as_far(folders: dict[str, Path], tmp_path: Path) -> None:
    short = write_model(tmp_path / "short", llama_config(**SMALL, max_position_embeddings=64))
    refused(folders, tmp_path, BadConfig, "draft 'short': a context of 128 tokens is planned", draft=short)


def test_heads_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    narrow = write_heads(tmp_path / "narrow", hidden=16)
    refused(folders, tmp_path, BadConfig, "trained on another model: it takes rows of 16", medusa=narrow)
    words = "the medusa-1 has a vocabulary of 200 tokens, the model 300"
    refused(folders, tmp_path, BadConfig, words, medusa=write_heads(tmp_path / "words", vocab=200))
    folder = write_heads(tmp_path / "heads")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "medusa_config.json").read_text())
    for change, kind, words in (
        ({"heads": 3}, BadCheckpoint, r"lacks tensor 'heads\.3\.proj\.weight'"),
        ({"heads": 1}, BadCheckpoint, r"holds 'heads\.2\.head\.weight', of which"),
        ({"heads": 17}, BadConfig, "medusa_config.json of 'heads'"),
        ({"hidden_size": 33}, BadCheckpoint, r"'heads\.1\.proj\.weight' has shape \(32, 32\)"),
        ({"extra": 1}, BadConfig, "unknown field `extra`"),
    ):
        (folder / "medusa_config.json").write_text(json.dumps(config | change))
        refused(folders, tmp_path, kind, words, medusa=folder)
    (folder / "medusa_config.json").unlink()
    refused(folders, tmp_path, BadCheckpoint, "has no medusa_config.json", medusa=folder)
    (folder / "medusa_config.json").write_text(json.dumps(config))
    tensors["heads.1.head.weight"][5, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    words = "tensor 'head' of medusa-1: .*NaN or Inf"
    refused(folders, tmp_path, EdgeError, words, medusa=folder)


def test_adapters_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", llama_config(hidden_size=64))
    words = r"adapter 'wide': .* has shape \(64, 4\)"
    refused(folders, tmp_path, BadCheckpoint, words, adapters={"wide": wide})
    words = "--lora 'a b': a name has 1 to 64 letters"
    refused(folders, tmp_path, BadConfig, words, adapters={"a b": folders["tidy"]})


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_builds_and_shows_all_of_it(
    folders: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    target = tmp_path / "m.edge"
    words = ["--profile", "cpu", "--no-eval", "-o", str(target), "--draft", str(folders["draft"])]
    words += ["--medusa", str(folders["medusa"]), "--lora", f"tidy={folders['tidy']}", "--draft-length", "5"]
    assert main([*words, str(folders["model"])]) == 0
    out = capsys.readouterr().out
    for word in ("draft ", "medusa-1", "medusa-2", "adapter ", "tidy, 4 tensors"):
        assert word in out
    assert inspect.main([str(target)]) == 0
    out = capsys.readouterr().out
    for word in (
        "language",
        "draft",
        "medusa-2",
        "tidy",
        "plan of draft",
        "lora=tidy=tidy",
        "draft-length=5",
    ):
        assert word in out
    assert inspect.main([str(target), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["parts"]) == ["language", "draft", "medusa-1", "medusa-2"]
    assert data["adapters"]["tidy"]["tensors"] == 4


def test_a_dry_run_plans_them_from_configs_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    (tmp_path / "medusa_config.json").write_bytes((folders["medusa"] / "medusa_config.json").read_bytes())
    words = ["--dry-run", "--profile", "cpu", "--draft", str(tmp_path / "draft" / "config.json"), "--weights"]
    words += [
        "int8_row",
        "--medusa",
        str(tmp_path / "medusa_config.json"),
        "--lora",
        f"tidy={folders['tidy']}",
    ]
    assert main([*words, "--json", str(tmp_path / "model")]) == 0
    data = json.loads(capsys.readouterr().out)
    beside = Extras(folders["draft"], folders["medusa"], {"tidy": folders["tidy"]})
    built = run(folders, tmp_path / "m.edge", extras=beside).manifest.parts
    assert data["memory"]["draft"] == sum(data["companions"].values()) == built["language"].plan.memory.draft
    assert data["memory"] == {
        **msgspec.to_builtins(built["language"].plan.memory),
        "need": built["language"].plan.memory.need,
        "have": built["language"].plan.memory.have,
    }
    assert main([*words, str(tmp_path / "model")]) == 0
    assert "speculation: draft, medusa-1, medusa-2; up to 8 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora", "tidy"], "--lora 'tidy': expected NAME=FOLDER"),
        (["--lora", "=x"], "expected NAME=FOLDER"),
        (["--lora", "a=x", "--lora", "a=y"], "--lora 'a' is given twice"),
        (["--draft-weights", "f16"], "--draft-weights and --draft-kv need --draft"),
        (["--draft-kv", "f16"], "need --draft"),
        (["--draft-length", "65"], "--draft-length is 65, expected 0 to 64"),
        (["--draft", "nowhere"], "draft 'nowhere': nowhere is not a folder"),
        (["--medusa", "nowhere"], "has no medusa_config.json"),
        (["--lora", "a=nowhere"], "adapter 'a': "),
        (["--draft", "DRAFT", "--draft-weights", "int4_g46"], "did you mean 'int4_g64'"),
        (["--draft", "DRAFT", "--draft-kv", "int9"], "unknown KV format 'int9'"),
        (["--prefix", "nowhere.txt"], "prefix: cannot read nowhere.txt"),
    ],
)
def test_mistakes_are_named(
    argv: list[str],
    words: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [str(folders["draft"]) if a == "DRAFT" else a for a in argv]
    assert main(["--profile", "cpu", *line, str(folders["model"])]) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
