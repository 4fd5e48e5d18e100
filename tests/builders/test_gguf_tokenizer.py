"""Byte-level vocabularies through GGUF: each way of cutting words, against the tokenizer it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_bytes, llama_metadata
from hf_folders import llama_config, llama_shapes
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from builders.sources import open_source, read_vocabulary
from builders.sources.gguf.tokenizer import read_tokenizer
from edge_runtime.errors import BadCheckpoint, Unsupported

TEXTS = [
    "Hello world, it's 2024! You'RE right: 1234567 and 3.14.",
    "  leading, trailing  \n\n\tTabs\r\nand   runs ",
    "naïve café Größe e\u0301 \uff21\uff42", "def f(x):\n    return x**2 # ok", "日本語のテキスト 🦊🦊 ½", "",
]  # fmt: skip
# The expressions of the models' own tokenizer.json files
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}


def trained(pre: str) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre])
    made.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    special = ["<|begin|>", "<|im_end|>", "<tool>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(TEXTS * 4, trainer)
    return made


def metadata_of(made: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {"<|begin|>": 3, "<|im_end|>": 3, "<tool>": 4}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(t, 1) for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def parsed(metadata: dict[str, Any]) -> dict[str, Any]:
    """As the header gives it: numbers in arrays."""
    return {
        k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v
        for k, v in metadata.items()
    }


@pytest.mark.parametrize("pre", CUTS)
def test_texts_become_the_same_tokens(pre: str) -> None:
    want = trained(pre)
    found = read_tokenizer(parsed(metadata_of(want, pre)))
    ours = Tokenizer.from_str(found.data.decode())
    for text in [*TEXTS, "<|begin|>user <tool>x<|im_end|>"]:
        assert ours.encode(text).ids == want.encode(text).ids, text
        ids = want.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == want.decode(ids, skip_special_tokens=False)
    # The end of a turn ends a text too, though no key names it
    assert found.special == {"bos_token_id": 0, "eos_token_id": [0, 1]}


def test_the_first_token_is_put_where_the_file_asks_for_it() -> None:
    metadata = parsed(metadata_of(trained("gpt-2"), "gpt-2")) | {"tokenizer.ggml.add_bos_token": True}
    ours = Tokenizer.from_str(read_tokenizer(metadata).data.decode())
    assert ours.encode("Hello").ids[0] == 0 and ours.encode("Hello", add_special_tokens=False).ids[0] != 0


def test_special_ids_reach_the_vocabulary(tmp_path: Path) -> None:
    config = llama_config(vocab_size=400, num_hidden_layers=1)
    metadata = llama_metadata(config) | metadata_of(trained("qwen2"), "qwen2")
    shape = llama_shapes(config)["model.embed_tokens.weight"]
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_bytes(metadata, {"token_embd.weight": ("F32", shape, bytes(4 * shape[0] * shape[1]))})
    )
    with open_source(path) as source:
        found = read_vocabulary(source, 400)
    assert (found.bos, found.eos) == (0, (0, 1))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokenizer.ggml.pre": "tekkem"}, Unsupported, "known: default"),
        ({"tokenizer.ggml.model": "gtp2"}, Unsupported, "did you mean 'gpt2'"),
        ({"tokenizer.ggml.merges": ["a"]}, BadCheckpoint, "merges has 'a'"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, BadCheckpoint, "merges has 'zz yy'"),
        ({"tokenizer.ggml.merges": None}, BadCheckpoint, "merges"),
        ({"tokenizer.ggml.token_type": np.ones(3)}, BadCheckpoint, "3 numbers"),
    ],
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    metadata = parsed(metadata_of(trained("gpt-2"), "gpt-2")) | changes
    with pytest.raises(error, match=words):
        read_tokenizer(metadata)
