"""What an action server knows of its goals, by the rules of rcl_action. Knows no ROS and no clock.

Statuses are those of action_msgs/GoalStatus, return codes those of action_msgs/CancelGoal, times are
nanoseconds of the node's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

UNKNOWN, ACCEPTED, EXECUTING, CANCELING, SUCCEEDED, CANCELED, ABORTED = range(7)
ACTIVE = (ACCEPTED, EXECUTING, CANCELING)
_STATUS_NAMES = ("UNKNOWN", "ACCEPTED", "EXECUTING", "CANCELING", "SUCCEEDED", "CANCELED", "ABORTED")

# Return codes of a cancel request; a server itself never uses the plain refusal (1).
NONE, UNKNOWN_GOAL, TERMINATED = 0, 2, 3

NOBODY = bytes(16)


class GoalEvent(Enum):
    EXECUTE = 0
    CANCEL_GOAL = 1
    SUCCEED = 2
    ABORT = 3
    CANCELED = 4


# A goal cannot end from ACCEPTED: it is executed or cancelled first.
_NEXT = {
    (ACCEPTED, GoalEvent.EXECUTE): EXECUTING,
    (ACCEPTED, GoalEvent.CANCEL_GOAL): CANCELING,
    (EXECUTING, GoalEvent.CANCEL_GOAL): CANCELING,
    (EXECUTING, GoalEvent.SUCCEED): SUCCEEDED,
    (EXECUTING, GoalEvent.ABORT): ABORTED,
    (CANCELING, GoalEvent.SUCCEED): SUCCEEDED,
    (CANCELING, GoalEvent.ABORT): ABORTED,
    (CANCELING, GoalEvent.CANCELED): CANCELED,
}


@dataclass
class Goal:
    uuid: bytes
    stamp: int
    status: int = ACCEPTED

    def advance(self, event: GoalEvent) -> str | None:
        """Moves on, or says why that is illegal and stays."""
        following = _NEXT.get((self.status, event))
        if following is None:
            state = _STATUS_NAMES[self.status]
            return f"goal_handle attempted invalid transition from state {state} with event {event.name}"
        self.status = following
        return None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    @property
    def cancelable(self) -> bool:
        return (self.status, GoalEvent.CANCEL_GOAL) in _NEXT


class GoalBook:
    """Goals in order of acceptance. A goal is kept for result_timeout ns, counted from its acceptance."""

    def __init__(self, result_timeout: int) -> None:
        self.goals: dict[bytes, Goal] = {}
        self._result_timeout = result_timeout
        self._oldest: int | None = None  # stamp among the ended ones; kept, as it is asked for all the time

    def accept(self, uuid: bytes, stamp: int) -> Goal:
        goal = self.goals[uuid] = Goal(uuid, stamp)
        return goal

    def advance(self, goal: Goal, event: GoalEvent) -> str | None:
        """As Goal.advance; one that has ended is kept for a while and then forgotten."""
        trouble = goal.advance(event)
        if not goal.active and (self._oldest is None or goal.stamp < self._oldest):
            self._oldest = goal.stamp
        return trouble

    def to_cancel(self, uuid: bytes, stamp: int) -> tuple[int, list[Goal]]:
        """(return code, goals) of a cancel request.

        An id alone means that goal. Otherwise all goals accepted up to the stamp, and the one with the id;
        neither id nor stamp means all.
        """
        if uuid != NOBODY and not stamp:
            goal = self.goals.get(uuid)
            if goal is None:
                return UNKNOWN_GOAL, []
            return (NONE, [goal]) if goal.cancelable else (TERMINATED, [])
        everyone = uuid == NOBODY and not stamp
        meant = [goal for goal in self.goals.values() if everyone or goal.stamp <= stamp or goal.uuid == uuid]
        return NONE, [goal for goal in meant if goal.cancelable]

    def next_expiry(self, now: int) -> int | None:
        """Nanoseconds until an ended goal is to be forgotten; None when none has ended."""
        return None if self._oldest is None else max(0, self._oldest + self._result_timeout - now)

    def expire(self, now: int) -> list[bytes]:
        """Forgets the ended goals that are too old, and names them."""
        if self._oldest is None or now - self._oldest <= self._result_timeout:
            return []
        ended = [goal for goal in self.goals.values() if not goal.active]
        old = [goal.uuid for goal in ended if now - goal.stamp > self._result_timeout]
        for uuid in old:
            del self.goals[uuid]
        kept = [goal.stamp for goal in ended if goal.uuid in self.goals]
        self._oldest = min(kept, default=None)
        return old
