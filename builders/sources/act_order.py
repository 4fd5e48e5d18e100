"""Act-order: the input of each column of a quantized matrix, once its groups are runs of columns."""

from __future__ import annotations

import numpy as np

from builders.sources.module_keys import Module
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint


def read_order(module: Module, suffix: str, groups: int) -> tuple[Array | None, int]:
    """(inputs in the order of their groups, or None where they are so; inputs of a group), from the group of
    each input. Raises BadCheckpoint where groups differ in size."""
    key, g_idx = module.key(suffix), module.raw(suffix)
    cols = len(g_idx)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise BadCheckpoint(
            f"tensor {key!r} names groups {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}"
        )
    counts = np.bincount(g_idx, minlength=groups)
    group = int(counts[0])
    if (counts[:-1] != group).any() or not 0 < counts[-1] <= group:
        raise BadCheckpoint(
            f"tensor {key!r} has groups of {counts.min()} to {counts.max()} inputs, "
            "expected equal groups and at most a shorter last one"
        )
    order = np.argsort(g_idx, kind="stable")
    return (None if (order == np.arange(cols)).all() else order), group
