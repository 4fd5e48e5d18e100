"""The commands: edge-run, edge-inspect, edge-bench. `output.py` holds the manner they share."""
