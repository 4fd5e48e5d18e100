"""One suite, two ways to run it: on real rclpy where ROS is sourced, else over the layer on cyclonedds.

Node processes run the nodes' code unmodified, talk real DDS on loopback, and have a domain of their own.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NODES = ROOT / "ros2_nodes" / "edge_nodes"
REAL = importlib.util.find_spec("rclpy") is not None
_NEEDS = ("cyclonedds", "rosbags")
if not REAL:
    sys.path.insert(0, str(HERE / "layer"))
    # Never a ROS environment beside the wheel, which brings another libddsc
    for name in ("AMENT_PREFIX_PATH", "RMW_IMPLEMENTATION", "ROS_DISTRO"):
        os.environ.pop(name, None)
sys.path[:0] = [str(NODES), str(HERE)]
MISSING = [] if REAL else [name for name in _NEEDS if importlib.util.find_spec(name) is None]
if MISSING:
    collect_ignore_glob = ["test_node_*.py"]


_domains = itertools.count(os.getpid())


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of this test: what a killed node left behind in another one, or another run, is not seen."""
    number = 1 + next(_domains) % 100
    monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
    monkeypatch.setenv("ROS_LOCALHOST_ONLY", "1")
    return number


class NodeProcess:
    """A node of edge_nodes in a process of its own; what it says is shown when the test fails."""

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (read at the test's end)
        path = [str(HERE / "layer")] if not REAL else []
        path += [str(NODES), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=self._said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(path)},
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode("utf-8", "replace")

    def stop(self, seconds: float = 10.0) -> int:
        """End it by SIGTERM, as launch does; its exit code."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGABRT)  # faulthandler says where each thread stands
                self.process.wait()
        return self.process.returncode


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
        words = [*words, "--ros-args", "-r", f"__node:={name}"]
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            words += ["-p", f"{key.replace('__', '.')}:={text}"]
        process = NodeProcess(module, words, {"XDG_CACHE_HOME": str(cache)})
        started.append(process)
        robot.watched.append(process)
        return process

    yield start
    for process in started:
        robot.watched.remove(process)
        process.stop()
        print(f"--- what the node said ---\n{process.said[-4000:]}")
