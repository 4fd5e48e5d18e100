"""Modules of the layer that know no ROS, loaded alone, so that a real rclpy is not in their way."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

LAYER = Path(__file__).resolve().parent / "layer"


def load(path: str) -> ModuleType:
    """The module at this path of the layer, under a name of its own."""
    name = "layer_part_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, LAYER / path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{LAYER / path} is no Python module")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
