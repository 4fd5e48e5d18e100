"""EdgeNode, what every node that serves an engine has: lifecycle, parameters, engine, goals, diagnostics.

No inference happens in a callback, and no callback waits for one: engines answer on threads of their own. A
callback that fails is logged and reported; it never ends the node.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node

from edge_nodes.diagnostics import Report
from edge_nodes.engine import Engine, EngineOptions, Facts
from edge_nodes.engine_host import EngineHost
from edge_nodes.jobs import Jobs, Refusal
from edge_nodes.parameter_table import MOST_PARALLEL, ROWS, Row
from edge_nodes.parameters import Parameters
from edge_nodes.supervisor import SupervisedEngine
from edge_runtime import BadConfig, EdgeError

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)
_PHASES = ("unconfigured", "inactive", "active", "finalized")  # the others are transitions under way
TAIL_SECONDS = 1.0  # that the rest of a transition may take when its work is done
END_SECONDS = 5.0  # until goals that are ended must have ended, when a node is deactivated


class EdgeNode(LifecycleNodeMixin, Node):
    """Subclasses set up what they serve in `serve` (once, at the start) and topics in `open_topics`.

    jobs: the book of goals while an engine is open. facts: of that engine.
    """

    def __init__(self, name: str, rows: Sequence[Row] = ROWS, **options: Any) -> None:
        Node.__init__(self, name, **options)
        # Not the node's default group, where a long configure would hold up parameters and state queries
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.phase = "unconfigured"
        self.parameters = Parameters(self, rows, lambda: self.phase != "unconfigured")
        self.engine: Engine | None = None
        self.jobs: Jobs | None = None
        self.facts: Facts | None = None
        self.calls = ReentrantCallbackGroup()
        self.why = ""  # the last transition failed, or the engine was lost
        self._changing = threading.Lock()
        self._failures = 0  # exceptions that no code expected
        self._failed_at: float | None = None
        self._report = Report(self)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer = self.create_timer(
            self.parameters["diagnostics.period"],
            self.guarded(self.publish_diagnostics),
            callback_group=MutuallyExclusiveCallbackGroup(),
        )
        self._guard_transitions()
        self.serve()

    # --- for subclasses ---

    def serve(self) -> None:
        """Make action servers and services; they are there in every state, and refuse where they must."""

    def default_engine(self) -> str:
        """The engine where the parameter engine.path is empty. Raises EdgeError."""
        raise BadConfig(
            "the parameter engine.path is empty; set it to an .edge file (make one with: edge-build MODEL)"
        )

    def open_topics(self) -> None:
        """Make the topics, with the QoS of the parameters."""

    def close_topics(self) -> None:
        """Destroy them. Called also where some were not made."""

    # --- transitions ---

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("configuring", "inactive", "unconfigured", self._configure)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("activating", "active", "inactive", self._activate, state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("deactivating", "inactive", "active", self._deactivate, state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("cleaning up", "unconfigured", "inactive", self._free)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("shutting down", "finalized", "finalized", self._free)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """All is freed; the node can be configured again."""
        return self._transition("error processing", "unconfigured", "finalized", self._free)

    def _transition(
        self, during: str, after: str, otherwise: str, work: Callable[..., None], *arguments: Any
    ) -> TransitionCallbackReturn:
        """An EdgeError is a failed transition with a reason; any other exception goes to error processing."""
        self.phase, self.why = during, ""
        try:
            work(*arguments)
        except EdgeError as error:
            self.phase, self.why = otherwise, f"{during} failed: {error}"
            self.get_logger().error(self.why)
            return FAILURE
        except Exception as error:
            self.unexpected(during, error)
            return ERROR
        self.phase = after
        return SUCCESS

    def _configure(self) -> None:
        settings = self.parameters.snapshot
        engine = self._make_engine(settings)
        self.engine = engine
        try:
            self.facts = engine.open(self._options(settings))
            self.jobs = Jobs(engine, limit=self.facts.parallel + settings["queue.depth"])
            self.open_topics()
        except BaseException:
            self._free()
            raise
        for notice in self.facts.notices:
            self.get_logger().warning(notice)
        self.get_logger().info(
            f"{self.facts.name}: {self.facts.memory_used >> 20} MiB, context {self.facts.context}, "
            f"{self.facts.parallel} at once, backend {self.facts.backend}"
        )

    def _activate(self, state: LifecycleState) -> None:
        engine, jobs = self.engine, self.jobs
        if engine is None or jobs is None:
            raise BadConfig("no engine is open; configure the node first")
        engine.prove()
        LifecycleNodeMixin.on_activate(self, state)
        jobs.accept()

    def _deactivate(self, state: LifecycleState) -> None:
        if self.jobs is not None:
            self.jobs.end_all("the node was deactivated", END_SECONDS)
        LifecycleNodeMixin.on_deactivate(self, state)

    def _free(self) -> None:
        engine, jobs = self.engine, self.jobs
        self.engine = self.jobs = self.facts = None
        try:
            if jobs is not None:
                jobs.end_all("the node was cleaned up", END_SECONDS)
                jobs.close()
        finally:
            try:
                self.close_topics()
            finally:
                if engine is not None:
                    engine.close()

    # --- goals ---

    def check_accepting(self) -> Jobs:
        """The book that takes goals now. Raises Refusal with the reason why none is taken."""
        jobs = self.jobs
        if jobs is None:
            raise Refusal("inactive", f"the node is {self.phase}; configure and activate it first")
        if self.phase != "active":
            raise Refusal("inactive", f"the node is {self.phase}; activate it first")
        jobs.admit()
        return jobs

    # --- callbacks that must not end the node ---

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """The callback, whose exceptions are logged and reported."""

        def call(*arguments: Any) -> Any:
            try:
                return callback(*arguments)
            except Exception as error:
                self.unexpected(getattr(callback, "__name__", "a callback"), error)
                return None

        return call

    def answering(self, callback: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """A service callback whose errors become success = False and a message."""

        def call(request: Any, response: Any) -> Any:
            try:
                callback(request, response)
                response.success = True
            except (EdgeError, Refusal) as error:
                response.success, response.message = False, str(error)
            except Exception as error:
                self.unexpected(getattr(callback, "__name__", "a service"), error)
                response.success, response.message = False, f"{type(error).__name__}: {error}"
            return response

        return call

    def unexpected(self, where: str, error: BaseException) -> None:
        """Log an exception that is a defect, and let the diagnostics say so for a while."""
        self._failures += 1
        self._failed_at = time.monotonic()
        self.why = f"{where}: {type(error).__name__}: {error}"
        words = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.get_logger().error(f"unexpected error in {where}\n{words}")

    def publish_diagnostics(self) -> None:
        self._diagnostics.publish(self._report.make())

    @property
    def failures(self) -> tuple[int, float | None]:
        """How many exceptions no code expected, and seconds since the last."""
        at = self._failed_at
        return self._failures, None if at is None else time.monotonic() - at

    def destroy_node(self) -> None:
        """Free the engine too: a process that ends leaves no worker behind."""
        try:
            self._free()
        finally:
            super().destroy_node()

    # --- inside ---

    def _guard_transitions(self) -> None:
        """rclpy lets an unregistered transition end the process (rclpy#1209), and runs two at once."""
        for service in self.services:
            if service.srv_type is ChangeState:
                service.callback = self._guarded_change(service.callback)

    def _guarded_change(self, change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, response: Any) -> Any:
            if not self._may_change():
                self.get_logger().warning(f"a transition is refused: the node is {self.phase}")
                response.success = False
                return response
            try:
                return change(request, response)
            except Exception as error:
                word = request.transition.label or request.transition.id
                self.get_logger().warning(f"transition {word} is refused while {self.phase}: {error}")
                response.success = False
                return response
            finally:
                self._changing.release()

        return call

    def _may_change(self) -> bool:
        """Take the lock of transitions; False while one is under way.

        rclpy tells a new state a moment before the transition that led there has returned: a client that saw
        it asks for the next one, which waits for that moment.
        """
        due = time.monotonic() + TAIL_SECONDS
        while not self._changing.acquire(timeout=0.01):
            if self.phase not in _PHASES or time.monotonic() > due:
                return False
        return True

    def _make_engine(self, settings: Mapping[str, Any]) -> Engine:
        if not settings["worker.enabled"]:
            return EngineHost()
        return SupervisedEngine(
            nice=settings["worker.nice"],
            heartbeat_timeout=settings["worker.heartbeat_timeout"],
            step_limit=settings["worker.step_limit"],
            max_restarts=settings["worker.max_restarts"],
            on_change=self._engine_changed,
        )

    def _engine_changed(self, state: str, why: str) -> None:
        """On a thread of the engine: the diagnostics must tell at once."""
        if state in ("lost", "failed"):
            self.get_logger().error(f"engine {state}: {why}")
        else:
            self.get_logger().info(f"engine {state}")
        self.guarded(self.publish_diagnostics)()

    def _options(self, settings: Mapping[str, Any]) -> EngineOptions:
        adapters = []
        for entry in filter(None, settings["lora.adapters"]):
            name, equals, folder = entry.partition("=")
            if not equals or not name or not folder:
                raise BadConfig(f"lora.adapters has {entry!r:.60}, expected NAME=PEFT-FOLDER")
            adapters.append((name, folder))
        return EngineOptions(
            path=settings["engine.path"] or self.default_engine(),
            backend=settings["engine.backend"],
            threads=settings["engine.threads"] or max(1, len(os.sched_getaffinity(0)) - 1),
            context=settings["context.n_ctx"],
            parallel=settings["context.n_parallel"],
            cache_k=settings["cache.type_k"],
            cache_v=settings["cache.type_v"],
            speculate=settings["speculative.type"].replace("none", "off"),
            draft_length=settings["speculative.draft.n_max"],
            memory_limit=settings["engine.memory_limit_mib"] << 20,
            # The book of goals is the bound. The engine's line also holds, until its next step, those that
            # come in the place of others which have just ended: as many as run at once
            max_waiting=settings["queue.depth"] + (settings["context.n_parallel"] or MOST_PARALLEL),
            adapters=tuple(adapters),
            prefix=settings["prefix.path"],
        )
