"""How much rows matter: against the KL of changed rows in the numpy reference, and against autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import SMALL, VOCAB
from made_weights import MadeWeights, logits_of, made_weights

torch = pytest.importorskip("torch")

from builders import row_importance as module  # noqa: E402
from builders.torch_program import TorchProgram  # noqa: E402
from edge_runtime.engine.formats import Array  # noqa: E402
from edge_runtime.errors import BadConfig, ValueOutOfRange  # noqa: E402

UNTIED = {"model_type": "llama", **SMALL}
TIED = {"model_type": "qwen3", **SMALL, "head_dim": 8, "tie_word_embeddings": True}
CASES = pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
WINDOWS = np.random.default_rng(3).integers(3, VOCAB, (40, 32)).astype(np.int32)


def found_of(weights: MadeWeights, folder: Path, windows: Array = WINDOWS, **more: Any) -> dict[str, Array]:
    return module.row_importance(weights, windows, folder, "cpu", **more)


def uneven(config: dict[str, Any]) -> MadeWeights:
    """A model whose rows differ in how much they matter: columns of its matrices do in size."""
    weights, rng = made_weights(config), np.random.default_rng(7)
    for name, spec in weights.program.tensors.items():
        if spec.role != "vector":
            size = np.exp(0.8 * rng.normal(size=spec.cols)).astype(np.float32)
            weights.tensors[name] = weights.tensors[name] * size
    return weights


def log_probability(weights: MadeWeights, windows: Array) -> Array:
    z = logits_of(weights, windows).astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


@CASES
def test_it_is_the_kl_of_a_change(config: dict[str, Any], tmp_path: Path) -> None:
    """KL is half of sum F_ii d_i^2 for small changes d; rows of all ranks, by the reference in f64."""
    weights, rng = uneven(config), np.random.default_rng(0)
    found, few = found_of(weights, tmp_path), WINDOWS[:12]
    exact = log_probability(weights, few)
    said, seen = [], []
    for name, importance in found.items():
        order = np.argsort(importance)
        for row in order[np.linspace(len(order) // 4, len(order) - 1, 4).astype(int)]:
            kl = 0.0
            for _ in range(3):
                values = weights(name).copy()
                step = rng.choice([-0.02, 0.02], values.shape[1])
                values[row] += step.astype(np.float32)
                got = log_probability(MadeWeights(weights.program, weights.tensors | {name: values}), few)
                kl += float((np.exp(exact) * (exact - got)).sum(-1).mean()) / 3
            said.append(0.5 * importance[row] * values.shape[1] * 0.02**2)
            seen.append(kl)
    x, y = np.log(said), np.log(np.maximum(seen, 1e-12))
    assert np.corrcoef(x, y)[0, 1] > 0.9
    assert abs(np.median(y - x)) < 0.35


@CASES
def test_segments_backward_are_one_backward_pass(config: dict[str, Any], tmp_path: Path) -> None:
    """Against autograd through the whole program at once, with the same answers."""
    weights = uneven(config)
    program = weights.program
    found = found_of(weights, tmp_path)
    p = np.exp(log_probability(weights, WINDOWS)).reshape(WINDOWS.size, -1)
    chance = np.random.default_rng((1, 5)).random(WINDOWS.size)
    answers = np.minimum((p.cumsum(-1) < chance[:, None]).sum(-1), p.shape[1] - 1)

    class Recorded(TorchProgram):
        def product(self, op: Any, x: Any) -> Any:
            y = super().product(op, x)
            seen.append((op.weight, x, y))
            return y

        def embedded(self, op: Any, tokens: Any) -> Any:
            rows = super().embedded(op, tokens).requires_grad_()
            looked_up.append((op.weight, rows))
            return rows

    seen: list[Any] = []
    looked_up: list[Any] = []
    held = {name: torch.from_numpy(values.copy()) for name, values in weights.tensors.items()}
    z = Recorded(program, held.__getitem__)(torch.from_numpy(WINDOWS.astype(np.int64))).log_softmax(-1)
    loss = z.flatten(0, 1)[torch.arange(WINDOWS.size), torch.from_numpy(answers)].sum()
    slopes = torch.autograd.grad(loss, [y for *_, y in seen] + [rows for _, rows in looked_up])
    want: dict[str, Array] = {name: np.zeros(len(rows)) for name, rows in found.items()}
    head = program.heads[0].weight
    for (name, x, _), slope in zip(seen, slopes, strict=False):
        size = np.square(x.detach().double().numpy()).mean()
        if name == head:
            squares = np.square(x.detach().double().numpy()).reshape(WINDOWS.size, -1).mean(1)
            want[name] += (p * (1 - p) * squares[:, None]).sum(0)
        else:
            want[name] += np.square(slope.double().numpy()).reshape(WINDOWS.size, -1).sum(0) * size
    for (name, _), slope in zip(looked_up, slopes[len(seen) :], strict=True):
        squares = np.square(slope.double().numpy()).mean(-1).reshape(-1)
        np.add.at(want[name], WINDOWS.reshape(-1), squares)
    assert found.keys() == want.keys() == {n for n, s in program.tensors.items() if s.role != "vector"}
    for name, rows in found.items():
        alike = module.PRIOR * want[name].mean() / WINDOWS.size
        mean = (want[name] + alike) / (WINDOWS.size + module.PRIOR)
        # means of squared inputs are taken batch by batch
        assert np.allclose(rows, mean, rtol=0.03, atol=0), name


def test_the_number_of_cores_changes_no_bit_and_nothing_is_left(tmp_path: Path) -> None:
    weights = uneven(UNTIED)
    windows = np.tile(WINDOWS, (2, 4))[:, :128]
    one, two = (found_of(weights, tmp_path, windows, cores=cores) for cores in (1, 2))
    assert all(np.array_equal(rows, two[name]) and rows.dtype == np.float32 for name, rows in one.items())
    other = found_of(weights, tmp_path, windows, seed=2)
    assert any(not np.array_equal(rows, other[name]) for name, rows in one.items())
    assert not list(tmp_path.iterdir())


def test_few_tokens_of_a_long_text_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", 100)
    weights = uneven(TIED)
    few, first = found_of(weights, tmp_path), found_of(weights, tmp_path, WINDOWS[:3])
    assert all(np.array_equal(rows, first[name]) for name, rows in few.items())


def test_tokens_that_never_stand_there_matter_little(tmp_path: Path) -> None:
    weights = uneven(UNTIED)
    rows = found_of(weights, tmp_path, np.full((4, 32), 7, np.int32))[weights.program.ops[0].weight]
    others = np.delete(rows, 7)
    # as much as if each had stood in its share of PRIOR tokens
    share = module.PRIOR / len(rows)
    assert (others == others[0]).all() and others[0] / rows[7] == pytest.approx(share / (128 + share))


def test_it_is_found_once_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = uneven(UNTIED)

    def kept() -> dict[str, Array]:
        return dict(module.kept_row_importance(weights, WINDOWS, tmp_path, "cpu", 1))

    first = kept()
    assert [p.name for p in tmp_path.iterdir()] == [module.KEPT]
    monkeypatch.setattr(module, "row_importance", None)
    again = kept()
    assert all(np.array_equal(rows, again[name]) for name, rows in first.items())
    (tmp_path / module.KEPT).write_bytes(b"\x00" * 20)
    with pytest.raises(BadConfig, match="is damaged"):
        kept()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weights = uneven(UNTIED)
    name = next(n for n, s in weights.program.tensors.items() if s.role == "matrix")
    weights.tensors[name] = weights.tensors[name] * np.float32(np.inf)
    with pytest.raises(ValueOutOfRange, match="is NaN or Inf"):
        found_of(weights, tmp_path)
