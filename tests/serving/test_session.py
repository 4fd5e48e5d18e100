"""Session over a model whose answer depends on every token it should remember."""

from __future__ import annotations

import gc
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from books import check_books
from history_model import adapted_continuation, assert_idle, continuation, make_session, make_tokenizer
from speaking_engine import vocabulary

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.adapter import LowRank
from edge_runtime.engine.manifest import KnownAnswer
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError
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


def test_a_backend_that_fails_while_sequences_run_apart_ends_all_of_the_step() -> None:
    session, executor = make_session(tokens=64)
    forward, spoiled = executor.forward, ids(1, 8)
    executor.spoil = lambda history: history[:8] == spoiled

    def broken(batch: StepBatch) -> np.ndarray:
        if len(batch.page_tables) == 1 and batch.tokens[0] != spoiled[0]:
            raise BackendUnavailable("the device is gone")
        return forward(batch)

    with session:
        numbers = {session.submit(Request(prompt=p, max_tokens=5)) for p in (spoiled, ids(2, 9), ids(3, 4))}
        executor.forward = broken  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailable):
            session.step()
        executor.forward = forward  # type: ignore[method-assign]
        assert {e.request for e in session.step() if e.finish_reason == "error"} == numbers
        check_books(session, executor)
        assert_idle(session)


def test_an_adapter_that_is_dropped_while_a_request_comes_in_is_not_mixed_up_with_the_next() -> None:
    """Its number in the executor is given again; the request that named the old one must not get the new."""
    session, _ = make_session()
    update = {"w": LowRank(np.zeros((1, 1)), np.zeros((1, 1)), 1.0)}
    with session:
        session.load_adapter("tidy", update)

        def meanwhile(request: Request) -> None:
            session.drop_adapter("tidy")
            session.load_adapter("greet", update)

        session._constraint = meanwhile  # type: ignore[method-assign,assignment]
        with pytest.raises(BadRequest, match="no adapter 'tidy' is loaded"):
            session.submit(Request(prompt=ids(1, 5), max_tokens=3, adapter="tidy"))
        session._constraint = lambda request: None  # type: ignore[method-assign]
        done = session.complete(ids(1, 5), max_tokens=9, adapter="greet")
        assert list(done.tokens) == adapted_continuation(ids(1, 5), 9, VOCAB, 0)
        assert_idle(session)


def test_a_stream_that_is_dropped_anywhere_blocks_nobody() -> None:
    """The garbage collector may drop one inside the scheduler, while another thread is about to submit."""
    session, executor = make_session()
    dropped = session.submit(Request(prompt=ids(1, 5), max_tokens=30))
    session.step()
    session.submit(Request(prompt=ids(2, 5), max_tokens=3))
    match, submitting = session._tree.match, []

    def collected(*args: Any) -> Any:
        if not submitting:
            submitting.append(
                threading.Thread(
                    target=session.submit, args=(Request(prompt=ids(3, 5), max_tokens=3),), daemon=True
                )
            )
            submitting[0].start()
            while session._traffic.gate.acquire(blocking=False):  # until the other thread has it
                session._traffic.gate.release()
            session.cancel(dropped)
        return match(*args)

    session._tree.match = collected  # type: ignore[method-assign]

    def run() -> None:
        session.step()
        submitting[0].join()
        while session.in_flight:
            session.step()

    driver = threading.Thread(target=run, daemon=True)
    driver.start()
    driver.join(20)
    assert not driver.is_alive(), "two threads wait for each other"
    assert session.metrics.finished == {"cancelled": 1, "length": 2}
    check_books(session, executor)
    assert_idle(session)
    session.close()


def test_threads_that_submit_cancel_and_read_lose_no_request() -> None:
    """Eight threads against a line that is sorted all the time, with priorities, deadlines and cancels."""
    session, executor = make_session(sequences=3, tokens=8, pages=12, max_waiting=200)
    found: dict[int, list[str]] = {}

    def work(thread: int) -> None:
        rng, reasons = random.Random(thread), []
        for i in range(20):
            prompt = ids(1000 * thread + i, rng.randrange(1, 20))
            deadline = 300.0 if rng.random() < 0.5 else None
            stream = session.generate(
                prompt, max_tokens=1 + i % 7, priority=rng.randrange(3), deadline=deadline
            )
            leave = rng.random() < 0.3
            got = []
            for event in stream:
                got.append(event)
                if leave:
                    session.cancel(stream.request)
            tokens = [e.token for e in got if e.token is not None]
            assert tokens == continuation(prompt, 1 + i % 7, VOCAB)[: len(tokens)]
            assert len(tokens) == 1 + i % 7 or got[-1].finish_reason == "cancelled"
            reasons.append(str(got[-1].finish_reason))
        found[thread] = reasons

    with session:
        threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert sorted(found) == list(range(8)) and all(len(reasons) == 20 for reasons in found.values())
        assert sum(session.metrics.finished.values()) == 160
        check_books(session, executor)
        assert_idle(session)


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


def test_the_last_event_has_the_figures_that_complete_gives() -> None:
    session, _ = make_session()
    with session:
        number = session.submit(Request(prompt=ids(1, 20), max_tokens=5))
        events = []
        while session.in_flight:
            events += session.step()
        *others, last = [event for event in events if event.request == number]
        assert all(event.usage is None and event.timing is None for event in others)
        assert last.usage is not None and last.timing is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (20, 5)
        assert 0.0 < last.timing.ttft_ms <= last.timing.total_ms
        number = session.submit(Request(prompt=ids(2, 20), max_tokens=5))
        session.cancel(number)
        (cancelled,) = session.step()
        assert cancelled.finish_reason == "cancelled" and cancelled.usage is not None
        assert cancelled.usage.completion_tokens == 0


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
