"""kill -9 at every write, fsync, rename, unlink and close of a build: the old or the new engine, complete.

The build runs in a forked child whose system calls count; at call N the child kills itself, before or in the
middle of the call. The parent then opens whatever lies at the target, digests included.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hf_folders import llama_config, write_model

from builders.pipeline import Options, build
from builders.planner import Request
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.writer import OsCalls
from edge_runtime.errors import BadEngineFile, BuildError


class Deadly(OsCalls):
    """Counts calls that change the disk and dies at call number `at`; a write may be cut in half first."""

    def __init__(self, at: int | None = None, *, torn: bool = False) -> None:
        self.at, self.torn, self.count = at, torn, 0
        self.kinds: set[str] = set()

    def _due(self, kind: str) -> bool:
        self.kinds.add(kind)
        self.count += 1
        return self.count == self.at

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if self._due("pwrite"):
            if self.torn:
                super().pwrite(fd, memoryview(data)[: len(data) // 2], offset)
            self._die()
        return super().pwrite(fd, data, offset)

    def open(self, path: Path, flags: int) -> int:
        if self._due("open"):
            self._die()
        return super().open(path, flags)

    def fsync(self, fd: int) -> None:
        if self._due("fsync"):
            self._die()
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        if self._due("rename"):
            if self.torn:
                super().rename(source, target)
            self._die()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        if self._due("unlink"):
            self._die()
        super().unlink(path)

    def close(self, fd: int) -> None:
        if self._due("close"):
            self._die()
        super().close(fd)


class Failing(Deadly):
    """Raises ENOSPC at call number `at` in place of dying."""

    def _die(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    return write_model(tmp_path_factory.mktemp("atomic") / "model", config)


def options(model: Path, target: Path, weights: str) -> Options:
    return Options(model, target, "orin", Request(weights=weights, context=16), text_tokens=32, measure=False)


def in_child(model: Path, target: Path, calls: OsCalls) -> int:
    """Wait status of a forked child that builds an int4 engine."""
    pid = os.fork()
    if pid == 0:
        try:
            build(options(model, target, "int4_g32"), calls=calls)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
def test_kill_at_every_call_leaves_the_old_or_the_new_engine(model: Path, tmp_path: Path, torn: bool) -> None:
    target = tmp_path / "m.edge"
    counter = Deadly()
    build(options(model, tmp_path / "count.edge", "int4_g32"), calls=counter)
    total = counter.count
    assert total > 30  # opens, a write for each plane, its padding, the header, fsyncs, rename, closes
    assert {"open", "pwrite", "fsync", "rename", "close"} <= counter.kinds
    build(options(model, target, "f16"))
    old, new = target.read_bytes(), (tmp_path / "count.edge").read_bytes()
    seen = set()
    for n in range(1, total + 1):
        if target.read_bytes() != old:
            target.write_bytes(old)
        status = in_child(model, target, Deadly(n, torn=torn))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"call {n} of {total}"
        found = target.read_bytes()
        assert found in (old, new), f"call {n} of {total} left a third file"
        read_engine(target, verify=True).close()
        seen.add(found == new)
    assert seen == {False, True}  # some died before the rename, some after
    build(options(model, target, "int4_g32"))
    assert target.read_bytes() == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["count.edge", "m.edge"]  # no temporary file is left


def test_a_first_build_that_dies_leaves_no_engine(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.edge"
    for n in (1, 2, 3, 20):
        in_child(model, target, Deadly(n))
        with pytest.raises(BadEngineFile, match="no such file"):
            read_engine(target)


def test_a_full_disk_at_every_call_is_a_typed_error(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.edge"
    counter = Deadly()
    build(options(model, target, "int4_g32"), calls=counter)
    new = target.read_bytes()
    build(options(model, target, "f16"))
    old = target.read_bytes()
    for n in range(1, counter.count + 1):
        if target.read_bytes() != old:
            target.write_bytes(old)
        try:
            build(options(model, target, "int4_g32"), calls=Failing(n))
        except BuildError:
            assert target.read_bytes() in (old, new), f"call {n}"
        else:
            assert target.read_bytes() == new, f"call {n}"
    build(options(model, target, "int4_g32"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.edge"]
