"""Whatever call fails, is cut short or is the last one before a kill: the old or the new engine, complete."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_engine import write_toy

from edge_runtime.engine.file import read_engine
from edge_runtime.engine.writer import EngineWriter, OsCalls
from edge_runtime.errors import BuildError

FAULTS = (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EMFILE)
KEPT = ("open", "lock", "pwrite", "pread", "fsync", "rename", "unlink", "close")


class Counted(OsCalls):
    """Every call of the writer passes through `before(number, name, arguments)`, which may raise or kill."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.made: list[str] = []
        for name in KEPT:
            setattr(self, name, self._wrap(name, getattr(super(), name), before))

    def _wrap(self, name: str, real: Callable[..., Any], before: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.made.append(name)
            before(len(self.made) - 1, name, arguments)
            return real(*arguments)

        return call


def test_every_call_of_the_writer_is_counted() -> None:
    assert set(KEPT) == {name for name in vars(OsCalls) if not name.startswith("_")}


def leave_stale(folder: Path) -> None:
    """The folder as a killed build leaves it: exactly one temporary file, of a process that is gone."""
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            os.unlink(folder / name)
    for target in ("m", "counted"):
        (folder / f".{target}.edge.4194304-0.tmp").write_bytes(b"half a header")


def count_calls(folder: Path, reserve: int) -> list[str]:
    calls = Counted(lambda *_: None)
    leave_stale(folder)
    write_toy(folder / "counted.edge", reserve=reserve, calls=calls)
    os.unlink(folder / "counted.edge")
    return calls.made


def state(path: Path) -> str:
    """Which whole engine lies at the path: old or new (told apart by seed), proved with all digests."""
    q = read_engine(path).part("language").weights["layers.0.q"].planes["q"].tobytes()
    return {SEEDS[1]: "old", SEEDS[2]: "new"}[q]


SEEDS: dict[int, bytes] = {}


@pytest.fixture(autouse=True, scope="module")
def _seeds(tmp_path_factory: pytest.TempPathFactory) -> None:
    for seed in (1, 2):
        path = tmp_path_factory.mktemp("seeds") / "m.edge"
        write_toy(path, seed=seed)
        SEEDS[seed] = read_engine(path).part("language").weights["layers.0.q"].planes["q"].tobytes()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a file system: hundreds of fsyncs on a busy disk prove nothing more."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("reserve", [0, 64 * 1024], ids=["header_moves_data", "header_fits"])
def test_kill_at_every_call(tmp_path: Path, reserve: int) -> None:
    """kill -9 just before each call, and in the middle of each write; 'after' is before the next one."""
    path = tmp_path / "m.edge"
    made = count_calls(tmp_path, reserve)
    assert {"pwrite", "fsync", "rename", "close"} <= set(made) and ("pread" in made) == (reserve == 0)
    write_toy(path, seed=1)
    old = path.read_bytes()
    seen = []
    for point in range(len(made)):
        for half in (False, True) if made[point] == "pwrite" else (False,):
            path.write_bytes(old)
            leave_stale(tmp_path)
            child = os.fork()
            if child == 0:
                _die_at(path, reserve, point, half)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            seen.append((point, state(path)))
    renamed = made.index("rename")
    assert {s for p, s in seen if p <= renamed} == {"old"}
    assert {s for p, s in seen if p > renamed} == {"new"}
    leave_stale(tmp_path)
    (tmp_path / ".counted.edge.4194304-0.tmp").unlink()
    write_toy(path, seed=2)
    assert os.listdir(tmp_path) == [path.name]  # stale files go at the next build
    print(f"{len(seen)} kills over {len(made)} calls")


def _die_at(path: Path, reserve: int, point: int, half: bool) -> None:
    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == point:
            if half:
                fd, data, offset = arguments
                os.pwrite(fd, bytes(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        write_toy(path, seed=2, reserve=reserve, calls=Counted(before))
    finally:
        os._exit(1)  # reached only when the kill did not come


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("code", FAULTS, ids=lambda c: errno.errorcode[c])
def test_every_call_may_fail(tmp_path: Path, code: int, persistent: bool) -> None:
    path = tmp_path / "m.edge"
    made = count_calls(tmp_path, 0)
    write_toy(path, seed=1)
    old = path.read_bytes()
    files = open_files()
    refused = 0
    for point in range(len(made)):

        def before(number: int, name: str, _: object, point: int = point) -> None:
            if number == point or (persistent and number > point and name != "close"):
                raise OSError(code, os.strerror(code))

        path.write_bytes(old)
        leave_stale(tmp_path)
        try:
            write_toy(path, seed=2, reserve=0, calls=Counted(before))
            assert state(path) == "new"
        except BuildError as error:
            refused += 1
            untouched = "nothing was changed at that path" in str(error)
            assert untouched or "the new engine is in place" in str(error)
            assert state(path) == ("old" if untouched else "new")
            assert os.strerror(code) in str(error)
    assert refused >= made.index("rename") - 4  # faults on the stale file are no reason to stop
    write_toy(path, seed=1)
    assert set(os.listdir(tmp_path)) == {path.name, ".counted.edge.4194304-0.tmp"}
    # a close that "failed" here was never made: only those may be left
    assert open_files() - files <= made.count("close")


def test_short_writes_and_reads_are_continued(tmp_path: Path) -> None:
    class Short(OsCalls):
        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            return super().pwrite(fd, bytes(data)[: max(1, len(data) // 3)], offset)

        def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
            return super().pread(fd, max(1, nbytes // 3), offset)

    write_toy(tmp_path / "m.edge", seed=2, reserve=0, calls=Short())
    assert state(tmp_path / "m.edge") == "new"


def test_a_disk_that_takes_or_gives_nothing_is_an_error(tmp_path: Path) -> None:
    class Full(OsCalls):
        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            return 0

    class Lost(OsCalls):
        def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
            return b""

    for calls, message in ((Full(), "the disk took no bytes"), (Lost(), "the temporary file became shorter")):
        with pytest.raises(BuildError, match=message):
            write_toy(tmp_path / "m.edge", reserve=0, calls=calls)
        assert os.listdir(tmp_path) == []


def test_the_order_survives_a_power_failure(tmp_path: Path) -> None:
    """Data and header are synced before the rename, the folder after it, and nothing is written between."""
    made = count_calls(tmp_path, 64 * 1024)
    assert made[:4] == ["open", "lock", "unlink", "close"]  # the stale file
    renamed = made.index("rename")
    assert made[renamed - 1] == "fsync" and "pwrite" not in made[renamed:]
    assert made[renamed:] == ["rename", "close", "open", "fsync", "close"]


def test_a_live_build_is_not_taken_for_stale(tmp_path: Path) -> None:
    path = tmp_path / "m.edge"
    with EngineWriter(path) as writer:
        writer.add("a", b"1")
        write_toy(path, seed=2)  # another build of the same target starts and ends meanwhile
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == [path.name] and state(path) == "new"


def test_stale_files_are_removed_whatever_the_name_holds(tmp_path: Path) -> None:
    path = tmp_path / "we[i]rd*.edge"
    (tmp_path / ".we[i]rd*.edge.4194304-0.tmp").write_bytes(b"left by a killed build")
    other = tmp_path / ".weird.edge.4194304-0.tmp"
    other.write_bytes(b"of another target")
    write_toy(path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, other.name])


def test_a_writer_that_lost_its_file_says_so(tmp_path: Path) -> None:
    class Robbed(OsCalls):
        def lock(self, fd: int, flags: int) -> None:
            super().lock(fd, flags)
            for name in os.listdir(tmp_path):
                os.unlink(tmp_path / name)

    with pytest.raises(BuildError, match="another build was starting there; try again"):
        write_toy(tmp_path / "m.edge", calls=Robbed())
