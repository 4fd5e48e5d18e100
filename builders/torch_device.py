"""Where torch computes, and how: exactly repeatable, whatever the number of cores.

A product of matrices may add up in another order when more threads share it. So every operation here has one
thread, and cores are used by running independent pieces of work side by side; the pieces and the order in
which their results are taken are fixed. On CUDA there is one worker and no TF32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from edge_runtime.errors import BadConfig, Unsupported

MAX_WORKERS = 8  # each holds a batch of its own
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def resolve_device(name: str) -> str:
    """`cpu` or `cuda` (`cuda:1`), of which `auto` means cuda where it works.

    Raises Unsupported without torch or without the device, BadConfig for a word that is none.
    """
    try:
        import torch
    except ImportError:
        raise Unsupported("calibration needs torch: pip install 'edge-runtime[calibrate]'") from None
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise BadConfig(f"--device {name!r}: expected auto, cpu, cuda or cuda:N")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise Unsupported(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices; use cpu")
    return "cuda" if kind == "auto" else name


class Workers:
    """Runs pieces of work side by side; results come in the order of the pieces."""

    def __init__(self, pool: ThreadPoolExecutor | None, count: int) -> None:
        self._pool = pool
        self.count = count

    def map(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
        """At most `count` results exist at once beside the one that is yielded."""
        if self._pool is None:
            yield from map(work, items)
            return
        rest = iter(items)
        while batch := list(islice(rest, self.count)):
            yield from list(self._pool.map(work, batch))


@contextmanager
def repeatable(device: str, cores: int = 0) -> Iterator[Workers]:
    """Workers for `device`; cores 0 means as many as torch would use, at most MAX_WORKERS."""
    import torch

    if device != "cpu":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield Workers(None, 1)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return
    threads = torch.get_num_threads()
    count = min(cores or threads, MAX_WORKERS, os.cpu_count() or 1)
    torch.set_num_threads(1)
    try:
        if count == 1:
            yield Workers(None, 1)
        else:
            with ThreadPoolExecutor(count, initializer=_single) as pool:
                yield Workers(pool, count)
    finally:
        torch.set_num_threads(threads)


def _single() -> None:
    """The number of threads is each thread's own in OpenMP."""
    import torch

    torch.set_num_threads(1)
