"""Paths that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from real_engines import Engines

# Tests share two cores: one BLAS thread each keeps them steady.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of children import the project: the first leaves it compiled to the others
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


NODES = "tests/ros2/test_"  # nodes of two files at once would share the cores with each other's engines


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With processes beside each other (pytest -n), a file is one's whole, and so are all of ROS nodes."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return NODES if nodeid.startswith(NODES) else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The nodes begin, as they take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(NODES))


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


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines of really trained models, built when they are asked for."""
    from real_engines import Engines

    return Engines(tmp_path_factory.mktemp("engines"))
