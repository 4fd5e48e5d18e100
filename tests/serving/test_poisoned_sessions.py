"""NaN and Inf in a live session: the request that meets them ends with an error in that same step, without a
token; the others of the step say what they say without it; the next request finds nothing spoiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from books import check_pool, check_tree
from real_engines import Engines, Recorder, prompts, same

from edge_runtime import Request, Sampling, Session, open_engine
from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine import packing
from edge_runtime.engine.adapter import LowRank
from edge_runtime.engine.kv import K_FORMATS, cache_arrays
from edge_runtime.engine.program import TensorSpec
from edge_runtime.errors import BadRequest
from edge_runtime.serving.request import Token
from edge_runtime.serving.sequence import Sequence

if not CPU.available().ok:
    pytest.skip(CPU.available().why, allow_module_level=True)

Array = np.ndarray[Any, Any]
Edit = Callable[[Part], Part]
VALUES = (np.nan, np.inf, -np.inf)
HUGE = np.float32(3e38)
LAYERS = 6  # of the planner
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
TOKEN, CHANNEL = 700, 11  # what is spoiled is reached from this token alone, through this channel
TOKENS = 8  # of an answer
PAGE = 16  # tokens


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> dict[int, Edit]:
    """What is done to a part before it is loaded, by its layers: 6 the planner, 1 its draft, 0 a head."""
    found: dict[int, Edit] = {}
    for backend in (type(CPU), type(REFERENCE)):

        def load(self: Any, part: Part, *, of: Any = backend.load, **options: Any) -> Any:
            return of(self, found.get(len(part.program.cache), lambda p: p)(part), **options)

        monkeypatch.setattr(backend, "load", load)
    return found


def f32(values: Array) -> PackedTensor:
    rows, cols = values.shape
    how = "rows" if rows == 1 else packing.cpu_packing("f32")
    planes = {"w": np.ascontiguousarray(values, np.float32)}  # the codec refuses what is not finite
    return PackedTensor(rows, cols, "f32", how, packing.pack("f32", how, planes, rows, cols))


def with_values(part: Part, changed: dict[str, Array]) -> Part:
    return replace(part, weights={**part.weights, **{name: f32(v) for name, v in changed.items()}})


def apart(part: Part, layer: int) -> dict[str, Array]:
    """f32 values of the tensors in question: CHANNEL of the hidden state is 0 but after TOKEN, and so are
    value 0 of the first key/value head and inner value 0 of the layer's feed-forward.
    """
    found = {name: decode(part.weights[name]).copy() for name in ("embed", "norm")}
    found["embed"][:, CHANNEL] = 0
    found["embed"][TOKEN, CHANNEL] = 1000
    for i in range(LAYERS):
        for name in MATRICES if i == layer else ("o", "down"):
            found[f"{name}.{i}"] = decode(part.weights[f"layers.{i}.{name}"]).copy()
        found[f"o.{i}"][CHANNEL] = found[f"down.{i}"][CHANNEL] = 0
    found[f"v.{layer}"][0] = found[f"gate.{layer}"][0] = found[f"up.{layer}"][0] = 0
    found[f"o.{layer}"][:, [0, 64]] = found[f"down.{layer}"][:, 0] = 0
    for name in ("attention_norm", "mlp_norm"):
        found[f"{name}.{layer}"] = decode(part.weights[f"layers.{layer}.{name}"]).copy()
    return {_full(name): values for name, values in found.items()}


def _full(name: str) -> str:
    kind, _, layer = name.partition(".")
    return f"layers.{layer}.{kind}" if layer else name


def overflow(values: dict[str, Array], kind: str, layer: int) -> dict[str, Array]:
    """The same with a product that overflows after TOKEN; elsewhere what is huge meets zeros."""
    name = f"layers.{layer}.{kind}"
    if kind.endswith("norm"):
        name = name if kind != "norm" else "norm"
        bad = values[name].copy()
        bad[0, CHANNEL] = HUGE
        return {**values, name: bad}
    if kind == "head":
        bad = values["embed"].copy()
        bad[5, CHANNEL] = HUGE  # token 5 is in no prompt and no answer
        return {**values, "embed": bad}
    inner = {"o": ("v",), "down": ("gate", "up")}.get(kind, ())
    changed = {f"layers.{layer}.{n}": values[f"layers.{layer}.{n}"].copy() for n in inner}
    for matrix in changed.values():
        matrix[0, CHANNEL] = 1e3
    bad = values[name].copy()
    bad[(1, 0) if inner else (0, CHANNEL)] = HUGE
    return {**values, **changed, name: bad}


def asked(session: Session, **options: Any) -> list[Request]:
    """Three requests, the first of which ends with TOKEN."""
    texts = prompts(session, "planner", 3)
    texts[0].append(TOKEN)
    assert not any(i in text for text in texts[1:] for i in (5, TOKEN))
    return [Request(prompt=ids, max_tokens=TOKENS, ignore_eos=True, **options) for ids in texts]


def fails(events: list[Token], served: Sequence) -> bool:
    """Whether a step brought a sequence its end with an error that says why, and no token."""
    mine = [event for event in events if event.request == served.id]
    return [(e.token, e.text, e.finish_reason) for e in mine] == [(None, "", "error")] and any(
        word in str(mine[0].error) for word in ("NaN", "Inf", "does not fit")
    )


def finish(session: Session) -> None:
    while session.in_flight:
        session.step()
    assert session.pages_used == 0
    check_pool(session._pool, [])
    check_tree(session._tree, session._pool)


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "layer"), [*(("cpu", i) for i in range(LAYERS)), ("reference", LAYERS - 1)]
)
def test_an_overflow_in_any_layer(
    engines: Engines, recorder: Recorder, edits: dict[int, Edit], backend: str, layer: int
) -> None:
    """Weights of every kind are huge where one request alone gets to them."""
    path = engines.build("planner")
    values: dict[str, Array] = {}

    def plain(part: Part) -> Part:
        values.update(apart(part, layer))
        return with_values(part, values)

    edits[LAYERS] = plain
    with open_engine(path, backend=backend, speculate="off", threads=2) as session:
        requests = asked(session)
        want = recorder.alone(session, requests)
        assert not any(i in answer.tokens for answer in want[1:] for i in (5, TOKEN))
    kinds = [*MATRICES, "attention_norm", "mlp_norm", *(["norm", "head"] if layer == LAYERS - 1 else [])]
    for kind in kinds:
        spoiled = overflow(values, kind, layer)
        edits[LAYERS] = lambda part, spoiled=spoiled: with_values(part, spoiled)  # type: ignore[misc]
        with open_engine(path, backend=backend, speculate="off", threads=2) as session:
            served = [session._traffic.live[session.submit(r)] for r in requests]
            assert fails(session.step(), served[0]), kind
            assert [len(s.answer) for s in served[1:]] == [1, 1]
            finish(session)
            got = [recorder.answer(s) for s in served]
        if backend == "cpu":
            assert same(got[1:], want[1:]), kind
        else:
            assert [a.tokens for a in got[1:]] == [a.tokens for a in want[1:]], kind


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", VALUES)
def test_an_embedding_that_is_not_finite(
    engines: Engines, recorder: Recorder, edits: dict[int, Edit], backend: str, value: float
) -> None:
    """The head is a tensor of its own here, so that only the prompt with the token meets it."""

    def untied(part: Part, value: float | None) -> Part:
        head = decode(part.weights["embed"])
        embed = head.copy()
        if value is not None:
            embed[TOKEN, CHANNEL] = value
        spec = TensorSpec(*head.shape, "head")
        program = msgspec.structs.replace(
            part.program,
            ops=(*part.program.ops[:-1], msgspec.structs.replace(part.program.ops[-1], weight="own")),
            tensors={**part.program.tensors, "own": spec},
        )
        return with_values(replace(part, program=program), {"embed": embed, "own": head})

    path = engines.build("planner")
    edits[LAYERS] = lambda part: untied(part, None)
    with open_engine(path, backend=backend, speculate="off") as session:
        requests = asked(session)
        want = recorder.together(session, requests)
    edits[LAYERS] = lambda part: untied(part, value)
    with open_engine(path, backend=backend, speculate="off") as session:
        served = [session._traffic.live[session.submit(r)] for r in requests]
        assert fails(session.step(), served[0])
        finish(session)
        assert [tuple(s.answer) for s in served[1:]] == [a.tokens for a in want[1:]]


def test_a_piece_of_a_prompt_without_logits(engines: Engines, edits: dict[int, Edit]) -> None:
    """The overflow of the last layer, in the first of several pieces, ends the request in that step."""
    path = engines.build("planner", "--step-tokens", "8", name="pieces")
    last = LAYERS - 1
    edits[LAYERS] = lambda part: with_values(part, overflow(apart(part, last), "down", last))
    with open_engine(path, speculate="off") as session:
        ids = prompts(session, "planner", 1)[0]
        served = session._traffic.live[session.submit(Request(prompt=[ids[0], TOKEN, *ids[1:]]))]
        assert fails(session.step(), served)
        finish(session)


# --- the cache ---------------------------------------------------------------------------------------------


def spoil(session: Session, page: int, layer: int, which: str, value: float, at: int) -> None:
    """One scale, or one number where there are none, of a page of a live session."""
    executor, kv = session._executor, session.kv
    arrays = cache_arrays(session.manifest.parts["language"].program, kv)
    data = executor.read_page(page)
    mine = [a for a in arrays if (a.layer, a.which) == (layer, which)]
    chosen = next((a for a in mine if a.plane == "scale"), mine[0])
    start = sum(a.nbytes // kv.pages for a in arrays[: arrays.index(chosen)])
    plane = data[start : start + chosen.nbytes // kv.pages].view(chosen.dtype)
    plane[at % plane.size] = value
    executor.write_page(page, data)


def poisoned_step(session: Session, requests: list[Request], after: int) -> list[Sequence]:
    """Submit and run until each has `after` tokens of its answer at least."""
    session._tree.drop(None)
    served = [session._traffic.live[session.submit(r)] for r in requests]
    while min(len(s.answer) for s in served) < after:
        session.step()
    return served


@pytest.mark.parametrize(
    ("backend", "kv"), [("cpu", kv) for kv in K_FORMATS] + [("reference", kv) for kv in ("f16", "int8")]
)
def test_a_page_of_one_request(engines: Engines, recorder: Recorder, backend: str, kv: str) -> None:
    layers = range(LAYERS) if backend == "cpu" else (0, LAYERS - 1)
    with open_engine(engines.build("planner"), backend=backend, kv=kv, speculate="off", threads=2) as session:
        requests = asked(session)
        want = recorder.alone(session, requests)
        for i, (layer, which) in enumerate((n, side) for n in layers for side in ("k", "v")):
            served = poisoned_step(session, requests, 3)
            page = served[0].pages
            assert page is not None
            spoil(session, page.pages[0], layer, which, VALUES[(i + i // 3) % 3], 37 * i)
            assert fails(session.step(), served[0]), (layer, which)
            assert [len(s.answer) for s in served] == [3, 4, 4]
            finish(session)
            got = [recorder.answer(s) for s in served]
            if backend == "reference":
                assert [a.tokens for a in got[1:]] == [a.tokens for a in want[1:]]
                continue
            assert same(got[1:], want[1:])
            again = recorder.together(session, requests)  # nothing spoiled is found again
            assert same(again, want) and again[0].cached < PAGE <= again[1].cached


@pytest.mark.parametrize("way", ["draft", "lookup", "medusa"])
def test_a_page_spoiled_while_guesses_are_made(engines: Engines, recorder: Recorder, way: str) -> None:
    path = engines.full("planner")
    with open_engine(path, kv="int8", speculate="off", threads=1) as session:
        requests = [replace(r, max_tokens=30) for r in asked(session)]
        want = recorder.alone(session, requests)
    with open_engine(path, kv="int8", speculate=way, gated=False, threads=2) as session:
        for layer in range(LAYERS):
            served = poisoned_step(session, requests, 2)
            before = len(served[0].answer)
            assert served[0].pages is not None
            spoil(session, served[0].pages.pages[0], layer, "kv"[layer % 2], VALUES[layer % 3], 5)
            assert fails(session.step(), served[0])
            assert len(served[0].answer) == before
            finish(session)
            got = [recorder.answer(s) for s in served]
            assert same(got[1:], want[1:])
            assert sum(a.accepted for a in got) > 0


def test_a_page_that_two_requests_share(engines: Engines, recorder: Recorder) -> None:
    """Both meet it and end; a third goes on. What they held is known no more, nor what grew from it."""
    with open_engine(engines.build("planner"), kv="int8", speculate="off", threads=2) as session:
        third, one, two = (request.prompt for request in asked(session))
        texts = [[*one, *third[:20]], [*one, *two], third]
        requests = [Request(prompt=ids, max_tokens=TOKENS, ignore_eos=True) for ids in texts]
        want = recorder.alone(session, requests)
        session._tree.drop(None)
        recorder.together(session, [Request(prompt=texts[0], max_tokens=40, ignore_eos=True)])
        served = [session._traffic.live[session.submit(r)] for r in requests]
        session.step()
        shared = [s.pages.pages[0] for s in served if s.pages is not None]
        assert shared[0] == shared[1] != shared[2]
        spoil(session, shared[0], 2, "k", np.nan, 3)
        events = session.step()
        assert fails(events, served[0]) and fails(events, served[1])
        finish(session)
        assert same([recorder.answer(served[2])], want[2:])
        again = recorder.together(session, requests)
        assert same(again, want)
        assert max(a.cached for a in again[:2]) < PAGE


def test_a_page_that_was_copied_in_part(engines: Engines, recorder: Recorder) -> None:
    """A kept page that nobody holds is spoiled: who gets a copy of it fails, once."""
    with open_engine(engines.build("planner"), kv="f16", speculate="off", threads=2) as session:
        text = asked(session)[1].prompt
        request = Request(prompt=[*text[:10], *text[2:]], max_tokens=TOKENS, ignore_eos=True)
        want = recorder.alone(session, [request])
        session._tree.drop(None)
        recorder.together(session, [Request(prompt=text, max_tokens=2, ignore_eos=True)])
        (node,) = session._tree._by_page.values()
        spoil(session, node.page, 3, "v", np.inf, 7)
        served = session._traffic.live[session.submit(request)]
        assert fails(session.step(), served)
        assert served.cached == 10
        finish(session)
        again = recorder.together(session, [request])
        assert same(again, want)
        assert again[0].cached < PAGE


# --- adapters ----------------------------------------------------------------------------------------------


def update(session: Session, name: str, a: float, b: float, scale: float) -> dict[str, LowRank]:
    spec = session.manifest.parts["language"].program.tensors[name]
    return {
        name: LowRank(
            np.full((2, spec.cols), a, np.float16), np.full((spec.rows, 2), b, np.float16), scale=scale
        )
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_adapter_that_overflows(engines: Engines, recorder: Recorder, backend: str) -> None:
    """Finite numbers whose product is not, in each matrix; the requests without it go on."""
    layers = range(LAYERS) if backend == "cpu" else (0, LAYERS - 1)
    names = [f"layers.{i}.{kind}" for i in layers for kind in MATRICES] + ["embed"]
    with open_engine(engines.build("planner"), backend=backend, speculate="off", threads=2) as session:
        session.load_adapter("good", update(session, "layers.1.q", 0.01, 0.02, 1.0))
        requests = [replace(r, adapter=n) for r, n in zip(asked(session), ("bad", "good", None), strict=True)]
        session._tree.drop(None)
        want = recorder.together(session, requests[1:])
        for name in names:
            session.load_adapter("bad", update(session, name, 6e4, 6e4, 3e38))
            served = [session._traffic.live[session.submit(r)] for r in requests]
            assert fails(session.step(), served[0]), name
            finish(session)
            assert [tuple(s.answer) for s in served[1:]] == [a.tokens for a in want], name
            session.drop_adapter("bad")
        for value in VALUES:
            adapter = update(session, "layers.2.up", value, 1.0, 1.0)
            with pytest.raises(BadRequest, match="holds NaN or Inf"):
                session.load_adapter("bad", adapter)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_adapter_spoiled_in_memory(engines: Engines, backend: str) -> None:
    with open_engine(engines.build("planner"), backend=backend, speculate="off", threads=2) as session:
        requests = asked(session)
        want = [session.answer(r).tokens for r in requests[1:]]
        for value in VALUES:
            session.load_adapter("bad", update(session, "layers.2.up", 0.01, 0.01, 1.0))
            held = session._executor._adapters[0]  # type: ignore[attr-defined]
            a = held.memory[:2].view(np.float16) if backend == "cpu" else held["layers.2.up"].a[0]
            a[0] = value
            served = [
                session._traffic.live[session.submit(r)]
                for r in (replace(requests[0], adapter="bad"), *requests[1:])
            ]
            assert fails(session.step(), served[0])
            finish(session)
            assert [tuple(s.answer) for s in served[1:]] == want
            session.drop_adapter("bad")


# --- who guesses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "way", "temperature"),
    [
        *(("cpu", way, temperature) for way in ("draft", "medusa") for temperature in (0.0, 1.0)),
        ("reference", "draft", 0.0),
        ("reference", "medusa", 0.0),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the codecs, which decode Inf
def test_a_guesser_that_is_not_finite(
    engines: Engines, edits: dict[int, Edit], backend: str, way: str, temperature: float
) -> None:
    """Each tensor of it in turn. Its trouble is not the request's: no guesses, and the text of plain
    decoding.
    """
    path = engines.full("planner")
    with open_engine(path, backend=backend, speculate="off", threads=2) as session:
        requests = asked(session, sampling=Sampling(temperature=temperature, seed=4))
        want = [session.answer(r).tokens for r in requests]
        names = list(session.manifest.parts["draft" if way == "draft" else "medusa-1"].program.tensors)
    for i, name in enumerate(names if backend == "cpu" else names[::4]):
        edits[int(way == "draft")] = lambda part, name=name, value=VALUES[i % 3]: with_one(part, name, value)  # type: ignore[misc]
        with open_engine(path, backend=backend, speculate=way, gated=False, threads=2) as session:
            served = [session._traffic.live[session.submit(r)] for r in requests]
            finish(session)
            assert [tuple(s.answer) for s in served] == want, name
            assert session.speculation.failures > 0
            assert [s.record.drafted for s in served] == [0, 0, 0]


def with_one(part: Part, name: str, value: float) -> Part:
    """One scale of a tensor, or one number where there are none."""
    tensor = part.weights[name]
    plane = "scale" if "scale" in tensor.planes else next(iter(tensor.planes))
    bad = tensor.planes[plane].copy()
    bad[1] = value
    return replace(
        part, weights={**part.weights, name: replace(tensor, planes={**tensor.planes, plane: bad})}
    )
