"""Configs: both spellings, what is refused and how, and the one file that adds an architecture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import CASES, CONTEXT, LINEAR, LLAMA3, MIX, SMALL, Case, find, json_of, longrope
from hub_configs import HUB

import builders.archs
from builders.archs import known_architectures, read_program
from edge_runtime.engine.ops import Attention
from edge_runtime.errors import BadConfig, Unsupported

# --- both spellings of a config ----------------------------------------------------------------------------


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 wrote it."""
    old = dict(config)
    rope = old.pop("rope_parameters")
    full = dict(rope.get("full_attention", rope))
    old["rope_theta"] = full.pop("rope_theta")
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    fraction = full.pop("partial_rotary_factor", None)
    if fraction is not None:
        old["partial_rotary_factor"] = fraction
    kind = full.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else full | {"type": kind}
    old["torch_dtype"] = old.pop("dtype", "float32")
    if "_sliding_window_pattern" in old:
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
    return old


@pytest.mark.parametrize("c", CASES, ids=str)
def test_old_and_new_spelling_mean_the_same(c: Case) -> None:
    new = json_of(c)
    a, b = read_program(new, context=c.context), read_program(old_spelling(new), context=c.context)
    assert a.program == b.program
    for name, source in a.sources.items():
        other = b.sources[name]
        assert (source.key, source.rows, source.offset) == (other.key, other.rows, other.offset)
        np.testing.assert_array_equal(source.constant, other.constant)


def test_layer_types_follow_from_the_older_keys() -> None:
    for name in ("qwen2-window", "qwen3-window", "gemma2-tied", "gemma3_text-pattern-cap", "smollm3-window"):
        new = json_of(find(name))
        old = {key: value for key, value in new.items() if key != "layer_types"}
        assert read_program(new).program == read_program(old).program, name


def test_a_window_wider_than_the_context_is_none() -> None:
    config = json_of(find("mistral-window"))
    for window, want in ((CONTEXT - 1, CONTEXT - 1), (CONTEXT, None), (4096, None)):
        program = read_program(config | {"sliding_window": window}).program
        assert {slot.window for slot in program.cache} == {want}
        assert {op.window for op in program.ops if isinstance(op, Attention)} == {want}


@pytest.mark.parametrize("name", HUB)
def test_published_models_read_as_published(name: str) -> None:
    parameters, config = HUB[name]
    architecture = read_program(config)
    stored = [t for n, t in architecture.program.tensors.items() if architecture.sources[n].constant is None]
    assert sum(t.size for t in stored) == parameters
    assert architecture.program.max_context == config["max_position_embeddings"]
    # Buffers serve all layers, so their number does not grow with the model
    assert len(architecture.program.buffers) == 9


# --- what is refused, and how ------------------------------------------------------------------------------


def llama(**changes: Any) -> dict[str, Any]:
    return json_of(find("llama-untied-gqa"), **changes)


def of(name: str, **changes: Any) -> dict[str, Any]:
    return json_of(find(name), **changes)


