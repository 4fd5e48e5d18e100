"""What the fake GPU counted between two looks."""

from __future__ import annotations

from fake_cuda import FakeCuda


class Counts:
    """Of these names (see FakeCuda.count), since the last look at each."""

    def __init__(self, gpu: FakeCuda, *names: str) -> None:
        self._gpu = gpu
        self._before = {name: gpu.count(name) for name in names}

    def __getitem__(self, name: str) -> int:
        now = self._gpu.count(name)
        found = now - self._before[name]
        self._before[name] = now
        return found
