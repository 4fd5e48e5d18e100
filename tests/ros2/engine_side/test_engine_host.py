"""EngineHost: jobs in, events out, exactly one end each."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_nodes.engine import EngineOptions
from edge_nodes.engine_host import EngineHost
from edge_nodes.job import GrammarText, Job
from listener import Listener, command, long_job

from edge_runtime import BadConfig, BadEngineFile, BadRequest, open_engine

COMMAND = "bring me the red mug from the kitchen"


@pytest.fixture
def host(planner_path: Path) -> Iterator[EngineHost]:
    host = EngineHost()
    host.open(EngineOptions(path=str(planner_path)))
    yield host
    host.close()


def run(host: EngineHost, job: Job, number: int = 1) -> Listener:
    listener = Listener()
    host.submit(number, job, listener)
    listener.wait()
    return listener


def test_a_job_gives_what_the_session_gives(host: EngineHost, planner_path: Path) -> None:
    got = run(host, command(COMMAND))
    with open_engine(planner_path) as session:
        wanted = session.chat([{"role": "user", "content": COMMAND}])
    assert got.text == wanted.text and json.loads(got.text)
    assert [t for piece in got.pieces for t in piece.tokens] == list(wanted.tokens)
    end = got.ends[0]
    assert end.reason == wanted.finish_reason and end.error == "" and end.code == ""
    assert end.figures.prompt_tokens == wanted.usage.prompt_tokens
    assert end.figures.completion_tokens == len(wanted.tokens)
    assert 0 < end.figures.ttft_ms <= end.figures.total_ms


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job(), "bad_request"),
        (Job(prompt="x", temperature=-1.0), "bad_request"),
        (Job(prompt="x", adapter="none"), "bad_request"),
        (Job(prompt="go " * 2000), "bad_request"),
        (Job(prompt="x", grammar=GrammarText(kind="json", text="{")), "bad_request"),
    ],
)
def test_a_wrong_job_ends_with_its_reason_and_harms_no_other(host: EngineHost, job: Job, code: str) -> None:
    end = run(host, job).ends[0]
    assert end.reason == "error" and end.code == code and end.error
    assert run(host, command(COMMAND), 2).ends[0].reason == "stop"


def test_a_deadline_ends_a_job_with_what_it_has(host: EngineHost) -> None:
    got = run(host, long_job(deadline=0.02))
    assert got.ends[0].reason == "deadline" and got.text


def test_probabilities_come_with_their_tokens(host: EngineHost) -> None:
    got = run(host, command(COMMAND, logprobs=2, max_tokens=3))
    probs = [chosen for piece in got.pieces for chosen in piece.probs]
    assert len(probs) == 3
    for chosen in probs:
        assert len(chosen.top) == 2 and chosen.top[0][0] == chosen.token  # greedy
        assert 0 < chosen.top[1][1] <= chosen.top[0][1] <= 1


def test_a_job_that_continues_sees_what_went_before(host: EngineHost) -> None:
    first = run(host, Job(prompt="go to", max_tokens=4, keeps=True), 1)
    second = run(host, Job(prompt=" the kitchen", max_tokens=4, keeps=True, continues=True), 2)
    fresh = run(host, Job(prompt=" the kitchen", max_tokens=4), 3)
    before = first.ends[0].figures
    assert second.ends[0].figures.prompt_tokens > before.prompt_tokens + before.completion_tokens
    host.forget()
    again = run(host, Job(prompt=" the kitchen", max_tokens=4, keeps=True, continues=True), 4)
    assert again.text == fresh.text  # nothing is remembered any more


def test_a_thousand_cancels_at_any_moment_leave_nothing_behind(host: EngineHost) -> None:
    rng = random.Random(5)
    listeners = []
    for number in range(1000):
        listener = Listener()
        listeners.append(listener)
        host.submit(number, long_job() if number % 2 else command(COMMAND), listener)
        pause = rng.choice((0.0, 0.0, 0.001, 0.003, 0.006))
        if pause:
            time.sleep(pause)
        host.cancel(rng.randrange(number + 1))  # perhaps one that ended long ago
        host.cancel(number)
    for listener in listeners:
        listener.wait()
    time.sleep(0.05)
    # queue_full: flooded by cancelled ones that the running step still holds
    reasons = {(x.ends[0].reason, x.ends[0].code) for x in listeners}
    assert reasons <= {("cancelled", ""), ("stop", ""), ("length", ""), ("error", "queue_full")}
    assert ("cancelled", "") in reasons
    assert all(len(x.ends) == 1 for x in listeners)
    figures = host.figures()
    assert figures["pages_used"] == figures["running"] == figures["waiting"] == 0


def test_prove_and_warm_up_leave_nothing_behind(host: EngineHost) -> None:
    host.prove()
    figures = host.figures()
    assert figures["pages_used"] == 0 and figures["tokens"] == 0


def test_tokens_and_texts(host: EngineHost) -> None:
    ids = host.tokenize("go to the kitchen")
    assert host.detokenize(ids) == "go to the kitchen"
    with pytest.raises(BadRequest, match="no token"):
        host.detokenize([1 << 30])


def test_a_prefix_is_saved(host: EngineHost, tmp_path: Path) -> None:
    path = tmp_path / "p.prefix"
    tokens = host.save_prefix("go to the kitchen and find a mug " * 8, [], str(path), "")
    assert tokens > 0 and path.is_file()


def test_options_reach_the_engine(planner_path: Path) -> None:
    host = EngineHost()
    facts = host.open(
        EngineOptions(
            path=str(planner_path), context=256, parallel=2, cache_k="int8", cache_v="int4", threads=1
        )
    )
    assert (facts.context, facts.parallel, facts.cache_type_k, facts.cache_type_v) == (256, 2, "int8", "int4")
    assert facts.has_chat and facts.speculative == "draft"
    assert 0 < facts.memory_used <= facts.memory_planned
    host.close()
    with pytest.raises(BadConfig):
        host.open(EngineOptions(path=str(planner_path), context=1 << 20))
    assert host.state == "closed"


def test_open_and_close_two_hundred_times_keep_threads(planner_path: Path) -> None:
    threads = threading.active_count()
    host = EngineHost()
    for _ in range(200):
        host.open(EngineOptions(path=str(planner_path), threads=1))
        host.close()
    assert threading.active_count() == threads


def test_what_is_closed_answers_so(tmp_path: Path) -> None:
    host = EngineHost()
    assert run(host, Job(prompt="x")).ends[0].code == "bad_request"
    with pytest.raises(BadRequest, match="no engine is open"):
        host.tokenize("x")
    broken = tmp_path / "broken.edge"
    broken.write_bytes(b"nothing")
    with pytest.raises(BadEngineFile):
        host.open(EngineOptions(path=str(broken)))
    assert host.state == "closed"
    host.close()


def test_close_ends_what_runs(planner_path: Path) -> None:
    host = EngineHost()
    host.open(EngineOptions(path=str(planner_path)))
    listeners = [Listener() for _ in range(12)]
    for number, listener in enumerate(listeners):
        host.submit(number, long_job(), listener)
    host.close()
    assert {x.wait().reason for x in listeners} <= {"cancelled", "length"}
