"""Session over a model whose answer depends on every token it should remember."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest
from history_model import assert_idle, continuation, make_session, make_tokenizer
from speaking_engine import vocabulary

from edge_runtime.engine.manifest import KnownAnswer
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError, QueueFull
from edge_runtime.serving.request import Request
from edge_runtime.serving.sampling import Sampling

VOCAB = vocabulary().size
TOKENIZER = make_tokenizer()


def ids(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, VOCAB) for _ in range(n)]


def scripted(text: str, end: int = 2):
    """A model that says `text`, token by token, whatever the prompt (of `start` tokens)."""
    tokens = [*TOKENIZER.encode(text, start=False), end]
    return lambda start: lambda history: tokens[min(len(history) - start, len(tokens) - 1)]


def say(text: str, **options):
    """The completion of a model that says `text` byte by byte or word by word, then ends."""
    prompt = [7, 8, 9]
    session, _ = make_session(script=scripted(text)(len(prompt)), context=256, pages=32)
    with session:
        done = session.complete(prompt, **options)
        assert_idle(session)
    return done


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_any_prefill_chunking_gives_the_same_answer(tokens: int) -> None:
    session, executor = make_session(tokens=tokens)
    with session:
        prompt = ids(1, 40)
        done = session.complete(prompt, max_tokens=12)
        assert list(done.tokens) == continuation(prompt, 12, VOCAB)
        assert (done.finish_reason, done.usage.prompt_tokens, done.usage.completion_tokens) == (
            "length",
            40,
            12,
        )
        assert len(executor.batches) == -(-40 // tokens) + 11
        assert_idle(session)


def test_requests_in_flight_together_do_not_disturb_each_other() -> None:
    session, executor = make_session(sequences=4, tokens=9, pages=16)
    with session:
        prompts = {session.submit(Request(prompt=ids(i, 3 + 5 * i), max_tokens=4 + i)): i for i in range(9)}
        answers: dict[int, list[int]] = {number: [] for number in prompts}
        reasons = {}
        while session.in_flight:
            for event in session.step():
                if event.token is not None:
                    answers[event.request].append(event.token)
                if event.finish_reason is not None:
                    reasons[event.request] = event.finish_reason
        for number, i in prompts.items():
            assert answers[number] == continuation(ids(i, 3 + 5 * i), 4 + i, VOCAB)
        assert set(reasons.values()) == {"length"}
        assert max(len(b.page_tables) for b in executor.batches) == 4
        assert_idle(session)


def test_streams_of_several_threads() -> None:
    session, _ = make_session(sequences=3, tokens=8, pages=12)
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = [e.token for e in session.generate(ids(i, 10), max_tokens=15) if e.token is not None]

    with session:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        assert found == {i: continuation(ids(i, 10), 15, VOCAB) for i in range(8)}
        assert_idle(session)


def test_streamed_texts_join_to_the_completion() -> None:
    done = say("Grüße 🤖, bring the red mug!")
    assert done.text == "Grüße 🤖, bring the red mug!"
    assert done.finish_reason == "stop" and done.tokens[-1] == 2


def test_the_end_token_ends_and_can_be_ignored() -> None:
    assert say("hello").finish_reason == "stop"
    done = say("hello", max_tokens=20, stop_ids=[])
    assert done.text == "hello"
    session, _ = make_session(script=lambda history: 2)
    with session:
        done = session.answer(Request(prompt=[5], max_tokens=4, ignore_eos=True))
        assert done.tokens == (2, 2, 2, 2) and done.text == "" and done.finish_reason == "length"


def test_stop_ids_end_without_showing_their_text() -> None:
    word = TOKENIZER.encode("!", start=False)[0]
    done = say("stop! now", stop_ids=[word])
    assert done.text == "stop" and done.finish_reason == "stop" and done.tokens[-1] == word


@pytest.mark.parametrize("stop", ["🤖", "red mug", "g the", "bring the red mug", "\N{ROBOT FACE}, b"])
def test_stop_strings_across_token_borders(stop: str) -> None:
    text = "Grüße 🤖, bring the red mug!"
    done = say(text, stop=["never said", stop])
    assert done.text == text[: text.index(stop)]
    assert done.finish_reason == "stop"


def test_what_a_stop_string_withheld_is_shown_at_the_end() -> None:
    done = say("the red", stop=["red mug"])
    assert done.text == "the red" and done.finish_reason == "stop"


def test_the_context_ends_an_answer() -> None:
    session, _ = make_session(context=20)
    with session:
        prompt = ids(2, 15)
        done = session.complete(prompt, max_tokens=100)
        assert list(done.tokens) == continuation(prompt, 5, VOCAB) and done.finish_reason == "length"
        assert_idle(session)


def test_the_cache_ends_an_answer_that_the_context_would_hold() -> None:
    session, _ = make_session(context=64, pages=2)
    with session:
        done = session.complete(ids(2, 15), max_tokens=100)
        assert len(done.tokens) == 17 and done.finish_reason == "length"


BAD = [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    ([5] * 64, {}, "64 tokens, the context holds 64"),
    ("word " * 100, {}, "the context holds 64"),
    ([5, VOCAB], {}, f"token 1 of the prompt is {VOCAB}, expected an id from 0 to {VOCAB - 1}"),
    ([-1], {}, "token 0 of the prompt is -1"),
    ([True], {}, "token 0 of the prompt is True"),
    ([1.0], {}, "token 0 of the prompt is 1.0"),
    ("a\udc80", {}, "lone surrogate"),
    ("x" * (1 << 20), {}, "1048576 bytes"),
    (b"hi", {}, "the prompt is bytes, expected text or a list"),
    (None, {}, "the prompt is NoneType"),
    ("hi", {"max_tokens": 0}, "max_tokens is 0, expected an integer of at least 1"),
    ("hi", {"max_tokens": 1.5}, "max_tokens is 1.5"),
    ("hi", {"stop": "text"}, "stop is str, expected a list of strings"),
    ("hi", {"stop": [""]}, "a stop string is ''"),
    ("hi", {"stop": ["x"] * 65}, "at most 64 stop strings"),
    ("hi", {"stop_ids": [VOCAB]}, f"stop id {VOCAB} is no token"),
    ("hi", {"stop_ids": ["2"]}, "stop_ids must be a list of token ids"),
    ("hi", {"sampling": {"temperature": 1}}, "sampling is dict"),
]


def test_bad_requests_are_refused_and_the_session_works_on() -> None:
    session, _ = make_session()
    with session:
        for prompt, options, message in BAD:
            with pytest.raises(BadRequest) as caught:
                session.complete(prompt, **options)
            assert message in str(caught.value)
            assert_idle(session)
            good = session.complete(ids(3, 5), max_tokens=3)
            assert list(good.tokens) == continuation(ids(3, 5), 3, VOCAB)


def test_a_full_line_refuses_with_its_own_error() -> None:
    session, _ = make_session(sequences=1, max_waiting=2)
    with session:
        for i in range(2):
            session.submit(Request(prompt=ids(i, 4), max_tokens=2))
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            session.complete(ids(9, 4))
        while session.in_flight:
            session.step()
        assert session.metrics.snapshot()["refused"] == 1
        assert len(session.complete(ids(9, 4), max_tokens=2).tokens) == 2
        assert_idle(session)


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_cancel_frees_everything_at_once(when: str) -> None:
    session, _ = make_session(sequences=1 if when == "waiting" else 4, tokens=4)
    with session:
        other = session.submit(Request(prompt=ids(1, 6), max_tokens=30))
        number = session.submit(Request(prompt=ids(2, 12), max_tokens=30))
        for _ in range({"waiting": 1, "prefill": 3, "decode": 9}[when]):
            session.step()
        assert session.cancel(number)
        assert session.in_flight == 1
        assert not session.cancel(number) and not session.cancel(999)
        events = session.step()
        assert [e.finish_reason for e in events if e.request == number] == ["cancelled"]
        session.cancel(other)
        assert_idle(session)


def test_leaving_a_stream_cancels_it() -> None:
    session, _ = make_session()
    with session:
        for event in session.generate(ids(1, 5), max_tokens=30):
            assert event.token is not None
            break
        gc.collect()
        assert_idle(session)
        never_read = session.generate(ids(1, 5), max_tokens=30)
        assert session.in_flight == 1
        never_read.close()
        assert_idle(session)
        assert session.metrics.snapshot()["finished"] == {"cancelled": 2}


def test_cancel_from_another_thread_ends_a_stream() -> None:
    session, executor = make_session(context=4096, pages=300)
    forward = executor.forward
    executor.forward = lambda batch: (time.sleep(0.002), forward(batch))[1]  # type: ignore[method-assign]
    with session:
        stream = session.generate(ids(1, 5), max_tokens=4000)
        timer = threading.Timer(0.1, session.cancel, (stream.request,))
        timer.start()
        events = list(stream)
        assert events[-1].finish_reason == "cancelled" and 2 < len(events) < 2000
        timer.join()
        assert_idle(session)


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_nan_ends_one_request_and_spares_the_others(raises: bool, step: int) -> None:
    session, executor = make_session(tokens=64)
    bad, good = ids(1, 8), [ids(2, 9), ids(3, 4)]
    executor.raises = raises
    executor.spoil = lambda history: history[:8] == bad and len(history) >= 8 + step
    with session:
        streams = [session.stream(Request(prompt=p, max_tokens=12)) for p in (good[0], bad, good[1])]
        events = [list(s) for s in streams]
        for prompt, got in zip(good, (events[0], events[2]), strict=True):
            assert [e.token for e in got] == continuation(prompt, 12, VOCAB)
        assert [e.token for e in events[1]] == [*continuation(bad, step, VOCAB), None]
        assert events[1][-1].finish_reason == "error" and "NaN" in str(events[1][-1].error)
        assert_idle(session)
        done = session.complete(bad, max_tokens=12)
        assert (done.finish_reason, len(done.tokens)) == ("error", step)
        assert session.complete(good[0], max_tokens=12).finish_reason == "length"


def test_a_failing_backend_leaves_nothing_behind() -> None:
    session, executor = make_session()
    forward = executor.forward
    with session:
        waiting = session.submit(Request(prompt=ids(1, 5), max_tokens=30))

        def broken(batch: object) -> object:
            raise BackendUnavailable("the device is gone")

        executor.forward = broken  # type: ignore[assignment,method-assign]
        with pytest.raises(BackendUnavailable, match="the device is gone"):
            session.complete(ids(2, 5))
        executor.forward = forward  # type: ignore[method-assign]
        assert [(e.request, e.finish_reason) for e in session.step()] == [(waiting, "error")]
        assert_idle(session)
        assert len(session.complete(ids(2, 5), max_tokens=3).tokens) == 3


def test_random_traffic_leaks_nothing() -> None:
    session, executor = make_session(sequences=4, tokens=12, pages=10, max_waiting=6)
    executor.spoil = lambda history: history[0] == 5
    rng = random.Random(4)
    prompts: dict[int, list[int]] = {}
    answers: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    with session:
        for _ in range(1200):
            dice = rng.random()
            if dice < 0.35:
                prompt = [5 if rng.random() < 0.1 else 6, *ids(rng.randrange(10**6), rng.randrange(30))]
                try:
                    number = session.submit(Request(prompt=prompt, max_tokens=rng.randrange(1, 20)))
                except QueueFull:
                    continue
                prompts[number], answers[number] = prompt, []
            elif dice < 0.45 and prompts:
                session.cancel(rng.choice(list(prompts)))
            else:
                for event in session.step():
                    if event.token is not None:
                        answers[event.request].append(event.token)
                    if event.finish_reason is not None:
                        assert event.request not in reasons
                        reasons[event.request] = event.finish_reason
        while session.in_flight:
            for event in session.step():
                if event.token is not None:
                    answers[event.request].append(event.token)
                if event.finish_reason is not None:
                    reasons[event.request] = event.finish_reason
        for event in session.step():
            reasons[event.request] = str(event.finish_reason)
        assert_idle(session)
    assert reasons.keys() == prompts.keys()
    assert set(reasons.values()) == {"length", "cancelled", "error"}
    for number, prompt in prompts.items():
        if prompt[0] != 5:
            assert answers[number] == continuation(prompt, len(answers[number]), VOCAB)


def test_seeded_sampling_does_not_depend_on_company() -> None:
    sampling = Sampling(temperature=2.0, seed=5)
    session, _ = make_session()
    with session:
        alone = session.complete(ids(1, 5), sampling, max_tokens=15).tokens
        streams = [
            session.generate(ids(i, 5), Sampling(temperature=2.0, seed=i), max_tokens=15) for i in (2, 3)
        ]
        together = session.complete(ids(1, 5), sampling, max_tokens=15).tokens
        assert alone == together
        for s in streams:
            s.close()


def test_logprobs_come_with_every_token() -> None:
    session, _ = make_session()
    with session:
        done = session.complete(ids(1, 5), Sampling(logprobs=3), max_tokens=4)
        assert len(done.logprobs) == len(done.top_logprobs) == 4
        for token, logprob, top in zip(done.tokens, done.logprobs, done.top_logprobs, strict=True):
            assert top[0] == (token, logprob) and len(top) == 3
        events = list(session.generate(ids(1, 5), max_tokens=2))
        assert [e.logprob for e in events] == [None, None]


def test_timing_and_metrics() -> None:
    session, executor = make_session(tokens=4)
    forward = executor.forward
    executor.forward = lambda batch: (time.sleep(0.004), forward(batch))[1]  # type: ignore[method-assign]
    with session:
        t = session.complete(ids(1, 8), max_tokens=6).timing
        assert t.ttft_ms >= 8 and t.itl_p50_ms >= 4 and t.total_ms >= t.ttft_ms + 5 * 4
        assert t.tokens_per_s == pytest.approx(5 / ((t.total_ms - t.ttft_ms) / 1e3), rel=0.2)
        figures = session.metrics.snapshot()
        assert (figures["tokens"], figures["prompt_tokens"], figures["steps"]) == (6, 8, 7)
        assert figures["finished"] == {"length": 1}


def test_a_snapshot_has_the_figures_of_metrics_and_the_state_of_the_session() -> None:
    session, _ = make_session(context=64, pages=16)
    with session:
        session.submit(Request(prompt=ids(1, 40), max_tokens=4))
        session.step()
        during = session.snapshot()
        assert during["pages"] == 16 and during["pages_used"] == session.pages_used > 0
        assert (during["running"], during["waiting"], during["preempted"]) == (1, 0, 0)
        while session.in_flight:
            session.step()
        after = session.snapshot()
        assert after["pages_used"] == 0 and after["pages_kept"] == session.pages_kept > 0
        assert after["speculate"] == "off" and after["memory_planned"] == session.memory.need
        assert session.metrics.snapshot().items() <= after.items() and after["tokens"] == 4
        session.metrics.reset()
        assert session.snapshot()["tokens"] == 0 and session.snapshot()["finished"] == {}
        assert session.snapshot()["itl_p50_ms"] == 0.0


def test_forgotten_prefixes_are_computed_again() -> None:
    session, _ = make_session(context=64, pages=16)
    prompt = ids(1, 40)
    with session:
        first = session.complete(prompt, max_tokens=4)
        assert session.complete(prompt, max_tokens=4).usage.cached_tokens > 0
        number = session.submit(Request(prompt=prompt, max_tokens=4))
        with pytest.raises(BadRequest, match="1 requests are in flight"):
            session.forget_prefixes()
        session.cancel(number)
        session.forget_prefixes()
        assert session.pages_kept == session.pages_used == 0
        again = session.complete(prompt, max_tokens=4)
        assert again.usage.cached_tokens == 0 and again.tokens == first.tokens


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: random.uniform(-1e9, 1e9))
    session, _ = make_session()
    with session:
        done = session.complete(ids(1, 5), max_tokens=5)
        assert len(done.tokens) == 5 and 0 <= done.timing.ttft_ms <= done.timing.total_ms


def test_closing_ends_requests_and_refuses_new_ones() -> None:
    session, executor = make_session()
    stream = session.generate(ids(1, 5), max_tokens=30)
    next(stream)
    session.close()
    session.close()
    assert [e.finish_reason for e in stream] == ["cancelled"]
    assert executor.closed
    with pytest.raises(BadRequest, match="this session is closed"):
        session.complete(ids(1, 5))
    with pytest.raises(BadRequest, match="this session is closed"):
        session.step()


def test_verify_repeats_the_known_answer_exactly() -> None:
    import msgspec

    session, _ = make_session(tokens=3)
    prompt = ids(1, 8)
    answer = continuation(prompt, 10, VOCAB)

    def known(backend: str, tokens: list[int] | None) -> None:
        entry = (
            None
            if tokens is None
            else KnownAnswer(prompt=tuple(prompt), answer=tuple(tokens), backend=backend)
        )
        session.manifest = msgspec.structs.replace(session.manifest, known_answer=entry)

    with session:
        known("fake", answer)
        session.verify()
        for at in range(10):
            known("fake", [*answer[:at], answer[at] ^ 1, *answer[at + 1 :]])
            with pytest.raises(NumericError, match="the known answer is not repeated"):
                session.verify()
        known("reference", [*answer[:9], answer[9] ^ 1])
        session.verify()  # made on another backend: half must agree
        known("reference", [t ^ 1 for t in answer])
        with pytest.raises(NumericError, match="0 of 10 tokens agree, 5 must"):
            session.verify()
        known("fake", None)
        with pytest.raises(BadRequest, match="carries no known answer"):
            session.verify()
        assert_idle(session)
