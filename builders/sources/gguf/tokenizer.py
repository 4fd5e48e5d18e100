"""A GGUF file's vocabulary as the tokenizer.json of the `tokenizers` library.

tokenizer.ggml.model "gpt2": byte-level BPE with its merges; tokenizer.ggml.pre names how text is cut into
words first, by the expressions of llama.cpp's llama-vocab.cpp. "llama": SentencePiece BPE (Kudo & Richardson
2018), whose merges follow from the scores: of two neighbours the pair whose joined piece scores highest is
joined first, as Hugging Face converts such models. A piece that cannot be made is spelled in bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, Unsupported, nearest

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER, _UNKNOWN = 3, 4, 2
_SPACE = "\u2581"
# A text's last token in chats, where no key names it (llama.cpp looks for the same texts)
_TURN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<|end_of_turn|>", "</s>", "<EOT>", "_<EOT>",
)  # fmt: skip
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS % "{1,3}", _WORDS % ""
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _CASES % (*[r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"] * 2, "{1,3}")
_TEKKEN = _CASES % ("", "", "")
# tokenizer.ggml.pre -> expression, or "gpt2" for ByteLevel's own, "digits" for that after single digits
_PRE = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
    "smollm": "digits",
    "refact": "digits",
    "starcoder": "digits",
    "command-r": "digits",
}


@dataclass(frozen=True, slots=True)
class FoundTokenizer:
    """data: tokenizer.json; special: bos, eos and pad ids as generation_config.json names them."""

    data: bytes
    chat_template: str | None
    special: dict[str, Any]


def read_tokenizer(metadata: dict[str, Any]) -> FoundTokenizer:
    """Raises BadCheckpoint on wrong types and lengths, Unsupported for kinds that are not known."""
    tokens = _texts(metadata, "tokens")
    kinds = _numbers(metadata, "token_type", len(tokens), default=1)
    model = metadata.get(f"{_PREFIX}model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in makers:
        raise Unsupported(f"tokenizer.ggml.model is {model!r}; {nearest(str(model), makers)}")
    ids = {kind: _id(metadata, f"{kind}_token_id", len(tokens)) for kind in ("bos", "eos", "eot", "eom")}
    ids["pad"] = _id(metadata, "padding_token_id", len(tokens))
    ids["unk"] = _id(metadata, "unknown_token_id", len(tokens))
    data: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    data["added_tokens"] = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kinds[i] != _USER),
        }
        for i in np.flatnonzero(np.isin(kinds, (_CONTROL, _USER, _UNKNOWN))).tolist()
        if tokens[i]
    ]
    data |= makers[str(model)](metadata, tokens, kinds, ids)
    template = metadata.get("tokenizer.chat_template")
    return FoundTokenizer(
        json.dumps(data, ensure_ascii=False).encode(),
        template if isinstance(template, str) else None,
        _special(tokens, kinds, ids),
    )


def _special(tokens: list[str], kinds: Array, ids: dict[str, int | None]) -> dict[str, Any]:
    ends = [ids[kind] for kind in ("eos", "eot", "eom")]
    ends += [i for i, text in enumerate(tokens) if text in _TURN_ENDS and kinds[i] == _CONTROL]
    eos = list(dict.fromkeys(i for i in ends if i is not None))
    found = {"bos_token_id": ids["bos"], "eos_token_id": eos or None, "pad_token_id": ids["pad"]}
    return {key: value for key, value in found.items() if value is not None}


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], kinds: Array, ids: dict[str, int | None]
) -> dict[str, Any]:
    vocabulary = _vocabulary(tokens)
    merges = [text.split(" ", 1) for text in _texts(metadata, "merges")]
    for pair in merges:
        if (
            len(pair) != 2
            or pair[0] not in vocabulary
            or pair[1] not in vocabulary
            or "".join(pair) not in vocabulary
        ):
            raise BadCheckpoint(
                f"tokenizer.ggml.merges has {' '.join(pair)!r}, which does not join two tokens to one"
            )
    pre = metadata.get(f"{_PREFIX}pre", "default")
    if pre not in _PRE:
        raise Unsupported(
            f"tokenizer.ggml.pre is {pre!r}; {nearest(str(pre), _PRE)} (known: {', '.join(_PRE)})"
        )
    rule = _PRE[pre]
    steps: list[dict[str, Any]] = []
    if rule == "digits":
        steps.append({"type": "Digits", "individual_digits": True})
    elif rule != "gpt2":
        steps.append({"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    steps.append(level | {"use_regex": rule in ("gpt2", "digits")})
    return {
        "normalizer": {"type": "NFC"} if rule == _QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _begin(metadata, tokens, ids, default=False),
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule in (_LLAMA3, _TEKKEN),
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], kinds: Array, ids: dict[str, int | None]
) -> dict[str, Any]:
    scores = _numbers(metadata, "scores", len(tokens))
    prefix = metadata.get(f"{_PREFIX}add_space_prefix", True) is True
    vocabulary = _vocabulary(tokens)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    begin = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = ids["unk"] if ids["unk"] is not None else 0
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, replace]},
        "pre_tokenizer": None,
        "post_processor": _begin(metadata, tokens, ids, default=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *end,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(tokens, scores, kinds),
        },
    }


def _merges(tokens: list[str], scores: Array, kinds: Array) -> list[list[str]]:
    """Every way to join two pieces to one, the best-scored result first, then the shorter left part."""
    pieces = {text: i for i, text in enumerate(tokens) if kinds[i] not in (_CONTROL, _UNKNOWN, 6)}
    found = []
    for text, i in pieces.items():
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        good = [(left, right) for left, right in pairs if left in pieces and right in pieces]
        good.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        found += [(-float(scores[i]), i, left, right) for left, right in good]
    found.sort(key=lambda item: item[:2])  # stable: the order of a piece's own pairs stays
    return [[left, right] for _, _, left, right in found]


def _begin(
    metadata: dict[str, Any], tokens: list[str], ids: dict[str, int | None], *, default: bool
) -> dict[str, Any] | None:
    """What puts the first token before a text, where the file asks for it."""
    bos = ids["bos"]
    if bos is None or metadata.get(f"{_PREFIX}add_bos_token", default) is not True:
        return None
    text = tokens[bos]
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            first,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Text -> id; a text that is there twice keeps its first id, as a text can mean but one."""
    found: dict[str, int] = {}
    for i, text in enumerate(tokens):
        found.setdefault(text, i)
    return found


def _texts(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(_PREFIX + key)
    if not isinstance(value, list) or not value:
        raise BadCheckpoint(f"metadata {_PREFIX}{key} is {type(value).__name__}, expected an array of texts")
    return value


def _numbers(metadata: dict[str, Any], key: str, count: int, default: int | None = None) -> Array:
    value = metadata.get(_PREFIX + key)
    if value is None and default is not None:
        return np.full(count, default)
    if not isinstance(value, np.ndarray) or len(value) != count:
        found = f"{len(value)} numbers" if isinstance(value, np.ndarray) else type(value).__name__
        raise BadCheckpoint(
            f"metadata {_PREFIX}{key} is {found}, expected one number for each of {count} tokens"
        )
    return value


def _id(metadata: dict[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(_PREFIX + key)
    if value is None or (key == "padding_token_id" and value == 0xFFFFFFFF):
        return None
    if type(value) is not int or not 0 <= value < count:
        raise BadCheckpoint(
            f"metadata {_PREFIX}{key} is {value!r}, expected a token id from 0 to {count - 1}"
        )
    return value
