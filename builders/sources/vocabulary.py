"""Special ids of a checkpoint. Several files name them and disagree; every one that ends a text counts."""

from __future__ import annotations

import json
from typing import Any

from builders.sources.source import Source
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadCheckpoint


def read_vocabulary(source: Source, size: int) -> Vocabulary:
    """bos, pad and the union of all eos ids, generation_config first. Raises BadCheckpoint on a bad id."""
    known = token_ids(source)
    top = max(known.values(), default=-1)
    if top >= size:
        source.notices.append(
            f"tokenizer.json has token id {top}, the model ends at {size - 1}; such tokens cannot be used"
        )
    files: tuple[tuple[str, dict[str, Any]], ...] = (
        ("generation_config.json", source.generation_config),
        ("config.json", source.config),
    )
    found: dict[str, list[int]] = {"bos": [], "eos": [], "pad": []}
    for kind, ids in found.items():
        for name, values in files:
            value = values.get(f"{kind}_token_id")
            if kind == "pad" and value == -1:  # how some configs say "none"
                continue
            ids += _ids(value, f"{name}: {kind}_token_id", size)
        token = source.tokenizer_config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in known and known[text] < size:
            ids.append(known[text])
    first = {kind: ids[0] if ids else None for kind, ids in found.items()}
    return Vocabulary(bos=first["bos"], eos=tuple(dict.fromkeys(found["eos"])), pad=first["pad"], size=size)


def _ids(value: Any, what: str, size: int) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for v in values:
        if type(v) is not int or not 0 <= v < size:
            raise BadCheckpoint(f"{what} is {v!r}, expected a token id from 0 to {size - 1}")
    return values


def token_ids(source: Source) -> dict[str, int]:
    """Token text -> id of tokenizer.json, the vocabulary in any of the library's model layouts."""
    data = json.loads(source.tokenizer_json)
    ids: dict[str, int] = {}
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        ids.update((k, v) for k, v in vocab.items() if type(v) is int)
    elif isinstance(vocab, list):  # Unigram: [[piece, score], …]
        ids.update((item[0], i) for i, item in enumerate(vocab) if isinstance(item, list) and item)
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int:
            ids[token["content"]] = token["id"]
    return ids
