"""K per channel under a session: company, shared beginnings and guesses change no token of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.parts import Extras
from builders.pipeline import Options, build
from builders.planner import Request
from edge_runtime import Sampling, open_engine
from edge_runtime.backends.cpu import BACKEND

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
HOUSE = "you are a robot in a house with a kitchen, a pantry, a garage and a garden. "
COMMANDS = (
    "bring me the red mug from the kitchen",
    HOUSE + "bring me the red mug from the kitchen",
    HOUSE + "go to the pantry then find a sponge and put it on the kitchen table",
    HOUSE + "go to the pantry then find a sponge and put it on the kitchen table",  # its pages become one's
    "please follow Anna to the garage",
    HOUSE + "go to the pantry then find a book",
    "go to the pantry then find a sponge and put it on the kitchen table",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planner") / "channels.edge"
    request = Request(weights="f16", kv_k="int4c", kv_v="int4", context=256, sequences=4, kv_tokens=1024)
    extras = Extras(draft=PLANNER / "draft")
    build(
        Options(
            model=PLANNER / "model", output=out, profile="cpu", request=request, extras=extras, measure=False
        )
    )
    return out


def answers(engine: Path, kv: str, way: str, together: int) -> list[list[int]]:
    """Token ids of the greedy answer to each command, `together` of them in flight; guesses at every step."""
    found: list[list[int]] = [[] for _ in COMMANDS]
    with open_engine(engine, backend="cpu", kv=kv, speculate=way, gated=False) as session:
        waiting, owner = list(enumerate(COMMANDS)), {}
        while waiting or owner:
            while waiting and len(owner) < together:
                i, text = waiting.pop(0)
                request = session.chat_request([{"role": "user", "content": text}], Sampling(), max_tokens=90)
                owner[session.submit(request)] = i
            for event in session.step():
                if event.token is not None:
                    found[owner[event.request]].append(event.token)
                if event.finish_reason is not None:
                    assert event.finish_reason == "stop", event.error
                    del owner[event.request]
        if way != "off":
            assert session.metrics.accepted > 20
    return found


@pytest.mark.parametrize("kv", ["int4c", "int8c,f16"])
def test_answers_are_those_of_one_request_at_a_time(engine: Path, kv: str) -> None:
    want = answers(engine, kv, "off", 1)
    for way, together in (("off", 4), ("draft", 1), ("draft", 4), ("lookup", 3)):
        assert answers(engine, kv, way, together) == want, (way, together)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_request_that_follows_its_twin(engine: Path, length: int) -> None:
    """Its pages become those of the first as they fill, in the middle of what its draft has read."""
    with open_engine(engine, backend="cpu", draft_length=length, gated=False) as session:
        request = session.chat_request([{"role": "user", "content": COMMANDS[2]}], Sampling(), max_tokens=90)
        want = list(session.answer(request).tokens)
    for lag in range(1, 12):
        with open_engine(engine, backend="cpu", draft_length=length, gated=False) as session:
            found: dict[int, list[int]] = {session.submit(request): []}
            for _ in range(lag):
                for event in session.step():
                    found[event.request].append(event.token or 0)
            found[session.submit(request)] = []
            while session.in_flight:
                for event in session.step():
                    assert event.finish_reason != "error", event.error
                    found[event.request].append(event.token or 0)
        assert list(found.values()) == [want, want], lag


def test_the_known_answer_leaves_running_requests_alone(engine: Path) -> None:
    """It takes a slot that no request has; so the next step finds the keys of its open page."""
    with open_engine(engine, backend="cpu", speculate="off") as session:
        prompt = session.chat_prompt([{"role": "user", "content": COMMANDS[1]}])
        want = session.complete(prompt, max_tokens=40).tokens
        stream = session.generate(prompt, max_tokens=40)
        first = [next(stream) for _ in range(5)]
        session.verify()
        got = [e.token for e in (*first, *stream) if e.token is not None]
        assert tuple(got) == want
