"""Each architecture against transformers: small random models, on a prompt and on decode with the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from arch_cases import (
    CASES,
    CONTEXT,
    LINEAR,
    LLAMA3,
    MIX,
    SMALL,
    VOCAB,
    YARN,
    Case,
    config_of,
    find,
    json_of,
    longrope,
)

from builders.archs import Architecture, read_program
from builders.weights import CheckpointWeights
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Rope
from edge_runtime.engine.plan import KvPlan, StepShape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BOUND = 1e-4  # of the largest |logit|
PROMPT, DECODE = 27, 6


def random_model(c: Case) -> Any:
    """Weights large enough that a wrong norm, bias, window or scale cannot hide."""
    torch.manual_seed(20)
    config = config_of(c)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                centre = 0.0 if "bias" in name or c.model_type.startswith("gemma") else 1.0
                weight.normal_(centre, 0.4)
            else:
                weight.normal_(0.0, 1.5 / math.sqrt(weight.shape[1]))
        # Embeddings in proportion to the branches, so that attention matters in the sum
        model.get_input_embeddings().weight.normal_(0.0, 1.0 / config_scale(c))
    return model


def config_scale(c: Case) -> float:
    if c.model_type.startswith("gemma"):
        return math.sqrt(SMALL["hidden_size"])
    return float(c.config.get("embedding_multiplier", 1.0))


def plain_config(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string())


class StateSource:
    """A model's state as a checkpoint: what a build reads from files."""

    def __init__(self, model: Any) -> None:
        self.state = model.state_dict()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self.state.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.state[key].shape)

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        array: Array = self.state[key].numpy()
        return array if rows is None else array[slice(*rows)]


def weights_of(model: Any, architecture: Architecture) -> CheckpointWeights:
    assert set(architecture.sources) == set(architecture.program.tensors)
    return CheckpointWeights(architecture, StateSource(model))


class Ours:
    """One sequence on the reference backend with an exact cache, its pages in a shuffled order."""

    def __init__(self, architecture: Architecture, weights: Callable[[str], Array]) -> None:
        kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=9)
        step = StepShape(context=CONTEXT, sequences=1, tokens=CONTEXT, logits=CONTEXT)
        self.executor = ReferenceExecutor(architecture.program, weights, kv, step)
        self.pages = np.array([[7, 2, 8, 0, 5, 1]], np.int32)
        self.length = 0

    def step(self, tokens: Array) -> Array:
        n = len(tokens)
        positions = np.arange(self.length, self.length + n, dtype=np.int32)
        rows = np.arange(n, dtype=np.int32)
        self.length += n
        batch = StepBatch(tokens.astype(np.int32), positions, np.zeros(n, np.int32), self.pages, rows)
        return self.executor.forward(batch).copy()


def theirs(model: Any, tokens: Array) -> tuple[Array, Array]:
    """Logits of the prompt (PROMPT, vocab) and of the decode steps with the cache (DECODE, vocab)."""
    ids = torch.from_numpy(tokens).long()[None]
    with torch.no_grad():
        out = model(ids[:, :PROMPT], use_cache=True)
        steps = []
        cache = out.past_key_values
        for t in range(PROMPT, PROMPT + DECODE):
            one = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(one.logits[0, -1])
            cache = one.past_key_values
    return out.logits[0].numpy(), torch.stack(steps).numpy()


def relative(ours: Array, want: Array) -> float:
    return float(np.abs(ours - want).max() / np.abs(want).max())


def tokens_of(c: Case) -> Array:
    return np.random.default_rng(len(str(c))).integers(0, VOCAB, PROMPT + DECODE)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_logits_equal_transformers(c: Case, record_property: Callable[[str, object], None]) -> None:
    model = random_model(c)
    architecture = read_program(plain_config(model), context=c.context)
    weights = weights_of(model, architecture)
    tokens = tokens_of(c)
    want_prompt, want_decode = theirs(model, tokens)
    ours = Ours(architecture, weights)
    prompt = ours.step(tokens[:PROMPT])
    decode = np.concatenate([ours.step(tokens[t : t + 1]) for t in range(PROMPT, PROMPT + DECODE)])
    error = max(relative(prompt, want_prompt), relative(decode, want_decode))
    record_property("relative_error", error)
    print(f"{c}: {error:.2e}")
    assert error <= BOUND
    # The prompt in chunks gives the same numbers
    chunked = Ours(architecture, weights)
    parts = np.concatenate([chunked.step(tokens[a:b]) for a, b in ((0, 1), (1, 12), (12, 20), (20, PROMPT))])
    assert relative(parts, prompt) <= 1e-5


@pytest.mark.parametrize("c", CASES, ids=str)
def test_every_row_of_the_checkpoint_is_used_once(c: Case) -> None:
    config = config_of(c)
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    rows = {key: np.zeros(tensor.shape[0], int) for key, tensor in state.items()}
    for source in read_program(json_of(c), context=c.context).sources.values():
        if source.constant is None:
            rows[source.key][slice(*source.rows) if source.rows else slice(None)] += 1
    if config.tie_word_embeddings:
        del rows["lm_head.weight"]
    assert {key: set(used) for key, used in rows.items()} == {key: {1} for key in rows}


# --- the comparison above must be able to fail -------------------------------------------------------------


def with_ops(architecture: Architecture, change: Callable[[Any], Any]) -> Architecture:
    program = msgspec.structs.replace(
        architecture.program, ops=tuple(change(op) for op in architecture.program.ops)
    )
    return Architecture(program, architecture.sources)


