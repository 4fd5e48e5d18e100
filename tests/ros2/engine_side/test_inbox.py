"""Inbox: bounded, the oldest dropped, the stale never served, one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_nodes.inbox import Inbox


class Served:
    """Takes items and holds each until the test lets it go."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.done: Callable[[], None] = lambda: None
        self._came = threading.Semaphore(0)

    def __call__(self, item: int, done: Callable[[], None]) -> None:
        self.items.append(item)
        self.done = done
        self._came.release()

    def wait(self) -> None:
        assert self._came.acquire(timeout=5.0)


def test_the_oldest_is_dropped_for_a_new_one() -> None:
    served = Served()
    inbox: Inbox[int] = Inbox(2, served, lambda: None)
    inbox.put(0)
    served.wait()
    for item in (1, 2, 3, 4):  # while 0 is under way
        inbox.put(item)
    for _ in range(2):
        served.done()
        served.wait()
    assert served.items == [0, 3, 4] and inbox.dropped == 2
    inbox.close()


def test_what_is_too_old_is_never_served() -> None:
    now = [100.0]
    served = Served()
    inbox: Inbox[int] = Inbox(4, served, lambda: 1.0, clock=lambda: now[0])
    inbox.put(0)
    served.wait()
    inbox.put(1)
    now[0] += 0.6
    inbox.put(2)
    now[0] += 0.6  # 1 is 1.2 s old, 2 is 0.6 s old
    served.done()
    served.wait()
    assert served.items == [0, 2] and inbox.expired == 1
    inbox.close()


def test_one_is_under_way_at_a_time() -> None:
    served = Served()
    inbox: Inbox[int] = Inbox(4, served, lambda: None)
    inbox.put(0)
    served.wait()
    inbox.put(1)
    time.sleep(0.05)
    assert served.items == [0]
    served.done()
    served.wait()
    assert served.items == [0, 1]
    inbox.close()


def test_a_closed_one_forgets_what_waits_and_leaves_no_thread() -> None:
    threads = threading.active_count()
    served = Served()
    inbox: Inbox[int] = Inbox(4, served, lambda: None)
    inbox.put(0)
    served.wait()
    inbox.put(1)
    inbox.close()
    served.done()
    assert served.items == [0] and threading.active_count() == threads
