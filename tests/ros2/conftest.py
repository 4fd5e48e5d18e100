"""One suite, two ways to run it: on real rclpy where ROS is sourced, else over the layer on cyclonedds.

Node processes run the nodes' code unmodified, talk real DDS on loopback, and have a domain of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from node_process import MISSING, NodeProcess, next_domain

if MISSING:
    collect_ignore_glob = ["test_node_*.py"]

os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    number = next_domain()
    monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
    return number


@pytest.fixture
def robot(domain: int) -> Iterator[Any]:
    from robot import Robot

    with Robot(domain_id=domain) as robot:
        yield robot


StartNode = Callable[..., NodeProcess]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache of this run, where the planner's engine is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def planner_path(cache: Path) -> Path:
    """The shipped planner's engine, as a file of a robot's own."""
    from edge_nodes.default_engine import planner_engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return Path(planner_engine(lambda words: None))


@pytest.fixture
def start_node(domain: int, cache: Path) -> Iterator[StartNode]:
    """start_node(module, name, **parameters): a process; parameters with __ for the dot."""
    started: list[NodeProcess] = []

    import robot

    def start(module: str, name: str, words: Sequence[str] = (), **parameters: object) -> NodeProcess:
        process = NodeProcess(
            module, name, parameters, words=words, environment={"XDG_CACHE_HOME": str(cache)}
        )
        started.append(process)
        robot.watched.append(process)
        return process

    yield start
    for process in started:
        robot.watched.remove(process)
        process.stop()
        print(f"--- what the node said ---\n{process.said[-4000:]}")


@pytest.fixture(scope="module")
def serve(cache: Path) -> Iterator[Callable[..., Any]]:
    """serve(module, name, **parameters): (process, robot) of an active node for all tests of a file."""
    import robot

    started: list[tuple[NodeProcess, Any]] = []

    def start(module: str, name: str, **parameters: object) -> tuple[NodeProcess, Any]:
        number = next_domain()
        process = NodeProcess(
            module, name, parameters, environment={"XDG_CACHE_HOME": str(cache)}, domain=number
        )
        asker = robot.Robot(domain_id=number)
        started.append((process, asker))
        asker.activate(f"/{name}")
        return process, asker

    yield start
    for process, asker in started:
        asker.close()
        process.stop()
        print(f"--- what the node said ---\n{process.said[-4000:]}")
