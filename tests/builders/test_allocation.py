"""The choice of formats: to the byte, within every budget, never worse than brute force over whole plans."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hf_folders import llama_config
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import calibrated

from builders.allocation import CACHE, DECODE, MEMORY, state
from builders.archs import read_program
from builders.companions import Companions
from builders.fitting import bits_per_weight, require_fit, shortfall, unmet
from builders.losses import KV_LOSSES, gaussian_error, losses_of
from builders.planner import (
    KV_CHOICES,
    Plans,
    Request,
    candidates,
    choose,
    fits,
    inputs_of,
    make_plans,
    resolve,
)
from builders.sensitivity import Sensitivity
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import linear_runs, weights_read
from edge_runtime.errors import BadConfig, BudgetNotMet, DoesNotFit

pytest.importorskip("scipy")

CONFIG = llama_config(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
CPU = load_profile("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def program() -> Program:
    return read_program(CONFIG).program


@pytest.fixture(scope="module")
def tiny() -> Program:
    """One layer: few enough tensors to try every plan."""
    return read_program(CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": True}).program


def matrices(program: Program, plan: Plan) -> dict[str, str]:
    return {n: t.format for n, t in plan.tensors.items() if program.tensors[n].role != "vector"}


def loss_of(program: Program, profile: Profile, request: Request, plan: Plan) -> float:
    losses = losses_of(program, None, candidates(profile, request))
    chosen = sum(losses.of(n, f) or 0.0 for n, f in matrices(program, plan).items())
    return chosen + (losses.kv(plan.kv.k, plan.kv.v) if request.kv_choices else 0.0)


def kept(program: Program, request: Request, plans: Plans) -> bool:
    return fits(plans) and not unmet(program, request, plans)


@pytest.mark.parametrize(
    "profile",
    [CPU, load_profile("orin-nano-8gb"), calibrated(stage_us=0.0, unit_us=0.0)],
    ids=["cpu", "cuda", "own"],
)
def test_the_constraint_s_sum_is_the_plan_s_need_to_the_byte(program: Program, profile: Profile) -> None:
    """For formats of every kind and a draft beside it, whatever the choice."""
    draft = read_program(CONFIG | {"num_hidden_layers": 1}).program
    beside = Companions(draft=draft)
    asked = Request(weights="auto", kv_choices=KV_CHOICES, min_tokens_per_second=1.0, bits=8.0)
    request = resolve(program, profile, asked, beside)
    given_ = inputs_of(program, profile, request, beside)
    made = state(given_)
    for turn in range(12):
        choice = [(turn * 7 + i) % len(unit) for i, unit in enumerate(made.problem.units)]
        formats: dict[str, str] = {}
        pair = ("", "")
        for names, unit, i in zip(made.names, made.problem.units, choice, strict=True):
            formats |= dict(zip(names, unit[i].label, strict=True)) if names else {}
            pair = (unit[i].label[0], unit[i].label[1]) if not names else pair
        plans = make_plans(program, profile, replace(request, kv_k=pair[0], kv_v=pair[1]), beside, formats)
        costs = dict(zip((b.name for b in made.problem.budgets), made.problem.costs(choice), strict=True))
        plan = plans["language"]
        assert costs[MEMORY] == plan.memory.need
        assert costs["bits"] * 8 / sum(program.tensors[n].size for n in formats) == pytest.approx(
            bits_per_weight(program, plans), rel=1e-12
        )
        assert 1 / costs[DECODE] == pytest.approx(plan.predicted.decode_tokens_per_s, rel=1e-9)


@pytest.mark.parametrize(
    "profile",
    [CPU, calibrated(stage_us=0.0, unit_us=0.0), calibrated(stage_us=0.0, unit_us=0.0, cache_bytes=200_000)],
    ids=["cpu", "own", "cache"],
)
@pytest.mark.parametrize("tightness", [0.2, 0.6])
def test_no_whole_plan_is_better(tiny: Program, profile: Profile, tightness: float) -> None:
    """Brute force over whole plans: two formats for each of seven tensors and the tied head, two caches."""
    formats = ("int4_g64", "int8_row")
    names = [n for n, s in tiny.tensors.items() if s.role != "vector"]
    free = Request(weights="auto", formats=formats, kv_choices=(("int8", "int8"), ("int4", "int4")))
    request = resolve(tiny, profile, free)
    everything = []
    for chosen in itertools.product(formats, repeat=len(names)):
        for k, v in request.kv_choices:
            settled = replace(request, kv_k=k, kv_v=v)
            everything.append(
                make_plans(tiny, profile, settled, formats=dict(zip(names, chosen, strict=True)))
            )
    needs = sorted(p["language"].memory.need for p in everything)
    rates = sorted(p["language"].predicted.decode_tokens_per_s for p in everything)
    firsts = sorted(p["language"].predicted.first_token_ms for p in everything)
    at = int(tightness * (len(everything) - 1))
    budgets: list[dict[str, Any]] = [
        {"max_memory": needs[at]},
        {"min_tokens_per_second": rates[-1 - at]},
        {"max_memory": needs[at], "min_tokens_per_second": rates[len(rates) // 3]},
        {"max_first_token_ms": firsts[at], "max_memory": needs[-1 - at // 2]},
        {"bits": 5.0, "min_tokens_per_second": rates[len(rates) // 4]},
    ]
    for budget in budgets:
        asked = replace(request, **budget)
        have = budget.get("max_memory", profile.memory_available())
        good = [p for p in everything if p["language"].memory.need <= have and not unmet(tiny, asked, p)]
        plans, settled = choose(tiny, profile, asked)
        assert kept(tiny, settled, plans) == bool(good)
        if good:
            best = min(loss_of(tiny, profile, request, p["language"]) for p in good)
            assert loss_of(tiny, profile, request, plans["language"]) == pytest.approx(best, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    memory=st.integers(900, 3000),
    rate=st.one_of(st.none(), st.floats(100.0, 4000.0)),
    first=st.one_of(st.none(), st.floats(5.0, 200.0)),
    bits=st.one_of(st.none(), st.floats(2.0, 9.0)),
)
def test_budgets_are_kept_or_named(
    memory: int, rate: float | None, first: float | None, bits: float | None
) -> None:
    program = read_program(CONFIG).program
    asked = Request(
        weights="auto",
        max_memory=memory << 10,
        min_tokens_per_second=rate,
        max_first_token_ms=first,
        bits=bits,
        kv_choices=(("int8", "int8"), ("int4", "int4")),
    )
    profile = calibrated()
    plans, settled = choose(program, profile, asked)
    error, changes = shortfall(program, profile, settled, plans)
    if error is None:
        memory_plan, predicted = plans["language"].memory, plans["language"].predicted
        assert memory_plan.need <= memory << 10
        assert rate is None or predicted.decode_tokens_per_s >= rate * (1 - 1e-8)
        assert first is None or predicted.first_token_ms <= first * (1 + 1e-8)
        assert bits is None or bits_per_weight(program, plans) <= bits * (1 + 1e-8)
        return
    assert isinstance(error, DoesNotFit | BudgetNotMet)
    if isinstance(error, BudgetNotMet):
        assert fits(plans)
    for change in changes:
        assert "--" in change.text and change.text in str(error)


def test_more_bytes_or_more_time_never_give_more_loss(program: Program) -> None:
    profile = calibrated()
    losses = []
    for kib in (1000, 1100, 1250, 1500, 2000, 4000):
        request = Request(weights="auto", max_memory=kib << 10)
        plans, _ = choose(program, profile, request)
        if fits(plans):
            losses.append(loss_of(program, profile, request, plans["language"]))
    assert len(losses) > 3 and losses == sorted(losses, reverse=True)
    fastest = choose(program, profile, Request(weights="auto", min_tokens_per_second=1e6))[0]["language"]
    top = fastest.predicted.decode_tokens_per_s
    losses = []
    for share in (0.99, 0.9, 0.8, 0.6, 0.3):
        request = Request(weights="auto", min_tokens_per_second=share * top)
        plans, _ = choose(program, profile, request)
        assert plans["language"].predicted.decode_tokens_per_s >= share * top * (1 - 1e-8)
        losses.append(loss_of(program, profile, request, plans["language"]))
    assert losses == sorted(losses, reverse=True)


def test_the_cheapest_bytes_go_to_the_tensors_that_need_them(program: Program) -> None:
    """A file that says one tensor suffers a hundred times as much gets it more bits than its neighbours."""
    losses: dict[str, dict[str, float]] = {}
    for name, spec in program.tensors.items():
        if spec.role == "matrix":
            weight = 100.0 if name == "layers.2.down" else 1.0
            losses[name] = {f: weight * gaussian_error(f) for f in ("int4_g64", "int8_row")}
    found = Sensitivity(unit="kl", algorithm="rtn", text="t", tokens=1, losses=losses)
    limits = make_plans(program, CPU, Request(weights="int4_g64"))["language"].memory.need + 30_000
    plans, _ = choose(program, CPU, Request(weights="auto", max_memory=limits), sensitivity=found)
    formats = matrices(program, plans["language"])
    assert formats["layers.2.down"] == "int8_row"
    assert sum(f == "int8_row" for n, f in formats.items() if program.tensors[n].role == "matrix") <= 2
    assert formats["embed"] == "int8_row"  # nothing is known of it: as with a format asked for


def test_a_sensitivity_file_of_another_model_is_refused(program: Program) -> None:
    alien = Sensitivity(unit="kl", algorithm="rtn", text="t", tokens=1, losses={"layers.9.q": {"f16": 0.0}})
    with pytest.raises(BadConfig, match=r"layers\.9\.q.*did you mean"):
        choose(program, CPU, Request(weights="auto"), sensitivity=alien)
    short = Sensitivity(unit="kl", algorithm="rtn", text="t", tokens=1, losses={"layers.0.q": {"f16": 0.0}})
    with pytest.raises(BadConfig, match="no loss of 'layers"):
        choose(program, CPU, Request(weights="auto"), sensitivity=short)


def test_head_weights_and_formats_bound_the_choice(program: Program) -> None:
    asked = Request(weights="auto", head_weights="f16", formats=("int4_g64", "int4_g128"), max_memory=2 * MIB)
    formats = matrices(program, choose(program, CPU, asked)[0]["language"])
    assert {formats["embed"], formats["head"]} == {"f16"}
    assert set(formats.values()) <= {"f16", "int4_g64", "int4_g128"}


def test_a_cache_is_chosen_with_the_weights(program: Program) -> None:
    """Short of memory, the cache gives way as far as its loss is worth the bytes."""
    pairs = []
    for kib in (4000, 1050, 960):
        plans, settled = choose(
            program, CPU, Request(weights="auto", kv_choices=KV_CHOICES, max_memory=kib << 10)
        )
        pairs.append(KV_LOSSES[f"{settled.kv_k},{settled.kv_v}"])
        assert (settled.kv_k, settled.kv_v) == (plans["language"].kv.k, plans["language"].kv.v)
    assert pairs[0] == KV_LOSSES["f16,f16"] and pairs == sorted(pairs) and pairs[-1] > pairs[0]


def test_stages_are_priced_to_the_safe_side_and_exactly_where_runs_are_tied(program: Program) -> None:
    profile = calibrated()
    request = resolve(program, profile, Request(weights="auto", min_tokens_per_second=1.0))
    for tied in (False, True):
        made = state(inputs_of(program, profile, request), tied=tied)
        for turn in range(8):
            choice = [(turn * 5 + i * i) % len(unit) for i, unit in enumerate(made.problem.units)]
            taken = zip(made.names, made.problem.units, choice, strict=True)
            pairs = [dict(zip(names, unit[i].label, strict=True)) for names, unit, i in taken if names]
            formats = {name: fmt for pair in pairs for name, fmt in pair.items()}
            real = make_plans(program, profile, request, formats=formats)["language"].predicted
            said = 1 / made.problem.costs(choice)[made.row(DECODE) or 0]
            if tied:
                assert said == pytest.approx(real.decode_tokens_per_s, rel=1e-9)
            assert 0.8 * real.decode_tokens_per_s < said <= real.decode_tokens_per_s * (1 + 1e-9)


def test_runs_break_only_where_it_pays(program: Program) -> None:
    """A stage that costs much keeps q, k and v in one format when time is short; one for nothing does not."""

    def broken(stage_us: float) -> int:
        profile = calibrated(stage_us=stage_us)
        fastest = choose(program, profile, Request(weights="auto", min_tokens_per_second=1e7))[0]["language"]
        rate = 0.9 * fastest.predicted.decode_tokens_per_s
        asked = Request(weights="auto", min_tokens_per_second=rate)
        plan = require_fit(program, profile, asked)[0]["language"]
        runs = [[plan.tensors[n].format for n in run] for run in linear_runs(program)]
        return sum(a != b for run in runs for a, b in itertools.pairwise(run))

    assert broken(1000.0) == 0 < broken(0.0)


def test_a_plan_that_stays_in_the_cache_is_found(program: Program) -> None:
    """Read from memory nothing is fast enough; from the cache a small plan is."""
    slow = calibrated()
    top = choose(program, slow, Request(weights="auto", min_tokens_per_second=1e7))[0]["language"]
    asked = Request(weights="auto", min_tokens_per_second=1.05 * top.predicted.decode_tokens_per_s)
    with pytest.raises(BudgetNotMet, match="the best plan has"):
        require_fit(program, slow, asked)
    cached = calibrated(cache_bytes=500_000)
    plans, _ = require_fit(program, cached, asked)
    assert weights_read(program, plans["language"].tensors) <= 500_000
    made = state(inputs_of(program, cached, resolve(program, cached, asked)), cached=True)
    assert made.row(CACHE) == 0


def test_what_cannot_be_had_is_said_with_what_can(program: Program) -> None:
    profile = load_profile("orin-nano-8gb")
    with pytest.raises(BudgetNotMet) as caught:
        require_fit(
            program, profile, Request(weights="auto", min_tokens_per_second=1e6, max_memory=400 * MIB)
        )
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert (
        "1e+06 tokens/s are asked for, within 400.0 MiB of orin-nano-8gb, mode 25W the best plan has" in text
    )
    assert "--min-tokens-per-second " in text
    with pytest.raises(BudgetNotMet, match=r"--bits 1 is asked for.* to keep it, use --bits"):
        require_fit(program, profile, Request(weights="auto", bits=1.0))
    rate = (
        0.999 * make_plans(program, profile, Request(weights="f16"))["language"].predicted.decode_tokens_per_s
    )
    with pytest.raises(
        BudgetNotMet, match=r"--weights f16 has .* use --weights auto, or --power-mode 25W, or"
    ):
        require_fit(program, profile, Request(weights="f16", power_mode="15W", min_tokens_per_second=rate))
    with pytest.raises(
        DoesNotFit, match=r"are needed at the least, --max-memory allows 1.0 MiB; to fit, use --max"
    ):
        require_fit(program, profile, Request(weights="auto", max_memory=MIB))


def test_easing_a_budget_as_told_is_enough(program: Program) -> None:
    asked = Request(weights="auto", min_tokens_per_second=1e6)
    plans, settled = choose(program, calibrated(), asked)
    _, changes = shortfall(program, calibrated(), settled, plans)
    rate = float(changes[-1].options["min-tokens-per-second"])
    require_fit(program, calibrated(), replace(asked, min_tokens_per_second=rate))


def test_every_format_has_a_modelled_loss_that_falls_with_its_bits() -> None:
    errors = {f: gaussian_error(f) for f in FORMATS}
    assert errors["f32"] == 0.0 and all(0.0 < e < 0.6 for f, e in errors.items() if f != "f32")
    assert (
        0.0
        < errors["f16"]
        < errors["int8_row"]
        < errors["int4_g32"]
        < errors["int4_g64"]
        < errors["int4_g128"]
    )


def test_the_same_request_gives_the_same_plan(program: Program) -> None:
    asked = Request(weights="auto", max_memory=1200 << 10, kv_choices=KV_CHOICES, bits=6.0)
    assert choose(program, CPU, asked) == choose(program, CPU, asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_memory": 0}, "--max-memory is 0"),
        ({"bits": -1.0}, "--bits is -1.0"),
        ({"min_tokens_per_second": float("inf")}, "--min-tokens-per-second"),
        ({"max_first_token_ms": float("nan")}, "--max-first-token-ms"),
        ({"formats": ("int4_g46",)}, "did you mean 'int4_g64'"),
        ({"kv_choices": (("int8", "int8c"),)}, "V cannot be"),
    ],
)
def test_wrong_budgets_are_named(program: Program, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        choose(program, CPU, Request(weights="auto", **change))
    assert words in str(caught.value)
