"""Fixtures of the cuda backend's tests without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_cuda import FakeCuda, load_fake

if TYPE_CHECKING:
    from fake_context import Gpu


@pytest.fixture(params=["up", "down", "shuffled"])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Threads and blocks of emulated kernels in each order."""
    monkeypatch.setenv("EDGE_EMU_ORDER", request.param)
    return str(request.param)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuda]:
    """A fake GPU in this process: sm_87, CUDA 12.6, 1 GiB, or as EDGE_FAKE_* say; modules in tmp_path.

    The host cannot touch device memory but by the API, and at the end nothing may have been written beside
    allocations or into freed ones.
    """
    fake = load_fake()
    fake.reset()
    monkeypatch.setenv("EDGE_FAKE_DEVICES", "1")
    monkeypatch.setenv("EDGE_FAKE_MODULES", str(tmp_path))
    monkeypatch.setenv("EDGE_FAKE_PROTECT", "1")
    yield fake
    found = fake.fault or fake.check()
    fake.reset()
    assert not found, found


@pytest.fixture
def faulty_gpu(fake_gpu: FakeCuda) -> Iterator[FakeCuda]:
    """As fake_gpu, of tests that cause a fault."""
    yield fake_gpu
    fake_gpu.reset()


@pytest.fixture
def gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Gpu:
    """A context on the fake GPU, current in this thread."""
    from fake_context import Gpu

    return Gpu(tmp_path)
