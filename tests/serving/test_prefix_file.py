"""Saved prefixes: the same numbers without computing them, and nothing else is ever taken for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from history_model import assert_idle
from speaking_engine import TEMPLATE, vocabulary, write_speaking
from toy_engine import toy_adapter, toy_program

from edge_runtime import BadPrefixFile, BadRequest, Sampling, open_engine
from edge_runtime.backends import cpu
from edge_runtime.serving.prefix_file import Origin, SavedPrefix, read_prefix, write_prefix
from edge_runtime.serving.session import Session

BACKENDS = ["reference", *(["cpu"] if cpu.BACKEND.available().ok else [])]
BACKEND = BACKENDS[-1]
VOCAB = vocabulary().size
PREFIX = [7 + i % 40 for i in range(37)]  # two pages of 16, and a rest
PROMPT = [*PREFIX, 9, 11, 13]
SAMPLING = Sampling(logprobs=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "speaking.edge"
    write_speaking(path)
    return path


@pytest.fixture(scope="module")
def saved(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tools.prefix"
    with opened(engine) as session:
        assert session.save_prefix(PREFIX, path) == 32
    return path


@pytest.fixture(scope="module")
def origin(engine: Path) -> Origin:
    with opened(engine) as session:
        return session._prefixes.origin


def opened(engine: Path, **options: Any) -> Session:
    return open_engine(engine, **{"backend": BACKEND, "threads": 1, "speculate": "off"} | options)


def adapter(seed: int) -> Any:
    return toy_adapter(toy_program(vocab=VOCAB), seed)


# --- what it is for ---


@pytest.mark.parametrize("kv", ["f16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_prefix_gives_the_numbers_of_a_computed_one(
    engine: Path, tmp_path: Path, backend: str, kv: str
) -> None:
    path = tmp_path / "p.prefix"
    with opened(engine, backend=backend, kv=kv) as session:
        want = session.complete(PROMPT, SAMPLING, max_tokens=12)
        assert want.usage.cached_tokens == 0
    with opened(engine, backend=backend, kv=kv) as session:
        assert session.save_prefix(PREFIX, path) == 32
    with opened(engine, backend=backend, kv=kv) as session:
        assert session.load_prefix(path) == 32 and session.pages_kept == 2
        assert session.load_prefix(path) == 32 and session.pages_kept == 2  # known already
        got = session.complete(PROMPT, SAMPLING, max_tokens=12)
        assert got.usage.cached_tokens == 32
        assert (got.tokens, got.logprobs, got.top_logprobs) == (want.tokens, want.logprobs, want.top_logprobs)
        assert_idle(session)
    assert os.listdir(tmp_path) == ["p.prefix"]


def test_text_and_messages_make_prefixes_too(engine: Path, tmp_path: Path) -> None:
    system = [{"role": "user", "content": "Once upon a time there was a robot. It went to the kitchen. " * 2}]
    text = "Once upon a time there was a robot and a red mug in the kitchen, grüßte and more"
    with opened(engine) as session:
        assert session.save_prefix(system, tmp_path / "chat") >= 16
        assert session.save_prefix(text, tmp_path / "text") >= 16
    with opened(engine) as session:
        session.load_prefix(tmp_path / "chat")
        session.load_prefix(tmp_path / "text")
        assert session.chat(system, max_tokens=2).usage.cached_tokens >= 16
        assert session.complete(text, max_tokens=2).usage.cached_tokens >= 16


def test_a_prefix_that_fills_no_page_is_refused(engine: Path, tmp_path: Path) -> None:
    with opened(engine) as session:
        with pytest.raises(BadRequest, match="the prefix has 15 tokens, a page of the KV cache 16"):
            session.save_prefix(PREFIX[:15], tmp_path / "p")
        assert os.listdir(tmp_path) == []
        assert_idle(session)


def test_a_prefix_goes_into_the_cache_only_where_there_is_room(engine: Path, saved: Path) -> None:
    with opened(engine, context=24) as session:  # four pages in all
        streams = [session.generate([9 + i] * 20, max_tokens=4) for i in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(BadRequest, match="needs 2 pages of the KV cache, 0 are free"):
            session.load_prefix(saved)
        for stream in streams:
            stream.close()
        assert session.load_prefix(saved) == 32
        assert_idle(session)


# --- what belongs to another ---


def test_a_prefix_of_another_engine_backend_or_cache_is_refused_naming_both(
    engine: Path, saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.edge"
    write_speaking(other, template=TEMPLATE + " ")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (other, {}, "saved for engine "),
        (engine, {"kv": "f16"}, "saved for k int8, this session has f16"),
        (engine, {"kv": "int8,f16"}, "saved for v int8, this session has f16"),
    ]
    if len(BACKENDS) == 2:
        cases.append((engine, {"backend": "reference"}, "saved for backend cpu, this session has reference"))
    for path, options, message in cases:
        with opened(path, **options) as session:
            with pytest.raises(BadPrefixFile) as caught:
                session.load_prefix(saved)
            assert message in str(caught.value) and str(saved) in str(caught.value)
            assert session.pages_kept == 0
            assert_idle(session)
        with pytest.raises(BadPrefixFile, match="saved for"):
            opened(path, prefix=saved, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_tokens", 32),
        ("page_nbytes", 1),
        ("part", "draft"),
        ("adapter", "ab" * 32),
        ("engine", "cd" * 32),
    ],
)
def test_every_part_of_the_origin_counts(saved: Path, origin: Origin, name: str, value: object) -> None:
    assert read_prefix(saved, origin, VOCAB).tokens == tuple(PREFIX[:32])
    with pytest.raises(BadPrefixFile) as caught:
        read_prefix(saved, msgspec.structs.replace(origin, **{name: value}), VOCAB)
    had = getattr(origin, name)
    assert f"saved for {name} {had}, this session has {value}; save it again" in str(caught.value)


def test_a_prefix_is_its_adapters(engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.prefix"
    with opened(engine, adapters={"tidy": adapter(3)}) as session:
        want = session.complete(PROMPT, SAMPLING, max_tokens=6, adapter="tidy")
        assert session.complete(PROMPT, SAMPLING, max_tokens=6).logprobs != want.logprobs
        assert session.save_prefix(PREFIX, path, adapter="tidy") == 32
    with opened(engine, adapters={"neat": adapter(3), "tidy": adapter(4)}) as session:
        for name in (None, "tidy"):
            with pytest.raises(BadPrefixFile, match=r"saved for adapter [0-9a-f]{64}, this session has"):
                session.load_prefix(path, adapter=name)
        with pytest.raises(BadRequest, match="no adapter 'nobody' is loaded"):
            session.load_prefix(path, adapter="nobody")
        assert session.load_prefix(path, adapter="neat") == 32
        assert session.complete(PROMPT, max_tokens=2).usage.cached_tokens == 0
        got = session.complete(PROMPT, SAMPLING, max_tokens=6, adapter="neat")
        assert got.usage.cached_tokens == 32 and got.logprobs == want.logprobs


def test_an_adapter_replaced_while_its_prefix_is_read_gets_none_of_it(engine: Path, tmp_path: Path) -> None:
    with opened(engine, adapters={"tidy": adapter(3)}) as session:
        session.save_prefix(PREFIX, tmp_path / "p", adapter="tidy")
    with opened(engine, adapters={"tidy": adapter(3)}) as session:
        prefixes = session._prefixes

        class Slow:
            """Reads, and meanwhile another thread puts another adapter into its place."""

            def read(self, *args: Any) -> SavedPrefix:
                found = prefixes.read(*args)
                session.drop_adapter("tidy")
                session.load_adapter("tidy", adapter(4))
                return found

            def restore(self, *args: Any) -> int:
                return prefixes.restore(*args)

        session._prefixes = Slow()  # type: ignore[assignment]
        with pytest.raises(BadRequest, match="the adapter 'tidy' was replaced meanwhile"):
            session.load_prefix(tmp_path / "p", adapter="tidy")
        assert session.pages_kept == 0


# --- beside the engine ---


def test_the_prefix_beside_the_engine_is_taken_without_a_word(
    engine: Path, saved: Path, tmp_path: Path
) -> None:
    here = tmp_path / "robot.edge"
    here.write_bytes(engine.read_bytes())
    with opened(here) as session:
        assert session.pages_kept == 0
        notices = session.notices
    (tmp_path / "robot.prefix").write_bytes(saved.read_bytes())
    with opened(here) as session:
        assert session.pages_kept == 2 and session.notices == notices
        assert session.complete(PROMPT, max_tokens=2).usage.cached_tokens == 32


@pytest.mark.parametrize("what", ["another cache", "damaged", "empty", "too long for this cache"])
def test_one_that_does_not_match_is_worth_a_notice(
    engine: Path, saved: Path, tmp_path: Path, what: str
) -> None:
    here, beside = tmp_path / "robot.edge", tmp_path / "robot.prefix"
    here.write_bytes(engine.read_bytes())
    options: dict[str, Any] = {}
    if what == "too long for this cache":
        with opened(here) as session:
            assert session.save_prefix([*PREFIX, *PREFIX[:12]], beside) == 48
        options = {"context": 16}
    else:
        data = saved.read_bytes()
        beside.write_bytes({"damaged": data[:-5] + b"xxxxx", "empty": b""}.get(what, data))
        options = {"kv": "f16"} if what == "another cache" else {}
    with opened(here, **options) as session:
        told = [n for n in session.notices if "the saved prefix beside the engine is not used" in n]
        assert len(told) == 1 and session.pages_kept == 0
        assert len(session.complete([9, 8], max_tokens=3).tokens) == 3
        assert_idle(session)
    with pytest.raises((BadPrefixFile, BadRequest)):  # asked for by name, it must be there
        opened(here, prefix=beside, **options)


# --- writing ---


def test_a_write_that_fails_leaves_the_old_file(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.prefix"
    prefix = SavedPrefix(tuple(PREFIX[:16]), np.zeros((1, origin.page_nbytes), np.uint8))
    write_prefix(path, origin, prefix)
    before = path.read_bytes()
    for call in ("fsync", "replace"):

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(BadPrefixFile, match="cannot be written: No space left on device"):
                write_prefix(path, origin, SavedPrefix(tuple(PREFIX[:16]), prefix.pages + 1))
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["p.prefix"]
