"""The planner that ships with the project, as an engine for the machine at hand: built once, then kept.

The model lies in the share folder of the installed package, or in examples/planner of a checkout.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import edge_runtime
from edge_runtime import BuildError, Unsupported

BUILD_SECONDS = 900.0  # of a slow board
_FILES = ("model/model.safetensors", "model/tokenizer.json", "draft/model.safetensors", "plan.schema.json")


def planner_folder() -> Path:
    """Where the shipped planner is. Raises Unsupported when this installation has none."""
    candidates = []
    try:
        from ament_index_python.packages import get_package_share_directory

        candidates.append(Path(get_package_share_directory("edge_nodes")) / "planner")
    except (ImportError, LookupError):  # no ROS, or not installed by colcon
        pass
    candidates.append(Path(__file__).resolve().parents[3] / "examples" / "planner")
    for folder in candidates:
        if all((folder / name).is_file() for name in _FILES):
            return folder
    raise Unsupported(
        f"the shipped planner is not at {' or '.join(map(str, candidates))}; "
        "set the parameter engine.path to an engine that edge-build made"
    )


def planner_schema() -> str:
    """The JSON schema of the shipped planner's plans."""
    return (planner_folder() / "plan.schema.json").read_text(encoding="utf-8")


def cache_folder() -> Path:
    """Where this user's built engines and saved prefixes are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edge_runtime"


def planner_engine(log: Callable[[str], None]) -> Path:
    """The planner's engine, which is built first where this machine has none for this version of the model.

    Takes some ten seconds then. Raises Unsupported, BuildError.
    """
    folder = planner_folder()
    target = cache_folder() / f"planner-{_digest(folder)}.edge"
    if target.is_file():
        return target
    log(f"building the planner's engine for this machine, once: {target}")
    command = [sys.executable, "-m", "builders.cli", "--profile", "auto", "--weights", "int4_g64"]
    command += ["--kv", "int8", "--draft", str(folder / "draft"), "--no-eval"]
    command += ["-o", str(target), str(folder / "model")]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the planner's engine cannot be built: {error}; {_by_hand(folder)}") from error
    if done.returncode != 0 or not target.is_file():
        words = (done.stderr or done.stdout).strip().splitlines()
        why = words[-1] if words else "edge-build failed"
        raise BuildError(f"the planner's engine cannot be built: {why}; {_by_hand(folder)}")
    return target


def _by_hand(folder: Path) -> str:
    return (
        f"install edge-runtime[build] for {sys.executable}, or build it elsewhere with "
        f"'edge-build --profile auto {folder / 'model'}' and set the parameter engine.path"
    )


def _digest(folder: Path) -> str:
    """Of the model and of the runtime whose engines are wanted."""
    digest = hashlib.sha256(edge_runtime.__version__.encode())
    for name in _FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
