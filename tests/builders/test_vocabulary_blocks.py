"""The vocabulary in blocks: the same model, calibrated the same, with losses and formats of its own each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hf_folders import llama_config, write_model

from builders import vocabulary_blocks
from builders.archs import read_program
from builders.cli import main as edge_build
from builders.corpus import Corpus
from builders.losses import losses_of
from builders.parts import Checkpoint, Extras, open_contents
from builders.planner import Request
from builders.sensitivity import Sensitivity
from builders.vocabulary_blocks import (
    UNSEEN,
    bounds,
    cut_rows,
    for_program,
    in_blocks,
    join_rows,
    joined,
    levelled,
    vocabularies,
)
from edge_runtime import open_engine
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.formats.trellis import RUN
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.errors import BadConfig

torch = pytest.importorskip("torch")

from arch_cases import find, json_of  # noqa: E402
from made_weights import MadeWeights, logits_of, made_weights  # noqa: E402

from builders.calibrate import calibrate  # noqa: E402
from builders.row_importance import kept_row_importance, row_importance  # noqa: E402
from builders.segments import cut  # noqa: E402
from builders.torch_program import TorchProgram  # noqa: E402

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS = np.random.default_rng(0).integers(0, 300, (6, 16)).astype(np.int32)


@pytest.fixture
def folder(tmp_path: Path, tied: bool) -> Path:
    return write_model(tmp_path / "toy", llama_config(tie_word_embeddings=tied))


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """The model as it is, and in blocks."""
    with (
        open_contents(folder, Extras(), None) as whole,
        open_contents(folder, Extras(), None, blocks=True) as blocks,
    ):
        yield whole.target, blocks.target


@pytest.mark.parametrize("size", [1, RUN, RUN + 1, 300, 32_000, 151_936])
def test_blocks_double_and_are_whole_circles(size: int) -> None:
    found = bounds(size)
    assert found[0][0] == 0 and found[-1][1] == size
    assert all(end == first for (_, end), (first, _) in pairwise(found))
    assert all(first % RUN == 0 for first, _ in found)
    assert all(end - first == first for first, end in found[1:-1]) and len(found) <= 12
    assert bounds(300) == [(0, 128), (128, 256), (256, 300)]


@TIED
def test_it_is_the_same_model(pair: tuple[Checkpoint, Checkpoint]) -> None:
    whole, blocks = pair
    names = ["embed"] if whole.program.heads[0].weight == "embed" else ["embed", "head"]
    want = [{f"{name}.{first}": first for first in (0, 128, 256)} for name in names]
    assert vocabularies(blocks.program) == want and vocabularies(whole.program) == []
    assert joined(blocks.program) == whole.program == joined(whole.program)
    assert msgspec.json.encode(joined(blocks.program)) == msgspec.json.encode(whole.program)
    assert in_blocks(blocks.architecture) is blocks.architecture
    for name in names:
        rows = np.concatenate([blocks.weights(f"{name}.{first}") for first in (0, 128, 256)])
        assert np.array_equal(rows, whole.weights(name))
    exact = logits_of(whole.weights, IDS)
    assert np.abs(logits_of(blocks.weights, IDS) - exact).max() <= 1e-5 * np.abs(exact).max()
    held = {n: torch.from_numpy(blocks.weights(n)) for n in blocks.program.tensors}
    with torch.no_grad():
        found = TorchProgram(blocks.program, held.__getitem__)(torch.from_numpy(IDS.astype(np.int64)))
    assert np.abs(found.numpy() - exact).max() <= 1e-4 * np.abs(exact).max()
    origins = blocks.architecture.origins()
    key = "lm_head" if "head" in names else "model.embed_tokens"
    assert [(origins[f"{names[-1]}.{n}"].key, origins[f"{names[-1]}.{n}"].row) for n in (0, 128, 256)] == [
        (key, 0), (key, 128), (key, 256),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gemma2-tight-caps", "granite-multipliers", "phi3-fused", "qwen2-tied"])
def test_other_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of embedding and logits, a soft cap, fused projections: blocks of 32 ids of 97, same logits."""
    case = find(name)
    config = json_of(case)
    whole = made_weights(config, case.context)
    monkeypatch.setattr(vocabulary_blocks, "RUN", 32)
    program = in_blocks(read_program(config, context=case.context)).program
    assert [op.first for op in program.heads] == [0, 32, 64] and joined(program) == whole.program
    made = MadeWeights(program, cut_rows(whole.tensors, program))
    ids = IDS % 97
    exact = logits_of(whole, ids)
    assert np.abs(logits_of(made, ids) - exact).max() <= 1e-5 * np.abs(exact).max()


def test_what_cannot_be_cut_stays(tmp_path: Path) -> None:
    small = read_program(llama_config(vocab_size=RUN))
    assert in_blocks(small) is small
    ordered = read_program(llama_config())
    order = np.arange(32)[::-1]
    sources = ordered.sources | {"embed": replace(ordered.sources["embed"], columns=order)}
    ordered = replace(ordered, sources=sources)
    assert in_blocks(ordered) is ordered


