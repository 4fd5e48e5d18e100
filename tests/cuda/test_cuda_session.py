"""Sessions over the cuda backend on the fake GPU: what users ask for, and what crosses to the host for it.

Independent reference: the same engine's logits brought to the host whole, and requests run one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_engine import CUBIN, write_cuda
from fake_cuda import FakeCuda

from edge_runtime import Request, Sampling, Session, open_engine
from edge_runtime.backends.cuda.backend import BACKEND, CudaBackend
from edge_runtime.backends.cuda.bindings_driver import BindingsDriver
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.engine.file import read_engine
from edge_runtime.errors import (
    BackendUnavailable,
    BadEngineFile,
    BadRequest,
    DeviceMismatch,
    DoesNotFit,
    Unsupported,
)
from edge_runtime.serving import sampling
from edge_runtime.serving.sampling import Sampler
from edge_runtime.serving.sequence import Sequence as Served
from edge_runtime.serving.speculative import Speculation
from edge_runtime.serving.verification import Proposal

PROMPTS = ([5, 9, 17, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46], [7, 300])
FEW: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.95}


@pytest.fixture(autouse=True)
def no_context(fake_gpu: FakeCuda) -> Iterator[None]:
    """The backend keeps no context that no engine was loaded into, whatever failed."""
    yield
    kept = BACKEND._waiting is not None
    BACKEND.release()
    assert not kept


@pytest.fixture
def engine(fake_gpu: FakeCuda, tmp_path: Path) -> Path:
    path = tmp_path / "e.edge"
    write_cuda(path, tmp_path)
    return path


@pytest.fixture
def with_draft(fake_gpu: FakeCuda, tmp_path: Path) -> Path:
    path = tmp_path / "draft.edge"
    write_cuda(path, tmp_path, draft=True)
    return path


@pytest.fixture
def long_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's vocabulary is one that is looked at for its likeliest tokens."""
    monkeypatch.setattr(sampling, "_SHORT", 0)


def opened(path: Path, **options: Any) -> Session:
    return open_engine(path, **{"backend": "cuda", "speculate": "off", **options})


def answers(
    session: Session, options: Sequence[dict[str, Any]] = ({}, {}, {}), tokens: int = 12
) -> list[list[int | None]]:
    """Of one request for each of PROMPTS, all in flight at once."""
    numbers = [
        session.submit(
            Request(prompt=p, max_tokens=tokens, ignore_eos=True, sampling=Sampling(**{"seed": 5, **o}))
        )
        for p, o in zip(PROMPTS, options, strict=True)
    ]
    found: dict[int, list[int | None]] = {n: [] for n in numbers}
    while session.in_flight:
        for event in session.step():
            assert event.error is None
            found[event.request].append(event.token)
    return list(found.values())


def alone(path: Path, options: Sequence[dict[str, Any]] = ({}, {}, {}), tokens: int = 12) -> list[list[int]]:
    """The same one after the other, none of which finds anything in the cache."""
    found = []
    with opened(path) as session:
        for p, o in zip(PROMPTS, options, strict=True):
            session.forget_prefixes()
            done = session.complete(
                p, Sampling(**{"seed": 5, **o}), max_tokens=tokens, ignore_eos=True, speculate=False
            )
            found.append(list(done.tokens))
    return found


class Counts:
    """What the fake GPU counted since the last look."""

    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu
        self._before: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        now = self._gpu.count(name)
        found = now - self._before.get(name, 0)
        self._before[name] = now
        return found


# --- what a step costs -------------------------------------------------------------------------------------