def changed(op: Any, op_name: str, **values: Any) -> Any:
    if type(op).__name__ != op_name or all(getattr(op, k) in (v, None) for k, v in values.items()):
        return op
    return msgspec.structs.replace(op, **values)


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "norm eps": lambda op: changed(op, "Norm", eps=1e-2),
    "linear bias": lambda op: changed(op, "Linear", bias=None) if getattr(op, "bias", None) else op,
    "rope scale": lambda op: changed(op, "Rope", scale=1.1),
    "embed scale": lambda op: changed(op, "Embed", scale=0.9),
    "residual scale": lambda op: changed(op, "Add", scale=0.9),
    "attention scale": lambda op: changed(op, "Attention", scale=0.19),
    "attention softcap": lambda op: changed(op, "Attention", softcap=1.5),
    "logits scale": lambda op: changed(op, "Logits", scale=0.97),
    "logits softcap": lambda op: changed(op, "Logits", softcap=2.5),
    "activation": lambda op: changed(op, "Activation", kind="relu"),
    "gelu is not its tanh form": lambda op: (
        changed(op, "Activation", kind="gelu") if getattr(op, "kind", "") == "gelu_tanh" else op
    ),
}


MUTATED = [
    (name, mutation)
    for name in ("llama-tied-bias", "gemma2-tight-caps", "granite-multipliers")
    for mutation, change in MUTATIONS.items()
    for right in [read_program(json_of(find(name)))]
    if with_ops(right, change).program != right.program
]


@pytest.mark.parametrize(("name", "mutation"), MUTATED)
def test_a_wrong_trait_would_show(name: str, mutation: str) -> None:
    model = random_model(find(name))
    right = read_program(plain_config(model))
    wrong = with_ops(right, MUTATIONS[mutation])
    weights = weights_of(model, right)
    tokens = tokens_of(find(name))[:PROMPT]
    error = relative(Ours(wrong, weights).step(tokens), Ours(right, weights).step(tokens))
    assert error > 3 * BOUND


def test_every_mutation_is_tried() -> None:
    assert {mutation for _, mutation in MUTATED} == set(MUTATIONS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral-window", {"sliding_window": 8}),
        ("qwen2-window", {"layer_types": ["full_attention"] * 3}),
        ("qwen2-layer-types", {"layer_types": [MIX[1], MIX[0], MIX[2]]}),
        ("smollm3-no-rope", {"no_rope_layers": [1, 1, 1]}),
        ("llama-linear", {"rope_parameters": LINEAR | {"factor": 3.1}}),
        ("llama-llama3", {"rope_parameters": LLAMA3 | {"high_freq_factor": 5.0}}),
        ("llama-yarn", {"rope_parameters": YARN | {"factor": 4.2}}),
        ("gemma3_text-linear", {"rope_parameters": {"full_attention": {"rope_theta": 30000.0}}}),
    ],
)
def test_a_wrong_config_value_would_show(name: str, changes: dict[str, Any]) -> None:
    model = random_model(find(name))
    right = read_program(plain_config(model))
    wrong = read_program(plain_config(model) | changes)
    tokens = tokens_of(find(name))[:PROMPT]
    outs = [Ours(a, weights_of(model, a)).step(tokens) for a in (right, wrong)]
    assert relative(outs[1], outs[0]) > 3 * BOUND


def test_a_really_trained_model(real_model: Path) -> None:
    config = json.loads((real_model / "config.json").read_text(encoding="utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    architecture = read_program(config)
    tokens = np.random.default_rng(5).integers(3, config["vocab_size"], PROMPT + DECODE)
    want_prompt, want_decode = theirs(model, tokens)
    ours = Ours(architecture, weights_of(model, architecture))
    assert relative(ours.step(tokens[:PROMPT]), want_prompt) <= BOUND
    decode = np.concatenate([ours.step(tokens[t : t + 1]) for t in range(PROMPT, PROMPT + DECODE)])
    assert relative(decode, want_decode) <= BOUND


# --- rotary tables at the sizes of real models -------------------------------------------------------------

LLAMA_32 = LLAMA3 | {"factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
QWEN_25 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
REAL_ROPE = {
    "llama-3.2": ("llama", 64, 131072, LLAMA_32),
    "qwen2.5-yarn": ("qwen2", 128, 131072, QWEN_25),
    "linear": ("llama", 128, 16384, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "longrope": ("llama", 96, 131072, longrope(48, 4096)),
}


@pytest.mark.parametrize("name", REAL_ROPE)
def test_rotary_tables_equal_transformers(name: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model_type, head_dim, longest, rope = REAL_ROPE[name]
    size = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": longest}
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | size), rope_parameters=dict(rope))
    table, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=longest)
    architecture = read_program(json.loads(config.to_json_string()))
    ours = architecture.sources["rope"].constant
    assert ours is not None and ours.dtype == np.float32
    # theirs is computed in f32: a few units in the last place
    np.testing.assert_allclose(ours[0], table.numpy(), rtol=1e-6)
    scales = [op.scale for op in architecture.program.ops if isinstance(op, Rope)]
    assert scales == pytest.approx([scale] * len(scales), rel=1e-12)


def test_longrope_table_follows_the_planned_context() -> None:
    config = json_of(find("phi3-longrope-long"))  # original 24, longest 96
    within = read_program(config, context=24)
    beyond = read_program(config, context=25)
    unplanned = read_program(config)
    tables = [a.sources["rope"].constant for a in (within, beyond, unplanned)]
    assert not np.array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[1], tables[2])
    # The short table is right only as far as the model was trained with it
    assert [a.program.max_context for a in (within, beyond, unplanned)] == [24, CONTEXT, CONTEXT]
