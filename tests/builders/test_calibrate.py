"""Calibration against plain numpy over what transformers' own layers read; repeatable, and refused when it is
of something else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_folders import write_model

from builders.corpus import Corpus, CorpusOptions, make_corpus
from builders.parts import Checkpoint, Extras, open_contents

torch = pytest.importorskip("torch")

from builders.calibrate import CalibrationOptions, calibrate  # noqa: E402
from builders.calibration import Calibration  # noqa: E402
from builders.moments import sample_tokens  # noqa: E402

GROUPS = (  # transformers' module -> our tensors that read the same
    ("self_attn.q_proj", ("q", "k", "v")),
    ("self_attn.o_proj", ("o",)),
    ("mlp.gate_proj", ("gate", "up")),
    ("mlp.down_proj", ("down",)),
)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_contents(write_model(tmp_path / "toy"), Extras(), None) as contents:
        yield contents.target


def random_corpus(samples: int = 6, length: int = 24, seed: int = 0) -> Corpus:
    ids = np.random.default_rng(seed).integers(3, 250, (samples, length)).astype(np.int32)
    return Corpus("noise", ids)


def run(checkpoint: Checkpoint, corpus: Corpus, folder: Path, **options: object) -> Calibration:
    found = CalibrationOptions(**options)  # type: ignore[arg-type]
    return calibrate(checkpoint.weights, corpus, folder, digests=checkpoint.source.sha256(), options=found)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def test_statistics_are_those_of_what_transformers_reads(real_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with open_contents(real_model, Extras(), None) as contents:
        corpus = make_corpus(contents.target, "builtin", CorpusOptions(samples=5, length=100))
        assert corpus.windows.shape == (5, 100)
        calibration = run(contents.target, corpus, tmp_path / "c")
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    seen: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].detach().double().numpy())
            )
    with torch.no_grad():
        model(torch.from_numpy(corpus.windows).long())
    pairs = [
        (f"model.layers.{i}.{theirs}", f"layers.{i}.{mine}")
        for i in range(model.config.num_hidden_layers)
        for theirs, tensors in GROUPS
        for mine in tensors
    ]
    positions = sample_tokens(500, 1)
    assert len(positions) == 256 and np.all(np.diff(positions) > 0)
    head = contents.target.program.ops[-1].weight  # type: ignore[union-attr]
    for theirs, mine in [*pairs, ("lm_head", head)]:
        x = seen[theirs].reshape(500, -1)
        got = calibration.statistics(mine)
        assert got is not None and got.count == 500
        want = x.T @ x / 500
        assert np.abs(got.hessian - want).max() <= 1e-5 * np.abs(want).max(), mine
        assert np.array_equal(got.hessian, got.hessian.T)
        np.testing.assert_allclose(got.absmax, np.abs(x).max(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.mean_abs, np.abs(x).mean(0), rtol=1e-4, atol=1e-6)
        assert got.rows.shape == (256, x.shape[1])
        np.testing.assert_allclose(got.rows, x[positions], rtol=2e-3, atol=1e-3)  # f16
    assert calibration.statistics("embed") is not None or head != "embed"
    assert calibration.statistics("layers.0.attn_norm") is None
    assert calibration.tokens == 500 and calibration.text == "builtin-calibration-english-1"
    calibration.close()


def test_the_same_bytes_for_any_number_of_cores_and_any_memory(toy: Checkpoint, tmp_path: Path) -> None:
    corpus = random_corpus()
    digests = set()
    for i, options in enumerate(({"cores": 1}, {"cores": 3}, {"memory": 0}, {"memory": 0, "cores": 2})):
        with run(toy, corpus, tmp_path / str(i), **options) as calibration:
            digests.add(calibration.sha256)
        assert files(tmp_path / str(i)) == files(tmp_path / "0")
    assert len(digests) == 1
    assert not list((tmp_path / "0").glob("rows-*"))
    with run(toy, corpus, tmp_path / "other", seed=2) as calibration:
        assert calibration.sha256 not in digests  # other sampled rows
