"""Paths that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests share two cores: one BLAS thread each keeps them steady.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def story_text() -> str:
    """Simple story text of the kind that the tiny shared models were trained on."""
    return (ROOT / "tests" / "text" / "story.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session", params=["stories260K", "llama2xs"])
def real_model(request: pytest.FixtureRequest) -> Path:
    """A really trained Hugging Face folder; skips where the shared data is absent."""
    folder = SHARED / "models" / str(request.param)
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"real model {request.param} is not at {folder}")
    return folder
