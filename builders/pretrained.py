"""The tokenizer of a model folder as transformers reads it: for texts and chat templates while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.errors import BadCheckpoint, Unsupported


def read_tokenizer(folder: Path) -> Any:
    """Raises Unsupported without torch and transformers, BadCheckpoint where the folder has none.

    No code of the folder is run.
    """
    try:
        import torch  # noqa: F401  (what trains needs both)
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise Unsupported(
            "training needs torch and transformers: pip install 'edge-runtime[train]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a folder; give a Hugging Face model folder (with config.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{folder} has no usable tokenizer: {error}") from None