BAD = [
    (llama(rope_thetaa=1.0), BadConfig, r"'rope_thetaa' is not known .* did you mean 'rope_theta'"),
    (llama(num_local_experts=8), BadConfig, "'num_local_experts' is not known"),
    (llama(hidden_size="48"), BadConfig, r"'hidden_size' is '48' \(str\), expected int"),
    (llama(hidden_size=True), BadConfig, "'hidden_size' is True"),
    (llama(hidden_size=0), BadConfig, "'hidden_size' is 0, expected 1 to"),
    (llama(vocab_size=None), BadConfig, "'vocab_size' is null"),
    (llama(num_key_value_heads=4), BadConfig, "6 attention heads cannot share 4"),
    (llama(rms_norm_eps=-1.0), BadConfig, "'rms_norm_eps' is -1.0"),
    (llama(tie_word_embeddings=1), BadConfig, "'tie_word_embeddings' is 1"),
    (llama(hidden_act="mish"), Unsupported, "hidden_act 'mish'"),
    (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), Unsupported, "rope type 'dynamic'"),
    (llama(rope_parameters={"rope_type": "lineal"}), Unsupported, "did you mean 'linear'"),
    (llama(rope_parameters={"rope_type": "linear"}), BadConfig, "no 'factor'"),
    (llama(rope_parameters=LINEAR | {"facter": 2.0}), BadConfig, "'facter' is not known"),
    (llama(rope_parameters={"mrope_section": [1, 1, 2]}), BadConfig, "'mrope_section' is not known"),
    (llama(rope_parameters=longrope(3)), BadConfig, "'short_factor' must be a list of 4"),
    (llama(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}), BadConfig, "must be below high_freq_factor"),
    (llama(partial_rotary_factor=0.5), Unsupported, "partial_rotary_factor 0.5"),
    (llama(rope_interleaved=True), Unsupported, "half-split"),
    (llama(quantization_config={"bits": 4}), Unsupported, "unquantized"),
    (llama(is_encoder_decoder=True), Unsupported, "encoder-decoder"),
    (llama(sliding_window=8), BadConfig, "'sliding_window' is not known"),
    (of("mistral-window", layer_types=MIX), Unsupported, "layer_types"),
    (of("mistral-window", sliding_window=0), BadConfig, "sliding_window is 0"),
    (of("qwen2-tied", layer_types=MIX), BadConfig, "no sliding_window is in use"),
    (of("qwen2-tied", layer_types=MIX[:2]), BadConfig, "layer_types has 2 entries"),
    (of("qwen2-tied", layer_types=["linear_attention"] * 3), Unsupported, "layer type 'linear_attention'"),
    (of("qwen2-tied", use_mrope=True), Unsupported, "multimodal"),
    (of("qwen3-untied", num_key_value_heads=None), BadConfig, "'num_key_value_heads' is null"),
    (of("gemma2-tied", use_bidirectional_attention=True), Unsupported, "causal"),
    (of("gemma2-tied", sliding_window_size=5), Unsupported, "contradicts"),
    (of("gemma2-tied", final_logit_softcapping=-30.0), BadConfig, "'final_logit_softcapping' is -30.0"),
    (of("gemma3_text-tied", attn_logit_softcapping=50.0), Unsupported, "attn_logit_softcapping"),
    (of("phi3-fused", lm_head_bias=True), Unsupported, "bias on the head"),
    (of("phi3-fused", rope_parameters={"partial_rotary_factor": 0.2}), Unsupported, "even count"),
    (of("smollm3-no-rope", no_rope_layers=[1, 0]), BadConfig, "no_rope_layers must hold 3"),
    (of("granite-multipliers", logits_scaling=0.0), BadConfig, "'logits_scaling' is 0.0"),
    (llama(model_type="lama"), Unsupported, "architecture 'lama' is not supported; did you mean 'llama'"),
    (llama(model_type="mixtral"), Unsupported, "architecture 'mixtral' is not supported.*known: gemma2"),
    (llama(model_type="gemma3"), Unsupported, "'gemma3' is not supported; did you mean 'gemma"),
    (llama(model_type="__init__"), Unsupported, "'__init__'"),
    (llama(model_type="../llama"), Unsupported, "not supported"),
    (llama(model_type=3), BadConfig, "'model_type' is 3"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_program(config)


NASTY: list[Any] = [
    None, True, -1, 0, 1, 3, 2**24 + 1, 2**63, 10**400, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", "silu", [], [None], [1, "x"], {}, {"a": 1},
]  # fmt: skip


DAMAGED = (
    "llama-yarn-all",
    "llama-llama3",
    "qwen2-window",
    "gemma3_text-linear",
    "gemma2-tied",
    "phi3-longrope-long",
    "smollm3-window",
    "granite-linear",
)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_config_gives_a_typed_error_or_a_proved_program(name: str) -> None:
    config = json_of(find(name))
    rope = config["rope_parameters"]
    outcomes = {"built": 0, "refused": 0}
    damaged = [config | {key: value} for key in config for value in NASTY]
    damaged += [config | {"rope_parameters": rope | {key: value}} for key in rope for value in NASTY]
    for one in damaged:
        try:
            architecture = read_program(one)
        except (BadConfig, Unsupported):
            outcomes["refused"] += 1
        else:
            architecture.program.check()
            tables = [s.constant for s in architecture.sources.values() if s.constant is not None]
            assert all(np.isfinite(t).all() for t in tables)
            outcomes["built"] += 1
    assert min(outcomes.values()) > 0


def test_missing_keys_are_named() -> None:
    config = llama()
    for key in ("hidden_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "model_type"):
        with pytest.raises(BadConfig, match=f"no '{key}'"):
            read_program({k: v for k, v in config.items() if k != key})
    misspelt = {("hiden_size" if k == "hidden_size" else k): v for k, v in config.items()}
    with pytest.raises(BadConfig, match=r"no 'hidden_size'.*'hiden_size' looks like it"):
        read_program(misspelt)


def test_a_context_beyond_the_model_is_refused() -> None:
    for context in (0, CONTEXT + 1):
        with pytest.raises(BadConfig, match=f"a context of {context} tokens"):
            read_program(llama(), context=context)


def test_keys_without_meaning_are_accepted() -> None:
    extra = {"torch_dtype": "bfloat16", "architectures": ["X"], "attention_dropout": 0.1, "use_cache": False}
    extra |= {
        "rope_interleaved": False,
        "quantization_config": None,
        "eos_token_id": [1, 2],
        "_name_or_path": "x",
    }
    assert read_program(llama(**extra)).program == read_program(llama()).program


# --- one file adds an architecture -------------------------------------------------------------------------


def test_all_nine_families_are_there() -> None:
    nine = {"gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
    assert nine <= set(known_architectures())
    assert {c.model_type for c in CASES} == nine


def test_a_file_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dummy_arch.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import replace

            from builders.decoder import Layer, build, layer_count, read_decoder


            def read(config, context):
                decoder = read_decoder(config)
                twist = config.positive("twist")
                return build(replace(decoder, layers=(Layer(None),) * layer_count(config), embed_scale=twist))
            """
        )
    )
    (tmp_path / "broken_arch.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.setattr(builders.archs, "__path__", [*builders.archs.__path__, str(tmp_path)])
    assert {"dummy_arch", "llama"} <= set(known_architectures())
    config = SMALL | {"model_type": "dummy_arch", "twist": 2.5}
    architecture = read_program(config)
    assert architecture.program.ops[0].scale == 2.5
    assert "rope" not in architecture.sources
    with pytest.raises(BadConfig, match="'twits' is not known"):
        read_program(config | {"twits": 1})
    # A broken file shows its own error, not "unknown architecture"
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        read_program(config | {"model_type": "broken_arch"})
