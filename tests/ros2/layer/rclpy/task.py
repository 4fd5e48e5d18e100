"""Futures and tasks, awaitable as in rclpy.task."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Generator
from typing import Any


class Future:
    """executor: whose tasks are looked at again when this is done."""

    def __init__(self, *, executor: Any = None) -> None:
        self._done = False
        self._cancelled = False
        self._result: Any = None
        self._exception: BaseException | None = None
        self._callbacks: list[Callable[[Future], Any]] = []
        self._lock = threading.Lock()
        self._executor = executor

    def __await__(self) -> Generator[Any, None, Any]:
        while not self._done:
            yield self
        return self.result()

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        if not self._done:
            self._cancelled = True
            self._end()

    def result(self) -> Any:
        if self._exception is not None:
            raise self._exception
        return self._result

    def exception(self) -> BaseException | None:
        return self._exception

    def set_result(self, result: Any) -> None:
        self._result = result
        self._end()

    def set_exception(self, exception: BaseException) -> None:
        self._exception = exception
        self._end()

    def add_done_callback(self, callback: Callable[[Future], Any]) -> None:
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback(self)

    def _end(self) -> None:
        with self._lock:
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)
        if self._executor is not None:
            self._executor.wake()


class Task(Future):
    """A function or coroutine that an executor runs; called again while it waits for something."""

    def __init__(self, handler: Any, args: tuple[Any, ...] = (), executor: Any = None) -> None:
        super().__init__(executor=executor)
        self._handler = handler(*args) if inspect.iscoroutinefunction(handler) else handler
        self._args = args
        self._running = threading.Lock()
        self.again = 0.0  # monotonic: not to be looked at earlier

    def executing(self) -> bool:
        return self._running.locked()

    def __call__(self) -> None:
        if self._done or not self._running.acquire(blocking=False):
            return
        try:
            if inspect.iscoroutine(self._handler):
                try:
                    self._handler.send(None)
                    self.again = time.monotonic() + 0.001
                except StopIteration as end:
                    self.set_result(end.value)
            else:
                self.set_result(self._handler(*self._args))
        except Exception as error:
            self.set_exception(error)
        finally:
            self._running.release()


async def await_or_execute(callback: Any, *args: Any) -> Any:
    """The result of a function or a coroutine function."""
    if inspect.iscoroutinefunction(callback):
        return await callback(*args)
    return callback(*args)
