"""Act-order: a Program whose inputs are gathered means the same as one whose columns stay where they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, llama_shapes, write_model
from quantized_folders import gptq_config, gptq_writer, write_quantized
from test_parts import write_lora

from builders.archs import read_program
from builders.parts import Extras, open_contents, read_planned
from builders.reorder import order_inputs
from builders.weights import CheckpointWeights
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.ops import Gather, Linear
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import BadConfig, Unsupported

CONFIG = llama_config()


@dataclass
class State:
    """A checkpoint in memory."""

    tensors: dict[str, np.ndarray]

    @classmethod
    def random(cls) -> State:
        rng = np.random.default_rng(2)
        shapes = llama_shapes(CONFIG).items()
        return cls({k: rng.normal(0, s[-1] ** -0.5, s).astype(np.float32) for k, s in shapes})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: value.shape for key, value in self.tensors.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors[key].shape

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        return self.tensors[key] if rows is None else self.tensors[key][slice(*rows)]


def orders(shared: bool) -> dict[str, np.ndarray]:
    """One order a linear, or (shared) the same for q, k, v and for gate and up."""
    rng = np.random.default_rng(3)
    found: dict[str, np.ndarray] = {}
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for key, shape in llama_shapes(CONFIG).items():
        if key.endswith("_proj.weight"):
            block, name = key.removesuffix(".weight").rsplit(".", 1)
            first = f"{block}.{same.get(name, name)}.weight" if shared else key
            found[key] = found.get(first, rng.permutation(shape[1]))
    return found


def logits(architecture: object, state: State) -> np.ndarray:
    weights = CheckpointWeights(architecture, state)  # type: ignore[arg-type]
    kv, step = (
        KvPlan(k="f32", v="f32", page_tokens=16, pages=1),
        StepShape(context=16, sequences=1, tokens=8, logits=8),
    )
    executor = ReferenceExecutor(weights.program, weights, kv, step)
    at = np.arange(8, dtype=np.int32)
    batch = StepBatch(at + 20, at, np.zeros(8, np.int32), np.zeros((1, 1), np.int32), at)
    return executor.forward(batch).copy()


@pytest.mark.parametrize(("shared", "gathers"), [(True, 8), (False, 14)])
def test_the_model_means_the_same(shared: bool, gathers: int) -> None:
    plain, state = read_program(CONFIG), State.random()
    ordered = order_inputs(plain, orders(shared))
    assert sum(isinstance(op, Gather) for op in ordered.program.ops) == gathers
    for op in ordered.program.ops:
        if isinstance(op, Linear):
            assert op.x.endswith(".ordered")
    want = logits(plain, state)
    np.testing.assert_allclose(logits(ordered, state), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_wrong_order_changes_the_model() -> None:
    """The inverse: without the columns moved, the same Gathers give another model."""
    plain, state = read_program(CONFIG), State.random()
    ordered = order_inputs(plain, orders(True))
    broken = type(ordered)(
        ordered.program,
        plain.sources | {name: made for name, made in ordered.sources.items() if name.startswith("order.")},
    )
    assert np.abs(logits(broken, state) - logits(plain, state)).max() > 0.1


def test_without_orders_nothing_changes() -> None:
    plain = read_program(CONFIG)
    assert order_inputs(plain, {}) is plain


def test_an_order_of_another_width_is_refused() -> None:
    with pytest.raises(BadConfig):
        order_inputs(read_program(CONFIG), {"model.layers.0.mlp.down_proj.weight": np.arange(65)})


def test_adapters_do_not_follow_an_order(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", gptq_config(desc_act=True), gptq_writer(act_order=True), hidden_size=64)
    lora = write_lora(tmp_path / "lora", llama_config(hidden_size=64))
    with (
        pytest.raises(Unsupported, match=r"adapter 'a'.*another order"),
        open_contents(tmp_path / "m", Extras(adapters={"a": lora}), None),
    ):
        pass
    write_quantized(tmp_path / "plain", gptq_config(), gptq_writer(), hidden_size=64)
    with open_contents(tmp_path / "plain", Extras(adapters={"a": lora}), None) as contents:
        assert contents.adapters["a"]


def test_a_plan_knows_the_gathers_and_the_formats(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", gptq_config(desc_act=True), gptq_writer(act_order=True), hidden_size=64)
    architecture, kept = read_planned(tmp_path / "m", None)
    assert sum(isinstance(op, Gather) for op in architecture.program.ops) == 8
    assert set(kept.values()) == {"int4_g32"} and len(kept) == 14
    # Of a config alone nothing is known of what its weights hold
    assert read_planned(tmp_path / "m" / "config.json", None)[1] == {}
    assert read_planned(write_model(tmp_path / "f32"), None)[1] == {}