def test_a_greedy_step_is_one_launch_and_brings_tokens_alone(fake_gpu: FakeCuda, engine: Path) -> None:
    names = ("cuGraphLaunch", "syncs", "DtoH", "DtoH bytes", "HtoD", "DtoD", "cuStreamBeginCapture")
    with opened(engine) as session:
        session.warm_up()
        counts = Counts(fake_gpu)
        executor: Any = session._executor
        vocabulary = session.tokenizer.vocabulary.size
        answer = 4 * (1 + session.step_shape.logits)  # status and tokens
        assert answer < 4 * vocabulary
        for prompt in PROMPTS:
            session.submit(Request(prompt=prompt, max_tokens=20, ignore_eos=True))
        session.step()
        for name in names:
            counts[name]
        steps = 0
        while session.in_flight:
            session.step()
            found = {name: counts[name] for name in names}
            steps += 1
            assert found["cuGraphLaunch"] == found["syncs"] == found["DtoH"] == 1
            assert found["DtoH bytes"] == answer
            assert 1 <= found["HtoD"] <= 2  # the step; page tables when they grow
            assert found["DtoD"] == found["cuStreamBeginCapture"] == 0
        assert steps >= 19
        assert isinstance(executor, CudaExecutor)


@pytest.mark.usefixtures("long_vocabulary")
def test_a_step_that_samples_among_few_brings_few(fake_gpu: FakeCuda, engine: Path) -> None:
    with opened(engine) as session:
        session.warm_up()
        counts = Counts(fake_gpu)
        for i, prompt in enumerate(PROMPTS):
            chosen = Sampling(seed=i, **FEW) if i else Sampling()
            session.submit(Request(prompt=prompt, max_tokens=9, ignore_eos=True, sampling=chosen))
        counts["cuStreamBeginCapture"]
        while session.in_flight:
            counts["DtoH bytes"]
            running = session.in_flight
            session.step()
            if session.in_flight == running == 3:
                rows = 2 * 4 * 13 * 3  # ids and logits of 13 tokens, of three requests at most
                assert counts["DtoH bytes"] <= 4 * (1 + session.step_shape.logits) + rows
                assert counts["cuStreamBeginCapture"] == 0


def test_all_logits_come_where_they_are_asked_for(fake_gpu: FakeCuda, engine: Path) -> None:
    """The inverse: the figures above would show it."""
    with opened(engine) as session:
        counts = Counts(fake_gpu)
        session.complete(PROMPTS[0], Sampling(logprobs=2), max_tokens=3, ignore_eos=True)
        assert counts["DtoH bytes"] >= 3 * 4 * session.tokenizer.vocabulary.size


@pytest.mark.parametrize("speculate", ["off", "lookup", "draft"])
def test_after_a_warm_up_no_request_pays_for_a_graph(
    fake_gpu: FakeCuda, with_draft: Path, speculate: str
) -> None:
    with opened(with_draft, speculate=speculate, gated=False, draft_length=4) as session:
        session.warm_up()
        assert (session.pages_used, session.pages_kept, session.metrics.steps) == (0, 0, 0)
        made = fake_gpu.count("cuStreamBeginCapture")
        assert made >= 4
        answers(session, [{}, {"temperature": 1.0}, FEW], 40)
        answers(session, tokens=40)
        session.complete(list(range(5, 45)), max_tokens=20, ignore_eos=True)
        assert fake_gpu.count("cuStreamBeginCapture") == made
        assert session.metrics.drafted > 0 or speculate == "off"


def test_without_a_warm_up_they_do(fake_gpu: FakeCuda, engine: Path) -> None:
    with opened(engine) as session:
        made = fake_gpu.count("cuStreamBeginCapture")
        session.complete(PROMPTS[0], max_tokens=2)
        assert fake_gpu.count("cuStreamBeginCapture") > made


# --- what is answered --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("long_vocabulary")
@pytest.mark.parametrize(
    "options",
    [
        [{}, {}, {}],
        [FEW, {**FEW, "top_k": 40, "seed": 8}, {**FEW, "min_p": 0.05}],
        [{"temperature": 1.0}, {}, FEW],
        [{"repetition_penalty": 1.3}, {}, {}],
    ],
    ids=["greedy", "top-k", "mixed", "penalty"],
)
def test_a_batch_answers_as_each_alone_and_as_from_all_logits(
    engine: Path, monkeypatch: pytest.MonkeyPatch, options: list[dict[str, Any]]
) -> None:
    want = alone(engine, options)
    with opened(engine) as session:
        assert answers(session, options) == want
    monkeypatch.setattr(Sampler, "candidates", None)
    assert alone(engine, options) == want
    assert len({tuple(tokens) for tokens in want}) == 3


