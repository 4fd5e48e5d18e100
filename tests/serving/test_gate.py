"""The gate on a fake clock: it opens where guessing pays, shuts where it loses, and looks again.

The bounds are those of issue 3: time lost on text where guesses are useless, within 3% of plain decoding.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from history_model import make_session
from speaking_engine import vocabulary
from timed_model import FakeClock, Parrot, Timed

from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.gate import Gate, Offer, Record, expected
from edge_runtime.serving.request import Request

VOCAB = vocabulary().size
STEPS = 5_000  # plain steps of a run


def target_cost(tokens: int) -> float:
    """Seconds of a step on a device that is bound by memory: more tokens cost little."""
    return 10e-3 + 0.3e-3 * tokens


def draft_cost(share: float) -> Callable[[int], float]:
    return lambda tokens: share * target_cost(tokens)


class Run:
    """A session with a draft model over parrots; its draft is right with a chance that may change."""

    def __init__(
        self,
        *,
        share: float = 0.15,
        chance: float = 0.0,
        sequences: int = 1,
        target: Callable[[int], float] = target_cost,
    ) -> None:
        self.clock = FakeClock()
        self.target_cost = target
        self.chance = chance
        self.random = random.Random(7)
        self.share = share
        self.sequences = sequences
        self.session, _ = make_session(
            context=1100,
            sequences=sequences,
            tokens=256,
            logits=64,
            pages=70 * sequences,
            max_waiting=500,
            proposer=self.draft,
            gated=True,
            clock=self.clock,
            kind=Parrot,  # type: ignore[arg-type]
        )
        self.timed = Timed(self.session._executor, self.clock, target)
        self.session._loop._executor = self.timed  # type: ignore[assignment]

    def draft(self, kv: KvPlan, step: StepShape) -> DraftModel:
        parrot = Parrot(kv, step, VOCAB)
        parrot.wrong = lambda: self.random.random() >= self.chance
        timed = Timed(parrot, self.clock, draft_cost(self.share))
        return DraftModel(timed, step, kv.page_tokens, 8, self.clock)  # type: ignore[arg-type]

    def serve(self, tokens: int, *, prompt: int = 20, answer: int = 501) -> tuple[float, float]:
        """Seconds that so many tokens took to decode, and what they would take without guesses.

        As many requests at a time as the session has room for, each with a prompt of its own.
        """
        session, spent, plain, chosen = self.session, 0.0, 0.0, 0
        while chosen < tokens:
            for _ in range(self.sequences):
                ids = [self.random.randrange(5, VOCAB) for _ in range(prompt)]
                session.submit(Request(prompt=ids, max_tokens=answer))
            while any(s.pending != 1 for s in (*session._scheduler.running, *session._scheduler.waiting)):
                session.step()  # the prompts; what they cost is not the gate's doing
            begin, rows = self.clock(), 0
            while session.in_flight:
                rows += sum(event.token is not None for event in session.step())
            spent += self.clock() - begin
            plain += rows / self.sequences * self.target_cost(self.sequences)
            chosen += rows
        return spent, plain

    @property
    def gate(self) -> Gate:
        return self.session.speculation.gate


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_useless_guesses_cost_three_percent_at_most(share: float, sequences: int) -> None:
    run = Run(share=share, chance=0.0, sequences=sequences)
    with run.session:
        spent, plain = run.serve(STEPS * sequences)
    assert run.session.metrics.accepted == 0
    assert run.session.metrics.drafted < 100 * sequences  # the longer it stays shut, the less often it looks
    assert 1.0 < spent / plain <= 1.03  # it did try, and that was all
    assert not run.gate.is_open


@pytest.mark.parametrize("answer", [30, 64])
def test_nor_do_they_where_every_answer_is_short_and_its_prompt_long(answer: int) -> None:
    """A draft model that reads each prompt first must not do so in vain time and again."""
    run = Run(share=0.2, chance=0.0)
    with run.session:
        spent, plain = run.serve(STEPS, prompt=900, answer=answer)
    assert 1.0 < spent / plain <= 1.03


def test_reading_prompts_in_vain_is_paid_back_before_it_is_done_again() -> None:
    """One trial takes as long as some forty plain steps here, which is more than all the credit."""
    run = Run(share=0.9, chance=0.0)
    with run.session:
        spent, plain = run.serve(2 * STEPS, prompt=1000, answer=80)
    assert 1.0 < spent / plain <= 1.02


def test_guesses_that_are_right_now_and_then_but_do_not_pay_cost_no_more() -> None:
    """At this share and chance the best length brings 0.97 of plain decoding's rate."""
    run = Run(share=0.5, chance=0.45)
    with run.session:
        spent, plain = run.serve(STEPS)
    assert spent / plain <= 1.03


@pytest.mark.parametrize(("chance", "least"), [(0.6, 1.4), (0.8, 2.0), (0.95, 3.0)])
def test_right_guesses_pay_nearly_as_much_as_they_can(chance: float, least: float) -> None:
    run = Run(share=0.05, chance=chance)
    with run.session:
        spent, plain = run.serve(STEPS)
    best = max(
        expected(chance, k) * target_cost(1) / (target_cost(1 + k) + k * draft_cost(0.05)(1))
        for k in range(1, 9)
    )
    assert least < plain / spent <= best * 1.02
    assert plain / spent >= 0.9 * best  # of the formula's best length (Leviathan et al. 2023)
    assert run.gate.is_open


