"""A rotated model is the same function; its matrix is orthogonal; what cannot be rotated is refused."""

from __future__ import annotations

import numpy as np
import pytest
from arch_cases import CASES, SMALL, VOCAB, Case

from builders.archs import read_program
from builders.hadamard import make_turn
from builders.rotate import rotate
from edge_runtime.engine.formats import Array
from edge_runtime.engine.program import Program
from edge_runtime.errors import Unsupported

torch = pytest.importorskip("torch")
TorchProgram = pytest.importorskip("builders.torch_program").TorchProgram


class Random:
    """Random weights of a config; norms far from 1, so that folding them matters."""

    def __init__(self, config: dict, context: int | None = None) -> None:
        architecture = read_program(config, context=context)
        self.program: Program = architecture.program
        rng = np.random.default_rng(7)
        self._values: dict[str, Array] = {}
        for name, spec in self.program.tensors.items():
            made = architecture.sources[name].constant
            values = rng.normal(size=(spec.rows, spec.cols)) / np.sqrt(spec.cols) if made is None else made
            if made is None and spec.role == "vector":
                values = np.exp(rng.normal(0, 0.5, (1, spec.cols)))
            self._values[name] = np.asarray(values, np.float32).reshape(spec.rows, spec.cols)

    def __call__(self, name: str) -> Array:
        return self._values[name]

    def block(self, name: str, start: int, stop: int) -> Array:
        return self._values[name][start:stop]

    def rows(self, name: str, ids: Array) -> Array:
        return self._values[name][ids]


def logits(weights, tokens: Array) -> Array:
    run = TorchProgram(weights.program, lambda name: torch.from_numpy(weights(name)))
    with torch.no_grad():
        return run(torch.from_numpy(tokens).long()).numpy()


@pytest.mark.parametrize("width", [1, 2, 12, 48, 64, 7, 20])
def test_the_matrix_is_orthogonal_and_undone(width: int) -> None:
    turn = make_turn(width, seed=3)
    q = turn.right(np.eye(width))
    np.testing.assert_allclose(q @ q.T, np.eye(width), atol=1e-12)
    x = np.random.default_rng(0).normal(size=(5, width))
    np.testing.assert_allclose(turn.right(x), x @ q, atol=1e-12)
    np.testing.assert_allclose(turn.back(turn.right(x)), x, atol=1e-12)
    assert (make_turn(width, 3).signs == turn.signs).all()


def test_a_power_of_two_is_sylvesters_matrix_with_signs() -> None:
    turn = make_turn(8, seed=1)
    h = np.array([[1.0]])
    for _ in range(3):
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    q = turn.right(np.eye(8))
    np.testing.assert_allclose(q, turn.signs[:, None] * turn.odd[0, 0] * h / np.sqrt(8), atol=1e-12)


ROTATABLE = [c for c in CASES if c.model_type not in ("gemma2", "gemma3_text")]


@pytest.mark.parametrize("case", ROTATABLE, ids=str)
def test_the_rotated_model_is_the_same_function(case: Case) -> None:
    plain = Random({"model_type": case.model_type, **SMALL, **case.config}, case.context)
    turned = rotate(plain, seed=5)
    tokens = np.random.default_rng(3).integers(3, VOCAB, (2, 20))
    want = logits(plain, tokens)
    np.testing.assert_allclose(logits(turned, tokens), want, atol=3e-4 * np.abs(want).max())
    matrices = [n for n, s in turned.program.tensors.items() if s.role == "matrix"]
    changed = [n for n in matrices if n not in plain.program.tensors or not np.allclose(turned(n), plain(n))]
    assert changed == matrices  # every one was turned


def test_a_tied_table_becomes_two_only_where_the_last_norm_says_so() -> None:
    config = {"model_type": "llama", **SMALL, "tie_word_embeddings": True}
    plain = Random(config)
    assert "rotated.head" in rotate(plain, 0).program.tensors
    plain._values["norm"] = np.full_like(plain("norm"), 1.5)
    turned = rotate(plain, 0)
    assert "rotated.head" not in turned.program.tensors
    tokens = np.arange(12).reshape(1, 12) + 3
    want = logits(plain, tokens)
    np.testing.assert_allclose(logits(turned, tokens), want, atol=3e-4 * np.abs(want).max())


def test_blocks_and_rows_are_those_of_the_whole() -> None:
    turned = rotate(Random({"model_type": "llama", **SMALL}), seed=2)
    for name, spec in turned.program.tensors.items():
        whole = turned(name)
        assert whole.shape == (spec.rows, spec.cols) and whole.dtype == np.float32
        middle = spec.rows // 2
        np.testing.assert_allclose(turned.block(name, middle, spec.rows), whole[middle:], atol=1e-6)
        np.testing.assert_allclose(turned.rows(name, np.array([middle, 0])), whole[[middle, 0]], atol=1e-6)


def test_outlier_channels_are_spread() -> None:
    plain = Random({"model_type": "llama", **SMALL})
    plain._values["embed"][:, 5] *= 50
    turned = rotate(plain, seed=1)

    def peak(table: Array) -> float:
        size = np.abs(table).max(axis=0)
        return float(size.max() / np.median(size))

    assert peak(plain("embed")) > 20 > 4 > peak(turned("embed"))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_norms_behind_the_linears_are_refused(model_type: str) -> None:
    case = next(c for c in CASES if c.model_type == model_type)
    with pytest.raises(Unsupported, match="cannot be rotated without a change of meaning"):
        rotate(Random({"model_type": model_type, **SMALL, **case.config}, case.context), seed=0)
