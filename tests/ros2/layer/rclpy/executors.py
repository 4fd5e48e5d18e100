"""Executors: what is ready runs; what is raised comes out of spin, as in rclpy."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from rclpy.task import Task

_AGAIN = 0.002  # s between looks at a task that waits for a future


class ExternalShutdownException(Exception):
    """The context was shut down while an executor was spinning."""


class ShutdownException(Exception):
    """The executor was shut down while it was waiting."""


class TimeoutException(Exception):
    """Nothing was ready in time."""


class _Wake:
    """An event that a signal handler may set, whatever the main thread is in the middle of.

    threading.Event takes a lock that the interrupted thread may hold; SimpleQueue.put is reentrant.
    """

    def __init__(self) -> None:
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._set = False

    def set(self) -> None:
        if not self._set:
            self._set = True
            self._tokens.put(None)

    def clear(self) -> None:
        with suppress(Empty):
            while True:
                self._tokens.get_nowait()
        self._set = False  # last: a set() until here is of something that the caller looks at next

    def wait(self, timeout: float | None) -> None:
        with suppress(Empty):
            self._tokens.get(timeout=None if timeout is None else max(0.0, timeout))


class Executor:
    def __init__(self, *, context: Any = None) -> None:
        from rclpy.utilities import get_default_context

        self._context = get_default_context() if context is None else context
        self._nodes: list[Any] = []
        self._tasks: list[Task] = []
        self._woken = _Wake()
        self._over = False
        self._turn = 0  # entities take turns, so that a busy one starves no other
        self._context.on_shutdown(self.wake)

    @property
    def context(self) -> Any:
        return self._context

    def add_node(self, node: Any) -> bool:
        if node in self._nodes:
            return False
        self._nodes.append(node)
        node.executor = self
        self.wake()
        return True

    def remove_node(self, node: Any) -> None:
        if node in self._nodes:
            self._nodes.remove(node)
            self.wake()

    def get_nodes(self) -> list[Any]:
        return list(self._nodes)

    def create_task(self, callback: Any, *args: Any) -> Task:
        task = Task(callback, args, self)
        self._tasks.append(task)
        self.wake()
        return task

    def wake(self) -> None:
        self._woken.set()

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        self._over = True
        self.wake()
        return True

    def spin(self) -> None:
        while self._context.ok() and not self._over:
            self.spin_once()

    def spin_once(self, timeout_sec: float | None = None) -> None:
        handler = self._next(timeout_sec)
        if handler is not None:
            self._run(handler)

    def spin_until_future_complete(self, future: Any, timeout_sec: float | None = None) -> None:
        due = None if timeout_sec is None else time.monotonic() + timeout_sec
        future.add_done_callback(lambda _: self.wake())
        while self._context.ok() and not self._over and not future.done():
            left = None if due is None else due - time.monotonic()
            if left is not None and left <= 0:
                return
            self.spin_once(0.1 if left is None else min(0.1, left))

    def _run(self, handler: Callable[[], Any]) -> None:
        raise NotImplementedError

    def _next(self, timeout: float | None) -> Callable[[], Any] | None:
        """Work that is ready now, or within the time; None when there was none."""
        due = None if timeout is None else time.monotonic() + timeout
        while True:
            self._woken.clear()
            if not self._context.ok():
                raise ExternalShutdownException
            if self._over:
                return None
            found = self._ready()
            if found is not None:
                return found
            now = time.monotonic()
            if due is not None and now >= due:
                return None
            waits = [] if due is None else [due - now]
            timers = [t.time_until_next_call() for node in self._nodes for t in node.timers if self._free(t)]
            if timers:
                waits.append(min(timers) / 1e9)
            if any(not task.done() for task in self._tasks):
                waits.append(_AGAIN)
            self._woken.wait(min(waits) if waits else None)

    def _free(self, entity: Any) -> bool:
        """Whether its group would let it run; one that must wait is looked at when that one has ended."""
        group = entity.callback_group
        if group.enter(entity):
            group.leave(entity)
            return True
        return False

    def _ready(self) -> Callable[[], Any] | None:
        for task in list(self._tasks):
            if task.done():
                self._tasks.remove(task)
                error = task.exception()
                if error is not None:
                    raise error
            elif not task.executing() and time.monotonic() >= task.again:
                return task
        entities = [entity for node in self._nodes for entity in node.entities()]
        count = len(entities)
        for k in range(count):
            entity = entities[(self._turn + k) % count]
            if not entity.ready or not entity.callback_group.enter(entity):
                continue
            call = entity.take()
            if call is None:
                entity.callback_group.leave(entity)
                continue
            self._turn = (self._turn + k + 1) % count
            return self._handler(entity, call)
        return None

    def _handler(self, entity: Any, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            try:
                found = call()
                if hasattr(found, "send"):  # a coroutine goes on as a task
                    self.create_task(_awaiting, found)
            finally:
                entity.callback_group.leave(entity)
                self.wake()

        return run


async def _awaiting(coroutine: Any) -> Any:
    return await coroutine


class SingleThreadedExecutor(Executor):
    def _run(self, handler: Callable[[], Any]) -> None:
        handler()


class MultiThreadedExecutor(Executor):
    def __init__(self, num_threads: int | None = None, *, context: Any = None) -> None:
        super().__init__(context=context)
        self._pool = ThreadPoolExecutor(num_threads or 2, thread_name_prefix="executor")
        self._futures: list[ThreadFuture[Any]] = []

    def _run(self, handler: Callable[[], Any]) -> None:
        if isinstance(handler, Task) and handler in self._tasks:
            self._tasks.remove(handler)
            self._futures.append(self._pool.submit(self._run_task, handler))
        else:
            self._futures.append(self._pool.submit(handler))
        for future in list(self._futures):
            if future.done():
                self._futures.remove(future)
                future.result()  # raises what the callback raised

    def _run_task(self, task: Task) -> None:
        task()
        if not task.done():
            self._tasks.append(task)
        self.wake()
        error = task.exception()
        if error is not None:
            raise error

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        super().shutdown(timeout_sec)
        self._pool.shutdown(wait=False)
        return True