def test_text_streams(engine: Path) -> None:
    with opened(engine) as session:
        text = "".join(event.text for event in session.generate("Once upon a time", max_tokens=10))
        assert text == session.complete("Once upon a time", max_tokens=10).text
        assert session.backend == "cuda" and session.notices == ()


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
def test_guesses_change_no_answer(with_draft: Path, speculate: str) -> None:
    want = alone(with_draft, tokens=40)
    with opened(with_draft, speculate=speculate, gated=False, draft_length=4) as session:
        assert answers(session, tokens=40) == want
        assert 0 < session.metrics.accepted <= session.metrics.drafted
        assert speculate == "lookup" or session.metrics.accepted < session.metrics.drafted
        steps = session.metrics.steps
    assert steps < 41


def test_sampled_answers_with_certain_guesses_are_the_plain_ones(with_draft: Path) -> None:
    options = [{"temperature": 0.3, "seed": i} for i in range(3)]
    want = alone(with_draft, options, 40)
    with opened(with_draft, speculate="lookup", gated=False, draft_length=4) as session:
        assert answers(session, options, 40) == want
        assert session.metrics.drafted > 0


@pytest.mark.usefixtures("long_vocabulary")
def test_a_drafts_odds_are_those_of_all_its_logits(
    with_draft: Path, monkeypatch: pytest.MonkeyPatch, fake_gpu: FakeCuda
) -> None:
    def said() -> tuple[list[list[int | None]], int, int]:
        counts = Counts(fake_gpu)
        with opened(with_draft, speculate="draft", gated=False, draft_length=3) as session:
            found = answers(session, [FEW, {**FEW, "seed": 3}, {}], 30)
            assert 0 < session.metrics.accepted < session.metrics.drafted
            return found, session.metrics.accepted, counts["DtoH bytes"]

    few = said()
    monkeypatch.setattr(Sampler, "candidates", None)
    every = said()
    assert few[:2] == every[:2] and few[2] < every[2] / 4