def test_a_change_to_useful_text_is_noticed_and_one_back_is_too() -> None:
    run = Run(share=0.05, chance=0.0)
    with run.session:
        run.serve(3000)
        assert not run.gate.is_open
        before = run.session.metrics.steps
        run.chance = 0.9
        while not run.gate.is_open:
            run.serve(100, answer=100)
            assert run.session.metrics.steps - before <= 1100  # the longest rest and what it takes to try
        spent, plain = run.serve(2000)
        assert plain / spent > 2
        run.chance = 0.0
        spent, plain = run.serve(STEPS)
        assert spent / plain <= 1.03 and not run.gate.is_open


def test_text_that_changes_all_the_time_loses_nothing() -> None:
    run = Run(share=0.15, chance=0.0)
    total = reference = 0.0
    with run.session:
        for i in range(40):
            run.chance = 0.85 if i % 2 else 0.0
            spent, plain = run.serve(200, answer=200)
            total, reference = total + spent, reference + plain
    assert total / reference <= 1.03


def test_a_device_bound_by_arithmetic_gets_short_guesses_or_none() -> None:
    """Where a row costs as much as a step, even right guesses cannot pay."""
    run = Run(share=0.3, chance=0.9, target=lambda tokens: 1e-3 + 10e-3 * tokens)
    with run.session:
        spent, plain = run.serve(STEPS)
    assert spent / plain <= 1.03


class Noisy:
    """A machine that others use too: each 20th step is held up, and so are the first few."""

    def __init__(self) -> None:
        self.steps = 0
        self.heat = 1.0

    def __call__(self, tokens: int) -> float:
        self.steps += 1
        held_up = 10.0 if self.steps in (2, 3) else 4.0 if self.steps % 20 == 0 else 1.0
        return self.heat * held_up * target_cost(tokens)


@pytest.mark.parametrize("chance", [0.0, 0.9])
def test_steps_that_are_held_up_decide_nothing(chance: float) -> None:
    """Nor do the first two plain ones, on which all later ones would be judged."""
    run = Run(share=0.2, chance=chance, target=Noisy())
    with run.session:
        spent, _ = run.serve(1000)
    plain = 1000 * target_cost(1) * (1 + 3 / 20) + 2 * 9 * target_cost(1)
    if chance:
        assert spent < 0.7 * plain and run.gate.is_open
    else:
        assert spent <= 1.03 * plain and not run.gate.is_open


def test_what_was_measured_on_a_hot_device_is_not_believed_for_ever() -> None:
    """Plain steps were timed while all took three times as long; guesses would seem to pay ever after."""
    noisy = Noisy()
    noisy.heat = 3.0
    run = Run(share=0.4, chance=0.5, target=noisy)
    with run.session:
        run.serve(300, answer=301)
        assert run.gate.is_open
        noisy.heat = 1.0
        spent, _ = run.serve(1000, answer=1001)
    assert spent <= 1.05 * 1000 * target_cost(1) * (1 + 3 / 20)


def test_a_device_that_grows_hot_is_measured_anew() -> None:
    """All steps of the target take three times as long from one moment to the next, and then as before."""
    noisy = Noisy()
    run = Run(share=0.25, chance=0.5, target=noisy)
    rates = []
    with run.session:
        for heat in (1.0, 3.0, 1.0):
            noisy.heat = heat
            run.serve(1000)
            spent, _ = run.serve(2000)
            rates.append(2000 / spent * heat)
    # The draft does not slow down with it, so that guessing pays more while it is hot, and less again after
    assert rates[1] > 1.02 * rates[0] and rates[2] == pytest.approx(rates[0], rel=0.05)


def test_nobody_waits_for_the_gate() -> None:
    """Every step brings every running request a token, whatever the gate is at."""
    run = Run(share=0.6, chance=0.0, sequences=4)
    with run.session as session:
        for _ in range(4):
            session.submit(Request(prompt=[7] * 9, max_tokens=400))
        session.step()
        while session.in_flight:
            assert {event.request for event in session.step()} == {1, 2, 3, 4}


def test_expected_tokens_are_those_of_the_formula() -> None:
    rng = random.Random(3)
    for chance in (0.0, 0.3, 0.8, 1.0):
        for length in (1, 4, 8):
            assert expected(chance, length) == pytest.approx(sum(chance**i for i in range(length + 1)))
    record = Record()
    for _ in range(4000):
        stood = next((i for i in range(6) if rng.random() >= 0.7), 6)
        record.note(6, stood)
    assert record.drafted == 24_000
    assert record.chance(0.0) == pytest.approx(0.7, abs=0.2)  # it remembers about ten verifications


def test_a_gate_without_offers_stays_shut() -> None:
    gate = Gate()
    gate.note_plain(1.0)
    assert gate.choose(Offer(0, 1, 1.0), [], None) == 0 and not gate.is_open
