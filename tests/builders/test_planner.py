"""The planner against sums done by hand: what fits, what is chosen, what would make it fit, how fast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hf_folders import llama_config, llama_shapes

from builders.archs import read_program
from builders.companions import Companions
from builders.fitting import advice, changes_that_fit, require_fit
from builders.losses import losses_of
from builders.planner import AUTO, Request, candidates, choose, fits, make_plans, precision, resolve
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile, list_profiles, load_profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, DoesNotFit, Unsupported

LLAMA_8B = llama_config(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


def program_of(config: dict[str, Any]) -> Program:
    return read_program(config).program


def make_plan(program: Program, profile: Profile, request: Request) -> Plan:
    """The language part's, which is alone."""
    (plan,) = make_plans(program, profile, request).values()
    return plan


@pytest.fixture(scope="module")
def big() -> Program:
    return program_of(LLAMA_8B)


def with_memory(profile: Profile, total: int) -> Profile:
    memory = msgspec.structs.replace(profile.memory, total_bytes=total)
    return msgspec.structs.replace(profile, memory=memory)


def test_weights_and_kv_are_the_sums_done_by_hand(big: Program) -> None:
    """int4_g64 is 4.25 bits a weight, int8_row 8 bits and 4 bytes a row; a KV row is head_dim + 4 bytes."""
    request = Request(weights="int4_g64", context=8192)
    memory = make_plan(big, load_profile("orin-nano-8gb"), request).memory
    shapes = llama_shapes(LLAMA_8B).items()
    matrices = sum(s[0] * s[1] for k, s in shapes if len(s) == 2 and "layers" in k)
    tables = sum(s[0] * s[1] + 4 * s[0] for k, s in shapes if len(s) == 2 and "layers" not in k)
    vectors = 4 * (sum(s[0] for _, s in shapes if len(s) == 1) + 64)  # and 64 rotary frequencies
    assert memory.weights == matrices * 4.25 / 8 + tables + vectors
    assert memory.kv == 8192 * 32 * 8 * 2 * (128 + 4)


@pytest.mark.parametrize("name", [p.name for p in list_profiles()])
def test_auto_beats_every_uniform_format_that_fits_every_device(big: Program, name: str) -> None:
    """By its own measure of loss, and without more bytes than there are."""
    profile = load_profile(name)
    plans, request = choose(big, profile, Request(context=4096))
    losses = losses_of(big, None, candidates(profile, request))

    def loss(plan: Plan) -> float:
        tensors = {n: t for n, t in plan.tensors.items() if big.tensors[n].role != "vector"}
        return sum(losses.of(n, t.format) or 0.0 for n, t in tensors.items())

    everything = [
        make_plans(big, profile, Request(weights=f, head_weights=f, context=4096))
        for f in candidates(profile, request)
    ]
    fitting = [p["language"] for p in everything if fits(p)]
    assert request.weights == AUTO
    assert fits(plans) == bool(fitting)
    assert all(loss(plans["language"]) <= loss(plan) * (1 + 1e-6) for plan in fitting)
    if not fitting:
        assert plans["language"].memory.need <= min(p["language"].memory.need for p in everything)


def test_formats_follow_the_roles(big: Program) -> None:
    def formats(weights: str, head: str | None = None, profile: str = "cpu") -> dict[str, set[str]]:
        plan = make_plan(big, load_profile(profile), Request(weights=weights, head_weights=head, context=64))
        found: dict[str, set[str]] = {}
        for name, chosen in plan.tensors.items():
            found.setdefault(big.tensors[name].role, set()).add(f"{chosen.format}/{chosen.packing}")
        return found

    vector = {"f32/rows"}
    table = {"int8_row/n16k4"}
    four = {"int4_g64/n16k4"}
    assert formats("int4_g64") == {"matrix": four, "embedding": table, "head": table, "vector": vector}
    assert formats("int4_g64", "int4_g64")["head"] == four
    assert formats("bf16")["embedding"] == formats("bf16")["matrix"] == {"bf16/n16"}
    on_gpu = formats("nf4_g64", profile="orin")
    assert on_gpu["matrix"] == {"nf4_g64/m16"} and on_gpu["head"] == {"int8_row/m16"}


