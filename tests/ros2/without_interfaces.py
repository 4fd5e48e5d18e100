"""A node as it is where edge_interfaces was not built: python -m without_interfaces language|planner ..."""

from __future__ import annotations

import importlib
import sys

sys.modules["edge_interfaces"] = None  # type: ignore[assignment]  # importing it raises ImportError

if __name__ == "__main__":
    raise SystemExit(importlib.import_module(f"edge_nodes.{sys.argv.pop(1)}_node").main())
