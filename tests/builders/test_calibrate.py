"""Calibration against plain numpy over what transformers' own layers read; repeatable, and refused when it is
of something else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, write_model

from builders.calibration_folder import MANIFEST
from builders.corpus import Corpus, CorpusOptions, make_corpus
from builders.parts import Checkpoint, Extras, open_contents
from edge_runtime.errors import BadConfig, BuildError, EdgeError, Unsupported, ValueOutOfRange

torch = pytest.importorskip("torch")

from builders.calibrate import CalibrationOptions, calibrate  # noqa: E402
from builders.calibration import Calibration  # noqa: E402
from builders.measure_sensitivity import SensitivityOptions, measure_sensitivity  # noqa: E402
from builders.moments import sample_tokens  # noqa: E402
from builders.rotate import rotate  # noqa: E402

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
    head = contents.target.program.heads[0].weight
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
    assert calibration.statistics("layers.0.attention_norm") is None
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


def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy", llama_config(num_hidden_layers=1))
    words = [sys.executable, str(Path(__file__).with_name("calibrate_child.py")), str(model), str(tmp_path)]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["steps"] > 25
    assert found["files"] == ["calibration.json", "complete.json"] + [
        f"segment-{i:04d}.safetensors" for i in range(4)
    ]
    assert found["runs"] == [[-signal.SIGKILL, 0, True]] * found["steps"]


def test_a_finished_folder_is_used_again_and_computes_nothing(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = random_corpus()
    with run(toy, corpus, tmp_path / "c") as first:
        want = first.statistics("layers.1.down")
    monkeypatch.setattr("builders.calibrate.SegmentRunner", None)
    with run(toy, corpus, tmp_path / "c") as again:
        assert again.sha256 == first.sha256
        got = again.statistics("layers.1.down")
        assert want is not None and got is not None and np.array_equal(want.hessian, got.hessian)
        assert again.statistics("layers.1.gate") is again.statistics("layers.1.up")  # one group, read once
        with pytest.raises(BuildError, match="is being calibrated in by another process"):
            run(toy, corpus, tmp_path / "c")
        again.remove()
    assert not (tmp_path / "c").exists()


def test_a_folder_of_something_else_is_refused_by_name(toy: Checkpoint, tmp_path: Path) -> None:
    corpus, folder = random_corpus(), tmp_path / "c"
    run(toy, corpus, folder).close()
    twin = open_contents(write_model(tmp_path / "twin", seed=5), Extras(), None)
    different = r"another model sha256: model\.safetensors differ; give another"
    with twin as contents, pytest.raises(BadConfig, match=different):
        run(contents.target, corpus, folder)
    for other, message in (
        (Corpus("noise", corpus.windows + 1), "another text sha256"),
        (Corpus("words", corpus.windows), "another text: 'noise', and this is 'words'"),
        (random_corpus(5), "another text sha256|another samples: '6', and this is '5'"),
    ):
        with pytest.raises(BadConfig, match=message):
            run(toy, other, folder)
    with pytest.raises(BadConfig, match="another seed: '1', and this is '9'"):
        run(toy, corpus, folder, seed=9)
    with pytest.raises(BadConfig, match="another weights: '', and this is 'rotated'"):
        calibrate(toy.weights, corpus, folder, digests=toy.source.sha256(), made="rotated")
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(BadConfig, match="is no manifest of a calibration"):
        run(toy, corpus, folder)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    with pytest.raises(BadConfig, match=r"holds 'letter\.txt' and no calibration\.json"):
        run(toy, corpus, strange)
    assert [p.name for p in strange.iterdir()] == ["letter.txt"]


def test_a_changed_file_of_statistics_is_noticed(toy: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run(toy, random_corpus(), folder).close()
    path = folder / "segment-0002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadConfig, match="a file of statistics has changed since it was written"):
        run(toy, random_corpus(), folder)


def test_devices_and_numbers_that_cannot_be_are_typed_errors(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[str, type[EdgeError], str]] = [("tpu", BadConfig, "expected auto, cpu, cuda or cuda:N")]
    if not torch.cuda.is_available():
        cases += [
            ("cuda", Unsupported, "sees 0 CUDA devices"),
            ("cuda:1", Unsupported, "sees 0 CUDA devices"),
        ]
    for device, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(toy, random_corpus(), tmp_path / "c", device=device)
    assert not (tmp_path / "c").exists()
    block = toy.weights.block
    monkeypatch.setattr(toy.weights, "block", lambda *a: block(*a) * (np.nan if a[0] == "layers.1.o" else 1))
    with pytest.raises(ValueOutOfRange, match="segment 4 of the f32 model gives NaN or Inf"):
        run(toy, random_corpus(), tmp_path / "c")
    monkeypatch.undo()
    run(toy, random_corpus(), tmp_path / "c").close()  # the lock was let go


def test_inputs_beyond_f16_are_kept_in_f32(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = toy.weights.block
    monkeypatch.setattr(
        toy.weights, "block", lambda *a: block(*a) * (3e5 if a[0] == "layers.0.mlp_norm" else 1)
    )
    with run(toy, random_corpus(), tmp_path / "c") as found:
        inputs = found.statistics("layers.0.gate")
    assert inputs is not None and np.abs(inputs.rows).max() > 65504 and np.isfinite(inputs.rows).all()


def test_peak_memory_is_a_segment_and_its_moments_not_the_model(tmp_path: Path) -> None:
    warm = write_model(tmp_path / "warm-model")
    hidden, ffn = 256, 1024
    script = Path(__file__).with_name("calibrate_peak_child.py")
    peaks, sizes = [], []
    for layers in (6, 24):
        config = llama_config(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)
        model = write_model(tmp_path / f"model-{layers}", config)
        sizes.append((model / "model.safetensors").stat().st_size)
        target = tmp_path / str(layers) / "c"
        words = [sys.executable, str(script), str(warm), str(model), str(target), "8", "64"]
        child = subprocess.run(words, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr
        peaks.append(int(child.stdout))
    segment = 4 * 3 * hidden * ffn
    moments = 8 * (ffn * ffn + hidden * hidden)  # f64, of which half is held, and f32 to be stored
    buffers = 4 * 8 * 64 * (6 * hidden + 4 * ffn)
    assert max(peaks) < segment + moments + buffers + (24 << 20)  # and what the heap keeps of freed pieces
    assert sizes[1] - sizes[0] > 60 << 20 and peaks[1] - peaks[0] < 12 << 20  # layers cost nothing


def test_a_rotated_model_is_calibrated_as_it_is(toy: Checkpoint, tmp_path: Path) -> None:
    """Inputs of a turned stream are turned: both moments have the same eigenvalues, and the same function."""
    corpus = random_corpus()
    turned = rotate(toy.weights, seed=3)
    with run(toy, corpus, tmp_path / "plain") as plain:
        digests = toy.source.sha256()
        options = CalibrationOptions(cores=3)
        with calibrate(
            turned, corpus, tmp_path / "turned", digests=digests, made="rotated 3", options=options
        ) as other:
            for name in ("layers.0.q", "layers.1.gate", "layers.1.o"):
                h, g = plain.statistics(name), other.statistics(name)
                assert h is not None and g is not None
                assert np.abs(h.hessian - g.hessian).max() > 1e-2
                np.testing.assert_allclose(
                    np.linalg.eigvalsh(h.hessian.astype(np.float64)),
                    np.linalg.eigvalsh(g.hessian.astype(np.float64)),
                    rtol=1e-3,
                    atol=1e-4 * np.trace(h.hessian),
                )
            found = measure_sensitivity(
                turned, other, corpus, ["int8_row", "int4_g32"], SensitivityOptions(unit="kl", cores=3)
            )
            again = measure_sensitivity(
                turned, other, corpus, ["int8_row", "int4_g32"], SensitivityOptions(unit="kl", cores=1)
            )
            assert found == again and "layers.1.down" in found.losses
