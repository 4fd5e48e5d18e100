"""Bad requests: a typed error that names the fault, the next request right, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from history_model import assert_idle, continuation, make_session
from speaking_engine import vocabulary, write_speaking

from edge_runtime import (
    BadRequest,
    EdgeError,
    Grammar,
    QueueFull,
    Request,
    Sampling,
    Unsupported,
    open_engine,
)
from edge_runtime.backends import cpu
from edge_runtime.serving.session import Session

VOCAB = vocabulary().size
CONTEXT = 64
Ask = Callable[[Session], object]
GOOD = [7, 8, 9]


def prompt(value: object) -> Ask:
    return lambda session: session.complete(value)  # type: ignore[arg-type]


def option(name: str, value: object) -> Ask:
    return lambda session: session.complete("hi", **{name: value})


def sampling(name: str, value: object) -> Ask:
    return lambda session: session.complete("hi", Sampling(**{name: value}))  # type: ignore[arg-type]


def grammar(make: Callable[[], Grammar]) -> Ask:
    return lambda session: session.complete("hi", grammar=make())


SCHEMA = Grammar.json_schema
CASES: list[tuple[Ask, str]] = [
    (prompt(""), "the prompt is empty"),
    (prompt([]), "the prompt is empty"),
    (prompt([5] * CONTEXT), "the prompt has 64 tokens, the context holds 64"),
    (prompt("word " * 100), "the context holds 64"),
    (prompt("x" * (1 << 20)), "1048576 bytes"),
    (prompt([5] * (1 << 20)), "the context holds 64"),
    (prompt("a\udc80"), "lone surrogate at character 1"),
    (prompt(b"\xff\xfe"), "the prompt is bytes, expected text or a list"),
    (prompt(bytearray(b"hi")), "the prompt is bytearray"),
    (prompt(None), "the prompt is NoneType"),
    (prompt({"role": "user"}), "the prompt is dict"),
    (prompt([5, VOCAB]), f"token 1 of the prompt is {VOCAB}, expected an id from 0 to {VOCAB - 1}"),
    (prompt([-1]), "token 0 of the prompt is -1"),
    (prompt([2**64]), f"token 0 of the prompt is {2**64}"),
    (prompt([True]), "token 0 of the prompt is True"),
    (prompt([1.0]), "token 0 of the prompt is 1.0"),
    (prompt(["5"]), "token 0 of the prompt is '5'"),
    (option("max_tokens", 0), "max_tokens is 0, expected an integer of at least 1"),
    (option("max_tokens", 1.5), "max_tokens is 1.5"),
    (option("max_tokens", "9"), "max_tokens is '9'"),
    (option("stop", "text"), "stop is str, expected a list of strings"),
    (option("stop", [""]), "a stop string is ''"),
    (option("stop", [3]), "a stop string is 3"),
    (option("stop", ["x"] * 65), "at most 64 stop strings"),
    (option("stop_ids", [VOCAB]), f"stop id {VOCAB} is no token"),
    (option("stop_ids", ["2"]), "stop_ids must be a list of token ids"),
    (option("stop_ids", 2), "stop_ids must be a list of token ids"),
    (option("deadline", 0), "deadline is 0, expected seconds above 0"),
    (option("deadline", -1.0), "deadline is -1.0"),
    (option("deadline", float("nan")), "deadline is nan"),
    (option("deadline", float("inf")), "deadline is inf"),
    (option("deadline", "1"), "deadline is '1'"),
    (option("deadline", True), "deadline is True"),
    (option("priority", 1.0), "priority is 1.0, expected an integer"),
    (option("priority", 10**7), "priority is 10000000"),
    (option("priority", None), "priority is None"),
    (option("adapter", "tidy"), "no adapter 'tidy' is loaded"),
    (option("adapter", 3), "adapter is int, expected the name of an adapter"),
    (option("grammar", {"type": "object"}), "grammar is dict, expected edge_runtime.Grammar"),
    (option("max_token", 3), "unknown option 'max_token' of a request; did you mean 'max_tokens'?"),
    (option("temperature", 1.0), "unknown option 'temperature' of a request"),
    (lambda s: s.complete("hi", {"temperature": 1}), "sampling is dict"),  # type: ignore[arg-type]
    (sampling("temperature", -1.0), "temperature is -1.0"),
    (sampling("top_p", 0.0), "top_p is 0.0"),
    (sampling("seed", 2**64), "seed is 18446744073709551616"),
    (sampling("logprobs", 21), "logprobs is 21"),
    (lambda s: s.chat([]), "messages"),
    (lambda s: s.chat([{"role": "user"}]), "content"),
    (lambda s: s.chat("hi"), "messages"),  # type: ignore[arg-type]
    (lambda s: s.save_prefix("", "/nowhere"), "the prompt is empty"),
    (lambda s: s.drop_adapter("tidy"), "no adapter 'tidy' is loaded"),
]
UNMET: list[tuple[Ask, str]] = [
    (grammar(lambda: SCHEMA({"type": "string", "minLength": 5, "maxLength": 2})), "minLength (5) is greater"),
    (grammar(lambda: SCHEMA({"allOf": [{"type": "string"}, {"type": "integer"}]})), "Unsatisfiable schema"),
    (grammar(lambda: SCHEMA({"enum": []})), "the schema cannot be used"),
    (grammar(lambda: SCHEMA("false")), "the schema is false, which no answer can meet"),
    (grammar(lambda: SCHEMA('{"type":')), "the schema is not JSON"),
    (grammar(lambda: SCHEMA({"$ref": "#/nope"})), "does not exist"),
    (grammar(lambda: SCHEMA({"type": "strange"})), "the schema cannot be used"),
    (grammar(lambda: Grammar.regex(r"[^\s\S]")), "nothing can meet it"),
    (grammar(lambda: Grammar.regex("(?=a)b")), "look-around"),
    (grammar(lambda: Grammar.regex("a{1000000}")), "the regular expression"),
    (grammar(lambda: Grammar.ebnf("start: start")), "nothing can meet it"),
    (grammar(lambda: Grammar.ebnf("a: b")), "the EBNF grammar cannot be used"),
    (grammar(lambda: Grammar.regex("x\ud800")), "not valid Unicode"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, tuple[int, ...]]]:
    """A real engine, and its answer to GOOD before anything went wrong."""
    path = tmp_path_factory.mktemp("bad") / "speaking.edge"
    write_speaking(path)
    backend = "cpu" if cpu.BACKEND.available().ok else "reference"
    with open_engine(path, backend=backend, threads=1) as session:
        yield session, session.complete(GOOD, max_tokens=6).tokens


def refused(session: Session, ask: Ask, message: str, want: tuple[int, ...]) -> None:
    before = dict(session.metrics.finished)
    with pytest.raises((BadRequest, Unsupported)) as caught:
        ask(session)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
    assert_idle(session)
    assert session.metrics.finished == before
    assert session.complete(GOOD, max_tokens=6).tokens == want
    assert_idle(session)


@pytest.mark.parametrize(("ask", "message"), CASES, ids=range(len(CASES)))
def test_it_is_refused_and_the_next_request_is_right(
    served: tuple[Session, tuple[int, ...]], ask: Ask, message: str
) -> None:
    refused(served[0], ask, message, served[1])


@pytest.mark.parametrize(("ask", "message"), UNMET, ids=range(len(UNMET)))
def test_a_grammar_that_cannot_be_met_is_refused(
    served: tuple[Session, tuple[int, ...]], ask: Ask, message: str
) -> None:
    pytest.importorskip("llguidance")
    refused(served[0], ask, message, served[1])


def test_bad_ones_among_good_ones_in_flight_disturb_nobody(served: tuple[Session, tuple[int, ...]]) -> None:
    session, want = served
    streams = [session.stream(Request(prompt=GOOD, max_tokens=6)) for _ in range(2)]
    events = [[next(stream)] for stream in streams]
    for ask, _ in CASES:
        with pytest.raises(EdgeError):
            ask(session)
    for stream, seen in zip(streams, events, strict=True):
        seen += stream
        assert tuple(e.token for e in seen) == want
    assert_idle(session)


def test_a_full_line_refuses_and_goes_on() -> None:
    session, _ = make_session(sequences=1, max_waiting=3)
    with session:
        numbers = [session.submit(Request(prompt=[*GOOD, 9 + i], max_tokens=3)) for i in range(3)]
        for _ in range(5):
            with pytest.raises(QueueFull, match="3 requests are waiting already"):
                session.complete(GOOD)
        with pytest.raises(BadRequest):
            session.complete("")
        assert session.metrics.refused == 5
        assert session.cancel(numbers[0])
        answered: dict[int, list[int]] = {n: [] for n in numbers[1:]}
        answered[session.submit(Request(prompt=GOOD, max_tokens=3))] = []
        while session.in_flight:
            for event in session.step():
                if event.token is not None:
                    answered[event.request].append(event.token)
        prompts = [[*GOOD, 10], [*GOOD, 11], GOOD]
        assert list(answered.values()) == [continuation(p, 3, VOCAB) for p in prompts]
        assert_idle(session)


def test_cancelling_twice_or_what_never_was_does_nothing() -> None:
    session, _ = make_session()
    with session:
        number = session.submit(Request(prompt=GOOD, max_tokens=30))
        session.step()
        assert session.cancel(number)
        for other in (number, number, 0, -1, 10**30):
            assert not session.cancel(other)
        assert [e.finish_reason for e in session.step()] == ["cancelled"]
        assert session.step() == [] and session.metrics.finished == {"cancelled": 1}
        done = session.submit(Request(prompt=GOOD, max_tokens=1))
        session.step()
        assert not session.cancel(done)
        assert_idle(session)


def test_lists_that_a_caller_changes_afterwards_change_no_request() -> None:
    session, _ = make_session()
    with session:
        ids, stop_ids = list(GOOD), [VOCAB - 1]
        stream = session.stream(Request(prompt=ids, max_tokens=8, stop_ids=stop_ids))
        ids[:] = [VOCAB + 5] * 100
        stop_ids[:] = range(VOCAB)  # type: ignore[assignment]
        assert [e.token for e in stream] == continuation(GOOD, 8, VOCAB)


def test_an_endless_answer_is_bounded_and_one_token_is_the_least(tmp_path: Path) -> None:
    write_speaking(tmp_path / "e.edge")
    with open_engine(tmp_path / "e.edge", backend="reference") as session:
        longest = session.complete([7] * (CONTEXT - 1), max_tokens=10**12, ignore_eos=True)
        assert len(longest.tokens) == 1 and longest.finish_reason == "length"
        assert len(session.complete([7], max_tokens=10**12, ignore_eos=True).tokens) == CONTEXT - 1
        assert_idle(session)
