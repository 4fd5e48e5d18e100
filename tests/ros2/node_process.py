"""Nodes of edge_nodes in processes of their own, on real rclpy where ROS is sourced, else over the layer.

Importing this makes `rclpy` and the message packages importable either way.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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


_domains = itertools.count(os.getpid())


def next_domain() -> int:
    """A ROS_DOMAIN_ID that this run has not used lately: what a killed node left in another is not seen."""
    return 1 + next(_domains) % 100


def children_of(pid: int) -> list[int]:
    """Of all threads of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class NodeProcess:
    """A node of edge_nodes in a process of its own; what it says is kept.

    parameters: with __ for the dot of a name. domain: a ROS_DOMAIN_ID, None for the environment's.
    """

    def __init__(
        self,
        module: str,
        name: str,
        parameters: Mapping[str, object],
        *,
        words: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        domain: int | None = None,
    ) -> None:
        if domain is not None:
            environment = {**environment, "ROS_DOMAIN_ID": str(domain)}
        arguments = [*words, "--ros-args", "-r", f"__node:={name}"]
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += ["-p", f"{key.replace('__', '.')}:={text}"]
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
