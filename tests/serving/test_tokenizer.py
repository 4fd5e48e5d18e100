"""Tokenizer: user text never becomes special tokens; streamed text is exactly the decoded whole."""

from __future__ import annotations

import json

import pytest
from history_model import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking_engine import SPECIAL, tokenizer_json, vocabulary
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadEngineFile, BadRequest
from edge_runtime.serving.tokenizer import MAX_TEXT_BYTES, Detokenizer, Tokenizer

BYTE_LEVEL = make_tokenizer()


def sentencepiece(metaspace: bool) -> Tokenizer:
    """A tokenizer as Llama 2 has it: word starts marked, unknown characters as raw bytes."""
    words = ["▁", "▁a", "▁the", "the", "a", "b", "e", "h", "t", "é", "▁é", "🤖", "!"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {w: 259 + i for i, w in enumerate(words)}
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "é")]
    vocab["th"] = len(vocab)
    library = Library(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace:
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = Vocabulary(bos=1, eos=(2,), pad=None, size=library.get_vocab_size())
    return Tokenizer(library.to_str().encode(), names)


TOKENIZERS = {"byte level": BYTE_LEVEL, "llama": sentencepiece(False), "metaspace": sentencepiece(True)}


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> str:
    stream, shown = Detokenizer(tokenizer, context), ""
    for i in ids:
        piece = stream.add(i)
        piece.encode("utf-8")
        shown += piece
    return shown + stream.finish()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streamed_random_ids_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary.size - 1), max_size=30))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aéthe 🤖€!\u200d日", max_size=20), st.integers(0, 20))
def test_continued_text_joins_with_its_prompt(name: str, text: str, cut: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    at = max(1, min(cut, len(ids) - 1))
    prompt, rest = ids[:at], ids[at:]
    head, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    shown = streamed(tokenizer, rest, prompt)
    if "\ufffd" not in head and not (tokenizer.is_byte(prompt[-1]) or tokenizer.is_silent(prompt[-1])):
        assert head + shown == whole


def test_no_half_character_is_shown() -> None:
    ids = BYTE_LEVEL.encode("x🤖y", start=False)
    stream = Detokenizer(BYTE_LEVEL)
    pieces = [stream.add(i) for i in ids]
    assert len(ids) == 6 and pieces == ["x", "", "", "", "🤖", "y"]
    unfinished = Detokenizer(BYTE_LEVEL)
    assert [unfinished.add(i) for i in ids[:3]] == ["x", "", ""]
    assert unfinished.finish() == "\ufffd"


def test_start_token_comes_from_the_post_processor_alone() -> None:
    assert BYTE_LEVEL.encode("hi")[0] == 1
    assert 1 not in BYTE_LEVEL.encode("hi", start=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "<", "|", ">", "user", " ", "x", "</s", "é"]), max_size=12))
def test_user_text_never_becomes_special(words: list[str]) -> None:
    text = "".join(words)
    ids = BYTE_LEVEL.encode(text, start=False)
    assert all(i >= len(SPECIAL) for i in ids)
    assert BYTE_LEVEL.decode(ids) == text
    assert BYTE_LEVEL.has_control(text) == any(s in text for s in SPECIAL)


def test_control_text_is_read_only_when_asked_for() -> None:
    assert BYTE_LEVEL.encode("</s>", start=False, control=True) == [2]
    # The switch of the library must not stick
    assert 2 not in BYTE_LEVEL.encode("</s>", start=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800b", "lone surrogate at character 1"),
        ("x" * MAX_TEXT_BYTES, "1048576 bytes, expected fewer than 1048576"),
        ("€" * (MAX_TEXT_BYTES // 3 + 1), "bytes, expected fewer"),
        (b"bytes", "the prompt is bytes, expected text"),
    ],
)
def test_bad_text(text: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        BYTE_LEVEL.encode(text)  # type: ignore[arg-type]


def test_ids_beyond_the_model_are_refused() -> None:
    short = Tokenizer(tokenizer_json(), Vocabulary(bos=1, eos=(2,), pad=None, size=100))
    with pytest.raises(BadRequest, match="the model has 100 tokens"):
        short.encode("the kitchen")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"version":"1.0"}', b"[" * 10_000])
def test_a_useless_tokenizer_file_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(BadEngineFile, match=r"tokenizer\.json cannot be used"):
        Tokenizer(data, vocabulary())


def test_truncation_and_padding_of_the_file_are_off() -> None:
    config = json.loads(tokenizer_json())
    config["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    config["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    tokenizer = Tokenizer(json.dumps(config).encode(), vocabulary())
    text = "Once upon a time there was a robot"
    assert tokenizer.encode(text) == BYTE_LEVEL.encode(text)
