"""Tokenizers as transformers has them, of a model folder or of an engine: for texts and chats to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.engine.file import Engine
from edge_runtime.errors import BadCheckpoint, Unsupported


def read_tokenizer(folder: Path) -> Any:
    """Raises Unsupported without torch and transformers, BadCheckpoint where the folder has none.

    No code of the folder is run.
    """
    _need_transformers()
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a folder; give a Hugging Face model folder (with config.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{folder} has no usable tokenizer: {error}") from None


def engine_tokenizer(engine: Engine) -> Any:
    """The tokenizer that an engine carries, as one of transformers. Raises as `read_tokenizer`."""
    _need_transformers()
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    blobs, vocabulary = engine.manifest.blobs, engine.manifest.vocabulary
    try:
        inner = Tokenizer.from_buffer(bytes(engine.blob("tokenizer.json")))
    except Exception as error:  # the library raises bare Exception
        raise BadCheckpoint(f"{engine.path}: its tokenizer.json cannot be used: {error}") from None
    ids = {"bos_token": vocabulary.bos, "pad_token": vocabulary.pad}
    if vocabulary.eos:
        ids["eos_token"] = vocabulary.eos[0]
    names = {kind: inner.id_to_token(number) for kind, number in ids.items() if number is not None}
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if "chat_template" in blobs:
        found.chat_template = bytes(engine.blob("chat_template")).decode()
    return found


def _need_transformers() -> None:
    try:
        import torch  # noqa: F401  (what trains needs both)
        from transformers.utils import logging
    except ImportError:
        raise Unsupported(
            "training needs torch and transformers: pip install 'edge-runtime[train]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
