"""Loggers that write to stderr in the manner of ROS."""

from __future__ import annotations

import sys
import time
from typing import Any


class Logger:
    def __init__(self, name: str) -> None:
        self.name = name
        self._said: dict[tuple[str, int], float] = {}

    def get_child(self, name: str) -> Logger:
        return Logger(f"{self.name}.{name}")

    def _log(self, level: str, message: str, throttle_duration_sec: float | None = None, **_: Any) -> bool:
        if throttle_duration_sec is not None:
            caller = sys._getframe(2)
            place, now = (caller.f_code.co_filename, caller.f_lineno), time.monotonic()
            if now - self._said.get(place, -1e9) < throttle_duration_sec:
                return False
            self._said[place] = now
        print(f"[{level}] [{time.time():.9f}] [{self.name}]: {message}", file=sys.stderr, flush=True)
        return True

    def debug(self, message: str, **options: Any) -> bool:
        return False

    def info(self, message: str, **options: Any) -> bool:
        return self._log("INFO", message, **options)

    def warning(self, message: str, **options: Any) -> bool:
        return self._log("WARN", message, **options)

    warn = warning

    def error(self, message: str, **options: Any) -> bool:
        return self._log("ERROR", message, **options)

    def fatal(self, message: str, **options: Any) -> bool:
        return self._log("FATAL", message, **options)


def get_logger(name: str) -> Logger:
    return Logger(name)
