"""Tests that need a GPU; elsewhere they are skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if not mine:
        return
    from edge_runtime.backends.cuda.backend import BACKEND

    answer = BACKEND.available()
    if not answer.ok:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {answer.why}"))
