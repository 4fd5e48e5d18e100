"""The life of a managed node as rcl_lifecycle lays it out: states, transitions, and where each one leads.

Knows no ROS: ids and labels are those of lifecycle_msgs, and the order is the one in which the services list
them.
"""

from __future__ import annotations

from typing import NamedTuple


class State(NamedTuple):
    id: int
    label: str


class Transition(NamedTuple):
    id: int
    label: str
    start: State
    goal: State


UNKNOWN = State(0, "unknown")
UNCONFIGURED = State(1, "unconfigured")
INACTIVE = State(2, "inactive")
ACTIVE = State(3, "active")
FINALIZED = State(4, "finalized")
CONFIGURING = State(10, "configuring")
CLEANING_UP = State(11, "cleaningup")
SHUTTING_DOWN = State(12, "shuttingdown")
ACTIVATING = State(13, "activating")
DEACTIVATING = State(14, "deactivating")
ERROR_PROCESSING = State(15, "errorprocessing")

STATES = (
    UNKNOWN,
    UNCONFIGURED,
    INACTIVE,
    ACTIVE,
    FINALIZED,
    CONFIGURING,
    CLEANING_UP,
    SHUTTING_DOWN,
    ACTIVATING,
    DEACTIVATING,
    ERROR_PROCESSING,
)

# What a callback's return value is called as a transition.
SUCCESS, FAILURE, ERROR = "transition_success", "transition_failure", "transition_error"


def _outcomes(first_id: int, during: State, success: State, failure: State, error: State) -> list[Transition]:
    """The three ways out of a transition state; their ids follow one another."""
    goals = ((SUCCESS, success), (FAILURE, failure), (ERROR, error))
    return [Transition(first_id + step, label, during, goal) for step, (label, goal) in enumerate(goals)]


TRANSITIONS = (
    Transition(1, "configure", UNCONFIGURED, CONFIGURING),
    *_outcomes(10, CONFIGURING, INACTIVE, UNCONFIGURED, ERROR_PROCESSING),
    Transition(2, "cleanup", INACTIVE, CLEANING_UP),
    *_outcomes(20, CLEANING_UP, UNCONFIGURED, INACTIVE, ERROR_PROCESSING),
    Transition(3, "activate", INACTIVE, ACTIVATING),
    *_outcomes(30, ACTIVATING, ACTIVE, INACTIVE, ERROR_PROCESSING),
    Transition(4, "deactivate", ACTIVE, DEACTIVATING),
    *_outcomes(40, DEACTIVATING, INACTIVE, ACTIVE, ERROR_PROCESSING),
    Transition(5, "shutdown", UNCONFIGURED, SHUTTING_DOWN),
    Transition(6, "shutdown", INACTIVE, SHUTTING_DOWN),
    Transition(7, "shutdown", ACTIVE, SHUTTING_DOWN),
    *_outcomes(50, SHUTTING_DOWN, FINALIZED, FINALIZED, ERROR_PROCESSING),
    *_outcomes(60, ERROR_PROCESSING, UNCONFIGURED, FINALIZED, FINALIZED),
)


class StateMachine:
    """Where one node stands. `take` moves it and gives the transition, or None when there is none such."""

    def __init__(self) -> None:
        self.state = UNCONFIGURED

    def open(self) -> list[Transition]:
        """The transitions that lead out of the present state."""
        return [transition for transition in TRANSITIONS if transition.start == self.state]

    def find(self, key: int | str) -> Transition | None:
        """The open transition with this id or label."""
        return next((transition for transition in self.open() if key in transition[:2]), None)

    def take(self, key: int | str) -> Transition | None:
        found = self.find(key)
        if found is not None:
            self.state = found.goal
        return found
