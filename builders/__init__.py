"""From a checkpoint to one engine file: sources, architectures, planner, quantizers, evaluation, packing."""