def test_every_change_fits_and_is_the_smallest(big: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    request = resolve(big, profile, Request(weights="int8_row", kv_k="f16", kv_v="f16", context=16384))
    assert not fits(make_plans(big, profile, request))
    (change,) = changes_that_fit(big, profile, replace(request, weights="int4_g32", context=32768))[-1:]
    context = int(change.options["context"])
    at = replace(request, weights="int4_g32", context=context)
    assert make_plan(big, profile, at).memory.need == change.need <= profile.memory_available()
    assert not fits(make_plans(big, profile, replace(at, context=context + at.page_tokens)))


def test_single_changes_come_before_sets_of_changes(big: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    base = resolve(big, profile, Request(weights="int8_row", context=8192))
    assert [c.options for c in changes_that_fit(big, profile, base)] == [{"weights": "int4_g32"}]
    need = make_plan(big, profile, replace(base, weights="int4_g64", context=8192)).memory.need
    tight = with_memory(profile, need - 1 + profile.memory.reserve_bytes)
    singles = changes_that_fit(big, tight, replace(base, weights="int4_g64"))
    assert [list(c.options) for c in singles] == [["weights"], ["kv"], ["context"]]
    # Now so little memory that only format and context together do it
    least = replace(base, weights="int4_g128", head_weights="int4_g128", context=256)
    smallest = make_plan(big, profile, least)
    tiny = with_memory(profile, smallest.memory.need + profile.memory.reserve_bytes)
    (both,) = changes_that_fit(big, tiny, base)
    assert set(both.options) >= {"weights", "context"} and both.need <= tiny.memory_available()


def test_nothing_fits_is_said(big: Program) -> None:
    profile = with_memory(load_profile("orin-nano-8gb"), 3 << 30)
    request = resolve(big, profile, Request(weights="int4_g64", context=1024))
    assert changes_that_fit(big, profile, request) == []
    assert "larger device" in advice([])


def test_one_byte_decides(big: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    request = Request(weights="int4_g64", context=2048)
    need = make_plan(big, profile, request).memory.need
    reserve = profile.memory.reserve_bytes
    require_fit(big, with_memory(profile, need + reserve), request)
    with pytest.raises(DoesNotFit, match="to fit, use --weights int4_g128") as caught:
        require_fit(big, with_memory(profile, need + reserve - 1), request)
    assert (caught.value.need, caught.value.have) == (need, need - 1)
    assert caught.value.exit_code == 2


def test_prediction_is_the_roofline_done_by_hand(big: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    request = Request(weights="int4_g64", context=8192, power_mode="25W")
    plan = make_plan(big, profile, request)
    mode, efficiency = profile.mode("25W"), profile.efficiency
    table = 128256 * (4096 + 4)
    read = plan.memory.weights - table + 4096 + 4 + plan.memory.kv / 2  # one row of the embedding
    seconds = read / (mode.bandwidth_gbps * 1e9 * efficiency.bandwidth)
    # A layer: inputs of q/k/v, q/k/v, rotation and store, attention and its merge, inputs of o, o, inputs of
    # gate/up, gate/up, inputs of down, down. Beside them: angles, embedding, the head's inputs, head, its
    # end, the choice.
    launches = 32 * 11 + 6
    seconds += launches * efficiency.launch_overhead_us * 1e-6
    assert plan.predicted.decode_tokens_per_s == pytest.approx(1 / seconds, rel=0.002)
    # First token: compute bound, 2 operations for each weight and token, and attention's small share
    matrices = sum(s.size for s in big.tensors.values() if s.role == "matrix")
    least = 2e3 * matrices * 512 / (mode.compute.int8 * 1e12 * efficiency.compute)
    assert least < plan.predicted.first_token_ms < 1.2 * least
    assert plan.predicted.prompt_tokens == 512


def test_a_lower_power_mode_is_slower_in_proportion(big: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    slow, fast = (
        make_plan(big, profile, Request(weights="int4_g64", context=1024, power_mode=m)).predicted
        for m in ("15W", "25W")
    )
    ratio = profile.mode("25W").bandwidth_gbps / profile.mode("15W").bandwidth_gbps
    assert fast.decode_tokens_per_s / slow.decode_tokens_per_s == pytest.approx(ratio, rel=0.05)
    assert fast.first_token_ms < slow.first_token_ms


def test_windows_bound_the_predicted_kv_reads() -> None:
    config = llama_config(num_hidden_layers=4, max_position_embeddings=32768, model_type="mistral")
    profile = load_profile("cpu")
    request = Request(weights="f16", context=32768)
    plain = make_plan(program_of(config | {"sliding_window": None}), profile, request)
    windowed = make_plan(program_of(config | {"sliding_window": 64}), profile, request)
    fewer = 4 * (32768 // 2 + 1 - 64) * 2 * 2 * (8 + 4)  # layers, keys, KV heads, K and V, bytes of a row
    bandwidth = profile.mode().bandwidth_gbps * 1e9 * profile.efficiency.bandwidth
    saved = 1 / plain.predicted.decode_tokens_per_s - 1 / windowed.predicted.decode_tokens_per_s
    assert saved == pytest.approx(fewer / bandwidth, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": "int4_g46"}, BadConfig, "did you mean 'int4_g64'"),
        ({"head_weights": "int9"}, BadConfig, "unknown weight format 'int9'"),
        ({"kv_k": "int9"}, BadConfig, "did you mean 'int"),
        ({"weights": "fp8_e4m3_row"}, Unsupported, "no fp8; it runs"),
        ({"power_mode": "26W"}, BadConfig, "25W"),
        ({"context": 0}, BadConfig, "1 to 131072"),
        ({"context": 131073}, BadConfig, "1 to 131072"),
        ({"sequences": 0}, BadConfig, "--sequences"),
        ({"step_tokens": 0}, BadConfig, "--step-tokens"),
        ({"kv_tokens": 100}, BadConfig, "--kv-tokens"),
        ({"page_tokens": 17}, BadConfig, "--page-tokens"),
    ],
)
def test_wrong_options_are_named(
    big: Program, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        choose(big, load_profile("orin-nano-8gb"), replace(Request(context=4096), **change))
    assert words in str(caught.value)


def test_defaults_are_filled_in(big: Program) -> None:
    plans, request = choose(big, load_profile("orin-nano-8gb"), Request())
    plan = plans["language"]
    assert request.context == plan.step.context == 4096
    assert plan.kv.pages * plan.kv.page_tokens == 4096
    small = program_of(llama_config())
    assert choose(small, load_profile("cpu"), Request())[1].context == 128


def test_every_format_has_a_precision_that_some_device_lists() -> None:
    listed = {p for profile in list_profiles() for p in profile.precisions}
    assert {precision(f) for f in FORMATS} <= listed


SHARED = {k: LLAMA_8B[k] for k in ("vocab_size", "max_position_embeddings")}


def test_a_draft_counts_to_the_byte_and_changes_are_measured_with_it(big: Program) -> None:
    beside = Companions(draft=program_of(llama_config(**SHARED, hidden_size=256)))
    profile = load_profile("orin-nano-8gb")
    request = resolve(big, profile, Request(weights="int4_g64", context=2048), beside)
    assert request.draft_length == 8
    plans = make_plans(big, profile, request, beside)
    alone = make_plan(big, profile, request)
    assert plans["language"].memory.need == alone.memory.need + plans["draft"].memory.need
    tight = with_memory(profile, alone.memory.need + profile.memory.reserve_bytes)
    assert fits(make_plans(big, tight, request))
    assert not fits(make_plans(big, tight, request, beside))
    with pytest.raises(DoesNotFit, match="to fit, use"):
        require_fit(big, tight, request, beside)
    for change in changes_that_fit(big, tight, request, beside):
        assert plans["draft"].memory.need / 2 < change.need <= tight.memory_available()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 300}, "the draft has a vocabulary of 300 tokens, the model 128256"),
        ({"max_position_embeddings": 1024}, "the draft reaches 1024 tokens, 2048 are planned; use --context"),
    ],
)
def test_a_draft_of_another_kind_is_refused(big: Program, change: dict[str, Any], words: str) -> None:
    beside = Companions(draft=program_of(llama_config(**(SHARED | change))))
    with pytest.raises(BadConfig, match=words):
        resolve(big, load_profile("orin"), Request(weights="int4_g64", context=2048), beside)
