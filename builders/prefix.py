"""edge-build --prefix: the KV pages of a system prompt, computed once, in a file beside the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime import open_engine
from edge_runtime.engine.folder import read_capped
from edge_runtime.errors import BadCheckpoint, BadConfig
from edge_runtime.serving.prefix_file import SUFFIX

MAX_TEXT = 16 << 20

Prefix = str | list[Mapping[str, Any]]


def read_prefix(path: Path) -> Prefix:
    """Text, or the chat messages of a .json file: [{"role": ..., "content": ...}]. Raises BadConfig."""
    try:
        text = read_capped(path, MAX_TEXT).decode("utf-8")
    except BadCheckpoint as error:
        raise BadConfig(f"prefix: {error}") from None
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not UTF-8 text (byte {error.start}); give a plain text file") from None
    if path.suffix != ".json":
        if not text:
            raise BadConfig(f"{path} is empty; a prefix needs some text")
        return text
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path.name} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise BadConfig(f'{path.name}: expected chat messages, [{{"role": "system", "content": "..."}}]')
    return list(messages)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    return all(isinstance(text, str) for text in value.values())


def write_prefix(engine: Path, prefix: Prefix, backend: str) -> tuple[Path, int]:
    """Run the prefix on the engine's own backend and write ENGINE.prefix, which the runtime takes by itself.

    Returns the file and how many tokens its whole pages hold. Raises as `open_engine` and
    `Session.save_prefix` do.
    """
    target = engine.with_suffix(SUFFIX)
    with open_engine(engine, backend=backend, speculate="off") as session:
        return target, session.save_prefix(prefix, target)
