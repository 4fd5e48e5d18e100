"""The engine side of the nodes knows no ROS: these tests need neither ROS nor DDS."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "ros2_nodes" / "edge_nodes"))


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """What other tests left is not looked through at each close of an engine, which collects garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
