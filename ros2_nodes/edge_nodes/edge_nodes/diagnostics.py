"""What a node says on /diagnostics, once a period and whenever the engine's state changes."""

from __future__ import annotations

import platform
import threading
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from edge_nodes.sensors import read_health

HOT_C = 90.0  # Jetson modules begin to throttle at 97 to 99
RECENT = 60.0  # seconds that an unexpected error is reported as one
_OK, _WARN, _ERROR = 0, 1, 2
_LEVELS = (DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR)


class Report:
    """Makes the status of one EdgeNode."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._making = threading.Lock()  # the timer's thread and the engine's
        self._missed = 0  # deadlines, as of the report before
        self._refused = 0

    def make(self) -> DiagnosticArray:
        """The message; reads a few files of /sys and asks nobody that could wait."""
        with self._making:
            return self._made()

    def _made(self) -> DiagnosticArray:
        self._level = _OK
        self._words: list[str] = []
        values = {"state": self._node.phase}
        self._transitions()
        values |= self._engine()
        values |= self._jobs()
        values |= self._device()
        status = DiagnosticStatus(
            level=_LEVELS[self._level],
            name=f"{self._node.get_fully_qualified_name()}: engine",
            message="; ".join(self._words) or self._node.phase,
            hardware_id=platform.node(),
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self._node.get_clock().now().to_msg()
        return message

    def _say(self, level: int, words: str) -> None:
        self._level = max(self._level, level)
        self._words.append(words)

    def _transitions(self) -> None:
        count, ago = self._node.failures
        if ago is not None and ago < RECENT:
            self._say(_ERROR, f"{count} unexpected errors, the last: {self._node.why}")
        elif self._node.why:
            self._say(_ERROR, self._node.why)

    def _engine(self) -> dict[str, Any]:
        engine, facts = self._node.engine, self._node.facts
        if engine is None or facts is None:
            return {}
        if engine.state in ("lost", "failed"):
            self._say(_ERROR, f"engine {engine.state}: {engine.why}")
        now = engine.figures()
        values: dict[str, Any] = {
            "engine": facts.name,
            "engine_state": engine.state,
            "backend": facts.backend,
            "restarts": engine.restarts,
            "memory_planned_mib": f"{facts.memory_planned / 2**20:.1f}",
            "memory_used_mib": f"{now.get('memory_used', facts.memory_used) / 2**20:.1f}",
        }
        for key in (
            "running",
            "waiting",
            "preempted",
            "pages",
            "pages_used",
            "pages_kept",
            "tokens",
            "steps",
            "speculate",
        ):
            if key in now:
                values[key] = now[key]
        for key in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"):
            if key in now:
                values[key] = f"{now[key]:.2f}"
        if now.get("itl_p50_ms"):
            values["tokens_per_s"] = f"{1e3 / now['itl_p50_ms']:.1f}"
        if "acceptance" in now:
            values["acceptance"] = f"{now['acceptance']:.3f}"
        return values

    def _jobs(self) -> dict[str, Any]:
        jobs = self._node.jobs
        if jobs is None:
            return {}
        counts = jobs.counts()
        if counts.missed > self._missed:
            self._say(_WARN, f"{counts.missed - self._missed} deadlines missed since the last report")
        refused = counts.refused.get("queue_full", 0)
        if refused > self._refused:
            self._say(
                _WARN, f"{refused - self._refused} goals refused since the last report: the queue is full"
            )
        elif counts.outstanding >= 0.8 * counts.limit:
            self._say(_WARN, f"{counts.outstanding} of {counts.limit} places for goals are taken")
        self._missed, self._refused = counts.missed, refused
        return {
            "goals": counts.outstanding,
            "goals_limit": counts.limit,
            "goals_refused": sum(counts.refused.values()),
            "goals_ended": sum(counts.ended.values()),
            "goals_failed": counts.ended.get("error", 0),
            "deadlines_missed": counts.missed,
        }

    def _device(self) -> dict[str, Any]:
        health = read_health()
        values: dict[str, Any] = {"swap_used_mib": health.swap_used_mib}
        if health.swap_used_mib:
            self._say(_WARN, f"{health.swap_used_mib} MiB of swap are in use: deadlines may be missed")
        if health.temperature_c is not None:
            values |= {"temperature_c": f"{health.temperature_c:.1f}", "temperature_zone": health.zone}
            if health.temperature_c >= HOT_C:
                self._say(
                    _WARN, f"{health.zone} is at {health.temperature_c:.0f} degrees: the device may slow down"
                )
        if health.power_mode:
            values["power_mode"] = health.power_mode
        return values
