"""The search over whole plans, with trials whose truth is known: no build is made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_shrinkage import NAMES, PROGRAM, planted

from builders.fitting import bits_per_weight
from builders.journal import Journal
from builders.planner import Request, resolve
from builders.refine import LEAST, UNIFORM, Question, refine
from builders.sensitivity import Sensitivity, read_sensitivity
from builders.shrinkage import uniform_formats
from builders.watcher import Watcher
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import load_profile
from edge_runtime.errors import BadConfig, ValueOutOfRange

pytest.importorskip("scipy")
CPU = load_profile("cpu")


def asked(bits: float = 4.0, **more: object) -> Question:
    request = Request(weights="auto", bits=bits, context=64, **more)  # type: ignore[arg-type]
    return Question(PROGRAM, CPU, resolve(PROGRAM, CPU, request))


def formats_of(question: Question, losses: Sensitivity) -> dict[str, str]:
    plans = question.plans(losses)
    assert plans is not None
    return {n: plans[LANGUAGE].tensors[n].format for n in NAMES}


def adding(true: Sensitivity) -> Callable[[Plan], float]:
    """Truth: losses that add up."""
    return lambda plan: sum(true.losses[n][plan.tensors[n].format] for n in NAMES)


def clashing(true: Sensitivity) -> Callable[[Plan], float]:
    """Truth: every neighbour in another format costs as much again as all tensors together."""

    def measure(plan: Plan) -> float:
        formats = [plan.tensors[n].format for n in NAMES]
        return adding(true)(plan) * (1 + sum(a != b for a, b in pairwise(formats)))

    return measure


def test_luck_is_not_taken_for_quality() -> None:
    """True loss of the plan, refined against as measured: never worse, better in 5 of 6 cases."""
    question, better = asked(), 0
    for seed in range(6):
        true, measured = planted(seed, 0.3)
        found = refine(question, measured, adding(true), 7)
        before, after = (question.plans(x)[LANGUAGE] for x in (measured, found))  # type: ignore[index]
        assert adding(true)(after) <= adding(true)(before)
        assert min(t.kl for t in found.tried) == pytest.approx(adding(true)(after), rel=1e-12)
        assert bits_per_weight(PROGRAM, question.plans(found)) <= 4.0 * (1 + 1e-8)  # type: ignore[arg-type]
        better += adding(true)(after) < adding(true)(before)
    assert better >= 5


def test_where_tensors_clash_a_uniform_plan_is_found() -> None:
    """The sum of losses cannot know it: its own plan is many times worse."""
    question = asked()
    true, measured = planted(0, 0.1)
    found = refine(question, measured, clashing(true), 12)
    formats = formats_of(question, found)
    assert len(set(formats.values())) == 1
    assert found.tried[0].plan == "measured"
    assert found.tried[0].kl > 5 * min(t.kl for t in found.tried)


@pytest.mark.parametrize("seed", range(6))
def test_no_worse_than_uniform_plans_of_the_same_budgets(seed: int) -> None:
    """Whatever the truth is: here figures that have nothing to do with the losses."""
    question = asked(bits=(3.6, 4.6)[seed % 2])
    _, measured = planted(seed, 0.5)

    def measure(plan: Plan) -> float:
        key = "/".join(plan.tensors[n].format for n in NAMES)
        return float(np.random.default_rng([seed, *key.encode()]).random())

    found = refine(question, measured, measure, 6)
    best = measure(question.plans(found)[LANGUAGE])  # type: ignore[index]
    uniform = 0
    for fmt in uniform_formats(measured):
        losses = {n: {fmt: of[fmt]} for n, of in measured.losses.items()}
        plans = question.plans(Sensitivity(unit="kl", algorithm="rtn", text="", tokens=1, losses=losses))
        if plans is not None and uniform < UNIFORM:
            uniform += 1
            assert best <= measure(plans[LANGUAGE])
    assert uniform == UNIFORM
    assert best <= measure(question.plans(measured)[LANGUAGE])  # type: ignore[index]


def test_the_file_alone_gives_the_plan_again(tmp_path: Path) -> None:
    question = asked()
    true, measured = planted(1, 0.3)
    found = refine(question, measured, adding(true), 8)
    assert refine(question, measured, adding(true), 8) == found
    found.save(tmp_path / "s.json")
    assert formats_of(question, read_sensitivity(tmp_path / "s.json")) == formats_of(question, found)
    assert len(found.tried) == 8 and not measured.tried
    data = json.loads((tmp_path / "s.json").read_text())
    for wrong, message in (
        ({"plans": "measured", "kl": 0.1}, "plan"),
        ({"plan": "measured", "kl": -0.1}, "a plan tried.*expected a finite number"),
    ):
        (tmp_path / "s.json").write_text(json.dumps(data | {"tried": [wrong]}))
        with pytest.raises(BadConfig, match=message):
            read_sensitivity(tmp_path / "s.json")


def test_a_killed_search_measures_no_plan_twice(tmp_path: Path) -> None:
    question, seen = asked(), []
    true, measured = planted(2, 0.3)
    want = refine(question, measured, adding(true), 10)

    def killed(plan: Plan) -> float:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(plan)
        return adding(true)(plan)

    def going_on(plan: Plan) -> float:
        seen.append(plan)
        return adding(true)(plan)

    path = tmp_path / "notes.jsonl"
    with pytest.raises(KeyboardInterrupt):
        refine(question, measured, killed, 10, notes=Journal(path, "these"))
    path.write_text(path.read_text() + '["trial", "abc')  # the last line was cut
    assert refine(question, measured, going_on, 10, notes=Journal(path, "these")) == want
    assert len(seen) == len(want.tried) == 10
    other = refine(question, measured, going_on, 10, notes=Journal(path, "others"))
    assert other == want and len(seen) == 20


def test_few_trials_or_no_plan_at_all_leave_the_losses_as_they_are() -> None:
    def never(plan: Plan) -> float:
        raise AssertionError

    _, measured = planted(3, 0.3)
    assert refine(asked(), measured, never, LEAST - 1) is measured
    assert refine(asked(bits=1.0), measured, never, 12) is measured


def test_a_plan_that_cannot_be_built_is_passed_over() -> None:
    true, measured = planted(4, 0.3)
    question, steps = asked(), []

    class Steps(Watcher):
        def step(self, what: str) -> None:
            steps.append(what)

    first = formats_of(question, measured)

    def measure(plan: Plan) -> float:
        if {n: plan.tensors[n].format for n in NAMES} == first:
            raise ValueOutOfRange("too large")
        return adding(true)(plan)

    found = refine(question, measured, measure, 6, watcher=Steps())
    assert formats_of(question, found) != first
    assert len(found.tried) == 5 and len(steps) == 6 and steps[0] == "measured: KL inf"

    def nothing(plan: Plan) -> float:
        raise ValueOutOfRange("too large")

    assert refine(question, measured, nothing, 6) == measured


def test_a_cheaper_cache_counts() -> None:
    """Where the cache is chosen too, what it costs is part of a trial's figure."""
    question = asked(bits=None, max_memory=160 << 10, kv_choices=(("f16", "f16"), ("int8", "int8")))  # type: ignore[arg-type]
    true, measured = planted(5, 0.3)
    found = refine(question, measured, adding(true), 6)
    plan = question.plans(found)[LANGUAGE]  # type: ignore[index]
    pair = {"int8": 1.46e-3, "f16": 1.35e-6}[plan.kv.k]
    assert min(t.kl for t in found.tried) == pytest.approx(adding(true)(plan) + pair, rel=1e-6)