@TIED
def test_calibrations_are_the_same(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    """One folder serves both, statistics of a head's blocks are those of the head, and row importance is."""
    whole, blocks = pair
    assert [(s.stop - s.start) for s in cut(whole.program)][1:] == [
        s.stop - s.start for s in cut(blocks.program)
    ][1:]
    corpus, digests = Corpus("noise", IDS), whole.source.sha256()
    with calibrate(whole.weights, corpus, tmp_path / "c", digests=digests) as made:
        head = whole.program.heads[0].weight
        want, sha256 = made.statistics(head), made.sha256
    with calibrate(blocks.weights, corpus, tmp_path / "c", digests=digests) as made:
        assert made.sha256 == sha256
        for op in blocks.program.heads:
            found = made.statistics(op.weight)
            assert want is not None and found is not None and np.array_equal(found.hessian, want.hessian)
    exact = row_importance(whole.weights, IDS, tmp_path / "c", "cpu")
    again = row_importance(blocks.weights, IDS, tmp_path / "c", "cpu")
    assert sorted(again) == sorted(exact)
    for name, rows in exact.items():
        assert np.allclose(again[name], rows, rtol=1e-4)
    kept = kept_row_importance(blocks.weights, IDS, tmp_path / "c", "cpu", 1)
    assert sorted(kept) == sorted(n for n, s in blocks.program.tensors.items() if s.role != "vector")
    assert np.array_equal(kept["embed.128"], again["embed"][128:256])
    of_whole = kept_row_importance(whole.weights, IDS, tmp_path / "c", "cpu", 1)  # what the blocks left
    assert np.array_equal(of_whole["embed"], again["embed"])
    assert cut_rows(join_rows(kept, blocks.program), blocks.program).keys() == kept.keys()


@TIED
def test_losses_of_other_blocks_are_taken_over(pair: tuple[Checkpoint, Checkpoint]) -> None:
    whole, blocks = pair
    losses = {n: {"int4_g64": 1.0, "int8_row": 0.1} for n, s in whole.program.tensors.items() if s.cols > 1}
    losses = {n: of for n, of in losses.items() if whole.program.tensors[n].role != "vector"}
    found = for_program(losses, blocks.program)
    assert found["embed.256"] == pytest.approx({"int4_g64": 44 / 300, "int8_row": 4.4 / 300})
    back = for_program(found, whole.program)
    assert back.keys() == losses.keys() and back["embed"] == pytest.approx(losses["embed"])
    assert for_program(losses, whole.program) == losses
    measured = Sensitivity(unit="hessian", algorithm="rtn", text="t", tokens=1, losses=losses)
    both = [losses_of(c.program, measured, ["int4_g64"]) for c in pair]
    assert both[0].tensors == both[1].tensors == len(losses)
    assert both[1].of("embed.128", "int4_g64") == pytest.approx(128 / 300)
    assert sum(losses_of(blocks.program, None, []).shares.values()) == pytest.approx(1.0)
    with pytest.raises(BadConfig, match="nonsense"):
        losses_of(blocks.program, msgspec.structs.replace(measured, losses=losses | {"nonsense": {}}), [])


@TIED
def test_rows_that_no_text_has_keep_a_share(pair: tuple[Checkpoint, Checkpoint]) -> None:
    program = pair[1].program
    losses = {
        "embed.0": {"a": 0.0},
        "embed.128": {"a": 3.0},
        "embed.256": {"a": 1.0},
        "layers.0.q": {"a": 5.0},
    }
    found = levelled(losses, program)
    assert found["layers.0.q"] == {"a": 5.0}
    assert found["embed.0"]["a"] == pytest.approx(UNSEEN * 4.0 * 128 / 300)
    assert sum(found[n]["a"] for n in losses if n.startswith("embed")) == pytest.approx(4.0)


def test_who_gets_blocks() -> None:
    assert Request(weights="auto").in_blocks
    assert not Request(weights="int4_g64").in_blocks
    assert not Request(weights="auto", head_weights="int8_row").in_blocks


@TIED
def test_a_mixed_build_spends_its_bits_where_tokens_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text has ids below 128 alone, so the blocks behind get fewer bits; the engine answers alike on both
    backends. A rotated model has no blocks."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    engine = tmp_path / "mixed.edge"
    words = f"--profile cpu --weights auto --bits 5 --calibration {tmp_path / 'text.txt'} --samples 8"
    words += (
        f" --sample-tokens 32 --algorithm gptq --formats int3_g32,int4_g32,int6_g32 --json"
        f" --eval {tmp_path / 'text.txt'} -o {engine} {folder}"
    )
    assert edge_build(words.split()) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["quality"]["bits_per_weight"] <= 5.0 + 1e-6
    with read_engine(engine) as found:
        part = found.manifest.parts[LANGUAGE]
        nbytes = {n: t.format for n, t in part.plan.tensors.items()}
        assert [op.first for op in part.program.heads] == [0, 128, 256]
    bits = {n: float(f[3]) if f[3].isdigit() else 8.0 for n, f in nbytes.items() if n.startswith("embed.")}
    assert bits["embed.0"] > max(bits["embed.128"], bits["embed.256"])
    answers = []
    for backend in ("cpu", "reference"):
        with open_engine(str(engine), backend=backend) as session:
            answers.append("".join(e.text for e in session.generate("the quick brown", max_tokens=12)))
    assert answers[0] == answers[1]
    rotated = words.replace("mixed.edge", "rotated.edge") + " --rotate"
    assert edge_build(rotated.split()) == 0
    with read_engine(tmp_path / "rotated.edge") as found:
        assert len(found.manifest.parts[LANGUAGE].program.heads) == 1
