"""Sensitivities against brute force: the whole model run once for every changed tensor by the numpy
reference, and traces by their definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, write_model

from builders.corpus import BUILTIN, SELF, Corpus, CorpusOptions, make_corpus
from builders.parts import Checkpoint, Extras, open_contents
from builders.sensitivity import Sensitivity, read_sensitivity
from builders.vocabulary_blocks import levelled, vocabularies
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.ops import Embed
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import BadConfig

torch = pytest.importorskip("torch")

from builders.calibrate import calibrate  # noqa: E402
from builders.calibration import Calibration  # noqa: E402
from builders.measure_sensitivity import (  # noqa: E402
    SensitivityOptions,
    lane_flops,
    measure_sensitivity,
    scaled,
    spread,
)

FORMATS = ("int4_g32", "int8_row", "fp8_e4m3_tensor")


@pytest.fixture(params=["tied", "untied", "tied blocks", "untied blocks"])
def toy(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Checkpoint]:
    tied = not request.param.startswith("untied")
    folder = write_model(tmp_path / "toy", llama_config(tie_word_embeddings=tied))
    with open_contents(folder, Extras(), None, blocks="blocks" in request.param) as contents:
        yield contents.target


def noise(samples: int = 3, length: int = 16) -> Corpus:
    ids = np.random.default_rng(0).integers(3, 250, (samples, length)).astype(np.int32)
    return Corpus("noise", ids)


def calibrated(checkpoint: Checkpoint, corpus: Corpus, folder: Path) -> Calibration:
    return calibrate(checkpoint.weights, corpus, folder, digests=checkpoint.source.sha256())


def logits(checkpoint: Checkpoint, windows: np.ndarray, changed: dict[str, np.ndarray]) -> np.ndarray:
    """f64 log-probabilities (tokens, vocabulary) by the numpy reference."""
    batch, length = windows.shape
    pages = -(-length // 16)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=batch * pages)
    step = StepShape(context=length, sequences=batch, tokens=batch * length, logits=batch * length)

    class Changed:
        program = checkpoint.program

        def __call__(self, name: str) -> np.ndarray:
            return changed[name] if name in changed else checkpoint.weights(name)

        def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
            return self(name)[ids]

    executor = ReferenceExecutor(checkpoint.program, Changed(), kv, step)
    found = executor.forward(
        StepBatch(
            tokens=windows.reshape(-1),
            positions=np.tile(np.arange(length, dtype=np.int32), batch),
            sequence=np.repeat(np.arange(batch, dtype=np.int32), length),
            page_tables=np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
            logit_rows=np.arange(batch * length, dtype=np.int32),
        )
    ).astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    return found - np.log(np.exp(found).sum(axis=1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def rounded(checkpoint: Checkpoint, name: str, fmt: str) -> np.ndarray:
    from builders.quantize import AlgorithmOptions, get_algorithm

    w, codec = checkpoint.weights(name), get_format(fmt)
    return codec.decode(get_algorithm("rtn").quantize(w, codec, None, AlgorithmOptions()), *w.shape)


def test_kl_is_that_of_the_whole_model_run_with_one_tensor_changed(toy: Checkpoint, tmp_path: Path) -> None:
    corpus = noise()
    with calibrated(toy, corpus, tmp_path / "c") as calibration:
        found = measure_sensitivity(
            toy.weights, calibration, corpus, FORMATS, SensitivityOptions(unit="kl", cores=2)
        )
        # lanes that do not fit wait for the next pass, and their figures are the same
        few = SensitivityOptions(unit="kl", cores=1, memory=1)
        assert measure_sensitivity(toy.weights, calibration, corpus, FORMATS, few) == found
    assert found.unit == "kl" and found.tokens == 48 and found.text == "noise" and found.measured == FORMATS
    want = logits(toy, corpus.windows, {})
    matrices = [n for n, spec in toy.program.tensors.items() if spec.role != "vector"]
    assert sorted(found.losses) == sorted(matrices)
    brute = {}
    for name in matrices:
        assert tuple(found.losses[name]) == FORMATS
        changed = {fmt: logits(toy, corpus.windows, {name: rounded(toy, name, fmt)}) for fmt in FORMATS}
        brute[name] = {fmt: divergence(want, got) for fmt, got in changed.items()}
    for name, losses in levelled(brute, toy.program).items():
        assert found.losses[name] == pytest.approx(losses, rel=2e-3, abs=2e-8), name


def test_hessian_losses_are_the_relative_traces(toy: Checkpoint, tmp_path: Path) -> None:
    corpus = noise()
    with calibrated(toy, corpus, tmp_path / "c") as calibration:
        found = measure_sensitivity(
            toy.weights, calibration, corpus, FORMATS, SensitivityOptions(unit="hessian")
        )
        assert found.unit == "hessian" and found.tokens == 48 and not found.measured
        want: dict[str, dict[str, float]] = {}
        blocks = {name: first for of in vocabularies(toy.program) for name, first in of.items()}
        for name in found.losses:
            w = toy.weights(name).astype(np.float64)
            inputs = calibration.statistics(name)
            ids = corpus.windows.reshape(-1) - blocks.get(name, 0)
            ids = ids[(ids >= 0) & (ids < len(w))]
            want[name] = {}
            for fmt in FORMATS:
                e = rounded(toy, name, fmt) - w
                share = 0.0
                if inputs is not None:
                    h = inputs.hessian.astype(np.float64)
                    share += np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T)
                if name.startswith("embed") and len(ids):
                    share += np.square(e[ids]).sum() / np.square(w[ids]).sum()
                want[name][fmt] = share * (len(ids) / corpus.windows.size if name in blocks else 1.0)
        for name, losses in levelled(want, toy.program).items():
            assert found.losses[name] == pytest.approx(losses, rel=1e-4), name
        heads = {op.weight for op in toy.program.heads}
        embedding = next(op.weight for op in toy.program.ops if isinstance(op, Embed))
        assert (calibration.statistics(embedding) is not None) == (embedding in heads)


def test_kl_is_quadratic_in_a_small_change_so_errors_scale_it(real_model: Path, tmp_path: Path) -> None:
    """Formats from 3 to 8 bits that are not run: 8 of 10 tensors within a factor of two of what running them
    gives, half of all within 20%, and their sum within 25%."""
    with open_contents(real_model, Extras(), None) as contents:
        target = contents.target
        corpus = make_corpus(target, SELF, CorpusOptions(samples=4, length=64))
        formats = ["int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_row"]
        with calibrated(target, corpus, tmp_path / "c") as calibration:
            run = measure_sensitivity(
                target.weights, calibration, corpus, formats, SensitivityOptions(unit="kl", tokens=256)
            )
            errors = measure_sensitivity(
                target.weights, calibration, corpus, formats, SensitivityOptions(unit="hessian")
            )
    for fmt in ("int3_g64", "int4_g64", "int6_g64", "int8_row"):
        pairs = [
            (scaled(fmt, errors.losses[name], {"int5_g64": losses["int5_g64"]}), losses[fmt])
            for name, losses in run.losses.items()
        ]
        ratios = np.array([a / b for a, b in pairs])
        assert 0.8 < np.median(ratios) < 1.25, fmt
        assert np.quantile(ratios, 0.1) > 0.5 and np.quantile(ratios, 0.9) < 2.0, fmt
        assert sum(a for a, _ in pairs) == pytest.approx(sum(b for _, b in pairs), rel=0.25), fmt


def test_losses_add_up_over_tensors(real_model: Path, tmp_path: Path) -> None:
    """What the planner takes for granted, where all tensors are rounded at once."""
    with open_contents(real_model, Extras(), None) as contents:
        target = contents.target
        corpus = make_corpus(target, SELF, CorpusOptions(samples=4, length=64))
        with calibrated(target, corpus, tmp_path / "c") as calibration:
            found = measure_sensitivity(
                target.weights, calibration, corpus, ["int4_g64"], SensitivityOptions(unit="kl", tokens=256)
            )
        changed = {name: rounded(target, name, "int4_g64") for name in found.losses}
        want = divergence(logits(target, corpus.windows, {}), logits(target, corpus.windows, changed))
    assert sum(losses["int4_g64"] for losses in found.losses.values()) == pytest.approx(want, rel=0.25)


def test_a_killed_measurement_asks_for_no_figure_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, journal = noise(), tmp_path / "notes.jsonl"
    with open_contents(write_model(tmp_path / "toy"), Extras(), None) as contents:
        toy = contents.target
        with calibrated(toy, corpus, tmp_path / "c") as calibration:
            options = SensitivityOptions(unit="kl", memory=1)

            def measure(path: Path | None) -> Sensitivity:
                return measure_sensitivity(toy.weights, calibration, corpus, FORMATS, options, journal=path)

            want = measure(None)
            seen = _count_lanes(monkeypatch, stop=8)
            with pytest.raises(KeyboardInterrupt):
                measure(journal)
            lines = journal.read_text().splitlines()
            assert sum('"kl"' in line for line in lines) == 8
            journal.write_text("\n".join(lines) + '\n["kl", "layers.1.q", "int4')  # the last line was cut
            monkeypatch.undo()
            seen = _count_lanes(monkeypatch)
            assert measure(journal) == want
            assert len(seen) == len(want.losses) * len(FORMATS) - 8
            seen.clear()
            assert measure(journal) == want and not seen
            journal.write_text(
                json.dumps({"calibration": "of something else"}) + '\n["kl","embed","int8_row",9.0]\n'
            )
            assert measure(journal) == want


def _count_lanes(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    from builders.lanes import LaneRunner

    seen: list[str] = []
    measure = LaneRunner.measure

    def counted(self, lanes):
        for lane, kl in measure(self, lanes):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(lane.tensor)
            yield lane, kl

    monkeypatch.setattr(LaneRunner, "measure", counted)
    return seen


def test_few_formats_are_run_where_the_budget_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ("int8_row", "int3_g32", "int4_g32", "int6_g32", "f32")
    corpus = noise()
    with open_contents(write_model(tmp_path / "toy"), Extras(), None) as contents:
        toy = contents.target
        with calibrated(toy, corpus, tmp_path / "c") as calibration:
            options = SensitivityOptions(unit="kl")
            whole = measure_sensitivity(toy.weights, calibration, corpus, formats, options)
            budget = 2.5 * 48 * sum(lane_flops(toy.program).values())
            monkeypatch.setattr("builders.measure_sensitivity.KL_FLOPS", budget)
            few = measure_sensitivity(toy.weights, calibration, corpus, formats, options)
            auto = measure_sensitivity(toy.weights, calibration, corpus, formats)
            assert auto.unit == "hessian"  # 256 tokens of even one format cost more than that
    assert len(few.measured) == 2 and "f32" not in few.measured
    for name, losses in few.losses.items():
        for fmt in few.measured:
            assert losses[fmt] == whole.losses[name][fmt]
        assert losses["f32"] == 0.0
        assert losses["int3_g32"] > losses["int4_g32"] > losses["int6_g32"] > losses["int8_row"] > 0.0


def test_formats_are_spread_over_the_errors() -> None:
    errors = {
        "a": {"w": 1.0, "x": 0.1, "y": 0.01, "z": 0.001},
        "b": {"w": 2.0, "x": 0.2, "y": 0.02, "z": 0.002},
    }
    assert spread(errors, "wxyz", 4) == list("wxyz")
    assert spread(errors, "wxyz", 1) in (["x"], ["y"])
    assert len(spread(errors, "wxyz", 2)) == 2
    assert spread({"a": {"w": 1.0, "f32": 0.0}}, ["w", "f32"], 1) == ["w"]


def test_a_format_that_cannot_hold_a_tensor_is_left_out(tmp_path: Path) -> None:
    corpus = noise()
    with open_contents(write_model(tmp_path / "toy"), Extras(), None) as contents:
        toy = contents.target
        block = toy.weights.block
        large = "layers.1.down"
        toy.weights.block = lambda *a: block(*a) * (1e30 if a[0] == large else 1)  # type: ignore[method-assign]
        with calibrated(toy, corpus, tmp_path / "c") as calibration:
            found = measure_sensitivity(
                toy.weights, calibration, corpus, ["f16", "f32"], SensitivityOptions(unit="hessian")
            )
    assert set(found.losses["layers.1.down"]) == {"f32"}
    assert set(found.losses["layers.0.down"]) == {"f16", "f32"}


def test_what_is_written_is_read_again(toy: Checkpoint, tmp_path: Path) -> None:
    corpus = make_corpus(toy, BUILTIN, CorpusOptions(samples=2, length=16))
    with calibrated(toy, corpus, tmp_path / "c") as calibration:
        found = measure_sensitivity(toy.weights, calibration, corpus, ["int4_g32"])
        for formats, unit, message in (
            ([], None, "no formats to measure"),
            (["int4_g33"], None, "unknown format 'int4_g33'; did you mean"),
            (["int4_g32"], "fisher", "--sensitivity 'fisher': expected kl or hessian"),
        ):
            with pytest.raises(BadConfig, match=message):
                measure_sensitivity(toy.weights, calibration, corpus, formats, SensitivityOptions(unit=unit))
    assert found.unit == "kl"
    found.save(tmp_path / "s.json")
    assert read_sensitivity(tmp_path / "s.json") == found


def test_losses_of_other_weights_are_refused(tmp_path: Path) -> None:
    """A fine-tune has the same tensors, and other losses."""
    digests = []
    for seed, shards in ((0, 1), (1, 1), (0, 2)):
        folder = write_model(tmp_path / f"{seed}-{shards}", seed=seed, shards=shards)
        with open_contents(folder, Extras(), None) as contents:
            digests.append(contents.target.source.sha256())
    plain = Sensitivity(unit="kl", algorithm="rtn", text="t", tokens=1, losses={"layers.0.q": {"f16": 0.0}})
    plain.of_model(digests[0]).save(tmp_path / "s.json")
    found = read_sensitivity(tmp_path / "s.json")
    found.check_model(digests[0])
    found.check_model({name: sha for name, sha in digests[0].items() if name != "tokenizer.json"})
    for other in digests[1:]:
        with pytest.raises(BadConfig, match=r"on other weights than this model's; measure it again"):
            found.check_model(other)
    old = json.loads((tmp_path / "s.json").read_text())
    del old["model_sha256"]  # as files of earlier versions are
    (tmp_path / "s.json").write_text(json.dumps(old))
    read_sensitivity(tmp_path / "s.json").check_model(digests[1])


def test_an_algorithm_that_knows_the_inputs_loses_less(real_model: Path, tmp_path: Path) -> None:
    with open_contents(real_model, Extras(), None) as contents:
        target = contents.target
        corpus = make_corpus(target, SELF, CorpusOptions(samples=8, length=128))
        with calibrated(target, corpus, tmp_path / "c") as calibration:
            sums = {}
            for unit in ("kl", "hessian"):
                for algorithm in ("rtn", "gptq"):
                    options = SensitivityOptions(unit=unit, algorithm=algorithm, tokens=512)
                    found = measure_sensitivity(target.weights, calibration, corpus, ["int3_g64"], options)
                    assert found.algorithm == algorithm
                    sums[unit, algorithm] = sum(losses["int3_g64"] for losses in found.losses.values())
    assert sums["kl", "gptq"] < 0.9 * sums["kl", "rtn"]
    assert sums["hessian", "gptq"] < 0.9 * sums["hessian", "rtn"]
