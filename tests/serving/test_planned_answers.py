"""The shipped planner under its plan's schema: guesses and company change no token, number or text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.cli import main as edge_build
from edge_runtime import Grammar, Request, Sampling, Session, Token, open_engine
from edge_runtime.backends.cpu import BACKEND

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)
pytest.importorskip("llguidance")

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
SCHEMA = json.loads((PLANNER / "plan.schema.json").read_text(encoding="utf-8"))
WAYS = ("draft", "lookup", "medusa")
REQUESTS = 16
LONGEST = 96


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planner") / "planner.edge"
    words = ["--profile", "cpu", "--weights", "int4_g64", "--kv", "int8", "--context", "256", "--no-eval"]
    words += ["--sequences", "8", "--kv-tokens", "2048", "--step-tokens", "128", "--json"]
    words += ["--draft", str(PLANNER / "draft"), "--medusa", str(PLANNER / "medusa")]
    assert edge_build([*words, "-o", str(out), str(PLANNER / "model")]) == 0
    return out


def commands() -> list[str]:
    lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:REQUESTS]]


def asked(session: Session) -> list[Request]:
    """Every second with the grammar; log-probabilities, stop strings and stop ids among them."""
    grammar = Grammar.json_schema(SCHEMA)
    found = []
    for i, command in enumerate(commands()):
        options = {
            "max_tokens": LONGEST,
            "grammar": grammar if i % 2 == 0 else None,
            "stop": ["kitchen", '"}]'] if i % 4 == 3 else [],
            "priority": i % 3,
        }
        sampling = Sampling(logprobs=3) if i % 3 == 0 else Sampling()
        found.append(session.chat_request([{"role": "user", "content": command}], sampling, **options))
    return found


Told = list[tuple[object, ...]]


def told(events: list[Token]) -> Told:
    return [(e.token, e.text, e.logprob, e.top, e.finish_reason, e.error) for e in events]


def together(session: Session, requests: list[Request]) -> list[Told]:
    numbers = {session.submit(request): i for i, request in enumerate(requests)}
    events: list[list[Token]] = [[] for _ in requests]
    while session.in_flight:
        for event in session.step():
            events[numbers[event.request]].append(event)
    return [told(es) for es in events]


@pytest.fixture(scope="module")
def alone(engine: Path) -> list[Told]:
    """One at a time, without guesses, nothing in the cache."""
    found = []
    with open_engine(engine, backend="cpu", speculate="off", threads=1) as session:
        for request in asked(session):
            session._tree.drop(None)
            found += together(session, [request])
    return found


def test_the_answers_are_worth_comparing(alone: list[Told]) -> None:
    texts = ["".join(str(event[1]) for event in events) for events in alone]
    reasons = [events[-1][4] for events in alone]
    assert reasons.count("stop") >= REQUESTS - 2 and len(set(texts)) > REQUESTS / 2
    for i, text in enumerate(texts):
        if i % 2 == 0 and reasons[i] == "stop":
            assert isinstance(json.loads(text), list)
        if i % 4 == 3:
            assert "kitchen" not in text and '"}]' not in text
    assert any(event[2] is not None for events in alone for event in events)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_guesses_and_company_change_nothing(engine: Path, alone: list[Told], way: str, gated: bool) -> None:
    """Tokens, texts, log-probabilities to the bit, reasons; the prefix cache takes part."""
    with open_engine(engine, backend="cpu", speculate=way, threads=2, gated=gated) as session:
        assert together(session, asked(session)) == alone
        assert together(session, asked(session)) == alone
        assert gated or session.metrics.accepted > 100
        assert session.metrics.cached_tokens > 100
        assert session.pages_used == session.in_flight == 0


@pytest.mark.parametrize("way", ["off", *WAYS])
def test_plans_drawn_at_temperature_one_are_valid(engine: Path, way: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    grammar = Grammar.json_schema(SCHEMA)
    with open_engine(engine, backend="cpu", speculate=way, threads=2, gated=False) as session:
        requests = [
            session.chat_request(
                [{"role": "user", "content": command}],
                Sampling(temperature=1.0, seed=i),
                max_tokens=150,
                grammar=grammar,
            )
            for i, command in enumerate(commands())
        ]
        plans = 0
        for events in together(session, requests):
            assert events[-1][4] in ("stop", "length")
            if events[-1][4] == "stop":
                jsonschema.validate(json.loads("".join(str(event[1]) for event in events)), SCHEMA)
                plans += 1
        assert plans > REQUESTS / 2
        assert way == "off" or session.metrics.accepted > 50


def test_a_seed_gives_one_text_whatever_shares_the_steps(engine: Path) -> None:
    with open_engine(engine, backend="cpu", speculate="off", threads=2) as session:
        requests = [
            session.chat_request(
                [{"role": "user", "content": c}], Sampling(temperature=1.5, seed=i), max_tokens=40
            )
            for i, c in enumerate(commands())
        ]
        apart = [together(session, [request])[0] for request in requests]
        assert together(session, requests) == apart
        assert len({str(events) for events in apart}) > REQUESTS / 2