def test_without_graphs_the_launches_are_queued_one_by_one(
    fake_gpu: FakeCuda, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with pycuda."""
    want = alone(engine)
    monkeypatch.setattr(BindingsDriver, "graphs", False)
    with opened(engine) as session:
        session.warm_up()
        counts = Counts(fake_gpu)
        assert (counts["cuGraphLaunch"], counts["cuStreamBeginCapture"]) != (0, 0)  # of `alone`
        assert answers(session) == want
        assert (counts["cuGraphLaunch"], counts["cuStreamBeginCapture"]) == (0, 0)
        assert counts["cuLaunchKernel"] + counts["cuLaunchKernelEx"] > 100


class Told:
    """A proposer of trees that knows the answers, with a wrong token beside each right one."""

    name = "told"
    lengths = (2, 4, 6)
    memory_bytes = 0

    def __init__(self, texts: list[list[int]]) -> None:
        self._texts = texts

    def ready(self, sequence: Served) -> int:
        return 6

    def tokens(self, sequence: Served, length: int, usual: float) -> float:
        return 1.0 + length / 2

    def cost(self, sequences: Sequence[Served], length: int) -> tuple[float, float]:
        return 0.0, 0.0

    def seconds(self, length: int) -> float:
        return 0.0

    def propose(self, asks: Sequence[tuple[Served, int]]) -> list[Proposal | None]:
        found: list[Proposal | None] = []
        for s, length in asks:
            text = next(t for t in self._texts if t[: len(s.tokens)] == list(s.tokens))
            true = text[len(s.tokens) : len(s.tokens) + length // 2]
            tokens, parents, last = [], [], -1
            for token in true:
                tokens += [token ^ 1, token]  # the right one lies behind the wrong one, and has to move
                parents += [last, last]
                last = len(tokens) - 1
            found.append(Proposal(tokens, parents) if tokens else None)
        return found

    def settle(self, sequence: Served, proposal: Proposal | None, accepted: int) -> None:
        assert proposal is None or accepted == len(proposal.tokens) // 2 or sequence.finish_reason

    def copy_page(self, source: int, target: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_trees_of_guesses_change_no_answer(engine: Path) -> None:
    want = alone(engine, tokens=30)
    with opened(engine, speculate="lookup", draft_length=6) as session:
        told: Any = Told([[*p, *a] for p, a in zip(PROMPTS, want, strict=True)])
        session.speculation = Speculation(told, session._scheduler._pace, gated=False)
        session._loop._speculation = session.speculation
        assert answers(session, tokens=30) == want
        assert session.metrics.accepted > 30


def test_a_prefix_is_computed_once(engine: Path, tmp_path: Path) -> None:
    prompt = list(range(50, 85))  # two pages and a part
    with opened(engine) as session:
        first = session.complete(prompt, max_tokens=9, ignore_eos=True)
        again = session.complete(prompt, max_tokens=9, ignore_eos=True)
        forked = session.complete([*prompt[:30], 9, 9, 9], max_tokens=9, ignore_eos=True)
        assert again.tokens == first.tokens and again.usage.cached_tokens >= 32
        assert forked.usage.cached_tokens >= 16
        session.save_prefix(prompt, tmp_path / "saved.prefix")
        session.forget_prefixes()
        alone = session.complete([*prompt[:30], 9, 9, 9], max_tokens=9, ignore_eos=True)
        assert alone.tokens == forked.tokens and alone.usage.cached_tokens == 0
    with opened(engine, prefix=tmp_path / "saved.prefix") as session:
        loaded = session.complete(prompt, max_tokens=9, ignore_eos=True)
        assert loaded.tokens == first.tokens and loaded.usage.cached_tokens == 32


def test_preempted_requests_answer_the_same(fake_gpu: FakeCuda, tmp_path: Path) -> None:
    write_cuda(tmp_path / "small.edge", tmp_path, pages=5)
    path = tmp_path / "small.edge"
    want = alone(path, tokens=30)
    with opened(path) as session:
        numbers = []
        found: dict[int, list[int | None]] = {}
        for i, prompt in enumerate(PROMPTS):  # each is more urgent than those before
            request = Request(prompt=prompt, max_tokens=30, ignore_eos=True, priority=i)
            numbers.append(session.submit(request))
            for _ in range(3):
                for event in session.step():
                    found.setdefault(event.request, []).append(event.token)
        while session.in_flight:
            for event in session.step():
                found.setdefault(event.request, []).append(event.token)
        assert session._scheduler.preempted > 0
        assert [found[n] for n in numbers] == want


def test_deadlines_end_one_request_and_no_other(engine: Path) -> None:
    now = [100.0]
    want = alone(engine)
    with opened(engine, clock=lambda: now[0]) as session:
        late = session.submit(Request(prompt=[5, 6], max_tokens=40, ignore_eos=True, deadline=3.0))
        rest = session.submit(Request(prompt=PROMPTS[0], max_tokens=12, ignore_eos=True))
        ends, tokens = {}, []
        while session.in_flight:
            now[0] += 1.0
            for event in session.step():
                if event.finish_reason is not None:
                    ends[event.request] = event.finish_reason
                if event.request == rest:
                    tokens.append(event.token)
        assert ends == {late: "deadline", rest: "length"} and tokens == want[0]
        assert session.pages_used == 0


def test_a_request_whose_page_is_spoiled_ends_alone(engine: Path) -> None:
    """NaN in cached keys: the step raises, the sequences run apart, one ends, and the page is forgotten."""
    want = alone(engine)
    prompt = list(range(50, 85))
    with opened(engine) as session:
        first = session.complete(prompt, max_tokens=4, ignore_eos=True)
        page = session._tree.match(None, prompt, len(prompt)).pages[0]
        size = session._executor.page_nbytes
        session._executor.write_page(page, np.full(size, 0xFF, np.uint8))  # scales of NaN
        bad = session.submit(Request(prompt=prompt, max_tokens=12, ignore_eos=True))
        good = session.submit(Request(prompt=PROMPTS[0], max_tokens=12, ignore_eos=True))
        tokens, ends = [], {}
        while session.in_flight:
            for event in session.step():
                if event.request == good:
                    tokens.append(event.token)
                if event.finish_reason is not None:
                    ends[event.request] = (event.finish_reason, event.error)
        assert tokens == want[0] and ends[good] == ("length", None)
        assert ends[bad][0] == "error" and "NaN" in str(ends[bad][1])
        assert session.complete(prompt, max_tokens=4, ignore_eos=True).tokens == first.tokens


def test_closing_gives_everything_back(fake_gpu: FakeCuda, with_draft: Path) -> None:
    session = opened(with_draft, speculate="draft")
    session.complete(PROMPTS[0], max_tokens=5)
    assert fake_gpu.used > 0
    assert session.memory_used <= session.memory.need
    session.close()
    assert fake_gpu.used == 0 and fake_gpu.count("leaked allocations") == 0
    with pytest.raises((BadRequest, BackendUnavailable)):
        session.complete(PROMPTS[0], max_tokens=5)


# --- what is refused, before any plane is read -------------------------------------------------------------


@pytest.fixture
def damaged(engine: Path) -> Path:
    """The engine with a byte of its last plane turned over."""
    with read_engine(engine) as whole:
        at = whole.file_nbytes - 4096
        sizes = {name: whole.blob(name).nbytes for name in whole.manifest.blobs}
    assert sizes[CUBIN] > 0
    data = bytearray(engine.read_bytes())
    plane = _plane_offset(engine)
    data[plane] ^= 0x10
    assert plane <= at + 4096
    engine.write_bytes(data)
    return engine


def _plane_offset(path: Path) -> int:
    """Where a byte of the head's matrix lies in the file."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        plane = file.get_tensor("language/head#q").tobytes()
    at = path.read_bytes().find(plane)
    assert at > 0 and len(plane) > 1000
    return at + 17


@pytest.fixture
def nothing_read(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No part was loaded, and no byte went to the device."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a part is loaded")

    monkeypatch.setattr(CudaBackend, "load", load)
    yield
    assert fake_gpu.count("HtoD") == fake_gpu.count("cuModuleLoadDataEx") == 0
    assert fake_gpu.used == 0


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"CC": "9.0"}, DeviceMismatch, ["sm_87", "sm_90"]),
        ({"CC": "8.6"}, DeviceMismatch, ["sm_87", "sm_86"]),
        ({"DRIVER": "11040"}, DeviceMismatch, ["12.6", "11.4", "update the GPU's driver"]),
        ({"DEVICES": "0"}, BackendUnavailable, ["cuda"]),
        ({"MEMORY": str(200_000)}, DoesNotFit, ["need", "CUDA driver"]),
    ],
    ids=["capability", "other sm", "driver", "no GPU", "memory"],
)
def test_a_machine_that_cannot_is_named_before_a_damaged_plane(
    damaged: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    error: type[Exception],
    says: list[str],
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"EDGE_FAKE_{name}", value)
    with pytest.raises(error) as found:
        opened(damaged)
    for words in says:
        assert words in str(found.value), str(found.value)


@pytest.mark.usefixtures("nothing_read")
def test_where_all_else_is_well_the_damaged_plane_is_named(damaged: Path) -> None:
    with pytest.raises(BadEngineFile, match="head"):
        opened(damaged)


def test_other_caches_than_the_code_is_for_are_named(engine: Path) -> None:
    with pytest.raises(Unsupported, match="--kv"):
        opened(engine, kv="f16")


def test_a_device_lost_while_it_serves_ends_all_requests(faulty_gpu: FakeCuda, engine: Path) -> None:
    with opened(engine) as session:
        numbers = {session.submit(Request(prompt=p, max_tokens=9, ignore_eos=True)) for p in PROMPTS}
        session.step()
        faulty_gpu.fail("cuGraphLaunch:1:719")
        with pytest.raises(BackendUnavailable):
            session.step()
        assert {e.request for e in session.step() if e.finish_reason == "error"} == numbers
        assert session.in_flight == session.pages_used == 0
