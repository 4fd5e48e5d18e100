"""Whether edge_interfaces is built; without it nodes serve std_msgs topics alone."""

from __future__ import annotations

import importlib.util

HAVE_INTERFACES = importlib.util.find_spec("edge_interfaces") is not None
