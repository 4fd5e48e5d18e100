"""The device arena: where regions lie, what it holds, and what it does when a large block is refused."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.backends.cuda.memory import ALIGN, DeviceArena, Region, place
from edge_runtime.errors import BackendUnavailable, DoesNotFit


class Memory:
    """Device memory of `total` bytes that gives no block above `largest`."""

    def __init__(self, total: int, largest: int | None = None) -> None:
        self.total, self.largest = total, total if largest is None else largest
        self.held: dict[int, int] = {}
        self.asked: list[int] = []
        self.next = 1 << 20
        self.lost = False

    def free_bytes(self) -> tuple[int, str]:
        return self.total - sum(self.held.values()), "the test"

    def allocate(self, nbytes: int) -> int:
        self.asked.append(nbytes)
        have, source = self.free_bytes()
        if nbytes > min(self.largest, have):
            raise DoesNotFit("refused", need=nbytes, have=have, source=source)
        address, self.next = self.next, self.next + -(-nbytes // ALIGN) * ALIGN + ALIGN
        self.held[address] = nbytes
        return address

    def free(self, address: int) -> None:
        if self.lost:
            raise BackendUnavailable("lost")
        del self.held[address]


def arena(memory: Memory, regions: Any) -> DeviceArena:
    return DeviceArena(cast(Driver, memory), regions)


def test_regions_lie_in_their_order_at_their_alignment_in_one_block() -> None:
    memory = Memory(1 << 20)
    made = arena(memory, [("a", 100, 256), ("b", 3, 64), ("c", 5, 4), ("d", 0, 64), ("e", 1, 1)])
    start = made.addresses["a"]
    assert {n: at - start for n, at in made.addresses.items()} == {
        "a": 0,
        "b": 128,
        "c": 132,
        "d": 192,
        "e": 192,
    }
    assert made.nbytes == 193 == sum(memory.held.values()) and made.blocks == 1


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 4, 16, 64, 256])), max_size=12),
    largest=st.integers(0, 30000),
)
def test_whatever_is_refused_no_region_straddles_blocks_or_overlaps(
    sizes: list[tuple[int, int]], largest: int
) -> None:
    regions = [Region(f"r{i}", n, align) for i, (n, align) in enumerate(sizes)]
    memory = Memory(1 << 20, largest)
    if any(r.nbytes > largest for r in regions):
        with pytest.raises(DoesNotFit):
            arena(memory, regions)
        assert not memory.held  # what was had before the refusal is given back
        return
    made = arena(memory, regions)
    taken: list[tuple[int, int]] = []
    for name, nbytes, align in regions:
        at = made.addresses[name]
        assert at % align == 0
        if nbytes:
            assert sum(b <= at and at + nbytes <= b + n for b, n in memory.held.items()) == 1, "straddles"
            taken.append((at, at + nbytes))
    taken.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken)), "overlap"
    assert made.nbytes == sum(memory.held.values()) and made.blocks == len(memory.held)
    assert made.nbytes <= sum(r.nbytes + r.align - 1 for r in regions), "padding beyond alignment"
    if place(regions)[1] <= largest:
        assert made.nbytes == place(regions)[1]
    made.release()
    made.release()
    assert not memory.held and made.nbytes == 0


def test_a_refused_block_is_halved_and_no_more_than_needed() -> None:
    memory = Memory(1 << 20, largest=2048)
    made = arena(memory, [(f"r{i}", 1024, 256) for i in range(4)])
    assert memory.asked == [4096, 2048, 2048] and made.blocks == 2 and made.nbytes == 4096


def test_halves_are_of_bytes_not_of_regions() -> None:
    memory = Memory(1 << 20, largest=4096)
    made = arena(memory, [("big", 4096, 256), *((f"r{i}", 256, 256) for i in range(8))])
    assert memory.asked == [6144, 4096, 2048] and made.blocks == 2


def test_more_than_there_is_is_refused_before_anything_is_allocated() -> None:
    memory = Memory(1000)
    with pytest.raises(
        DoesNotFit, match=r"needs 1001 bytes of GPU memory, 1000 are free \(the test\)"
    ) as caught:
        arena(memory, [("a", 1001, 256)])
    assert (caught.value.need, caught.value.have, caught.value.source) == (1001, 1000, "the test")
    assert not memory.asked


def test_a_region_that_nothing_can_hold_is_named_by_its_size_and_all_is_given_back() -> None:
    memory = Memory(1 << 20, largest=512)
    with pytest.raises(DoesNotFit) as caught:
        arena(memory, [("a", 512, 256), ("b", 513, 256)])
    assert caught.value.need == 513 and not memory.held


@pytest.mark.parametrize(
    "regions",
    [
        [("a", -1, 256)],
        [("a", 1, 0)],
        [("a", 1, 3)],
        [("a", 1, 512)],
        [("a", 1, 64), ("a", 2, 64)],
    ],
)
def test_regions_that_are_none(regions: list[tuple[str, int, int]]) -> None:
    memory = Memory(1 << 20)
    with pytest.raises(ValueError, match="region"):
        arena(memory, regions)
    assert not memory.asked


def test_release_of_a_lost_context_raises_nothing() -> None:
    memory = Memory(1 << 20)
    made = arena(memory, [("a", 4, 4)])
    memory.lost = True
    made.release()
    assert made.nbytes == 0 and not made.addresses


def test_an_empty_arena_asks_for_nothing() -> None:
    memory = Memory(0)
    assert arena(memory, []).nbytes == 0 and arena(memory, [("a", 0, 64)]).addresses == {"a": 0}
    assert not memory.asked
