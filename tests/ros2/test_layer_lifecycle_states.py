"""The layer's life of a managed node, against the design document of managed nodes (design.ros2.org)."""

from __future__ import annotations

import pytest
from layer_parts import load

machine_module = load("rclpy/lifecycle/state_machine.py")

# Requests by the document: where each one is allowed, and the state it leads through.
REQUESTS = {
    ("unconfigured", "configure"): "configuring",
    ("unconfigured", "shutdown"): "shuttingdown",
    ("inactive", "cleanup"): "cleaningup",
    ("inactive", "activate"): "activating",
    ("inactive", "shutdown"): "shuttingdown",
    ("active", "deactivate"): "deactivating",
    ("active", "shutdown"): "shuttingdown",
}
# Where a transition state ends: after success, failure, error.
ENDS = {
    "configuring": ("inactive", "unconfigured", "errorprocessing"),
    "cleaningup": ("unconfigured", "inactive", "errorprocessing"),
    "activating": ("active", "inactive", "errorprocessing"),
    "deactivating": ("inactive", "active", "errorprocessing"),
    "shuttingdown": ("finalized", "finalized", "errorprocessing"),
    "errorprocessing": ("unconfigured", "finalized", "finalized"),
}
OUTCOMES = ("transition_success", "transition_failure", "transition_error")
TABLE = {**REQUESTS, **{(state, OUTCOMES[i]): ends[i] for state, ends in ENDS.items() for i in range(3)}}

# Constants of lifecycle_msgs/State and Transition.
STATE_IDS = {
    "unknown": 0,
    "unconfigured": 1,
    "inactive": 2,
    "active": 3,
    "finalized": 4,
    "configuring": 10,
    "cleaningup": 11,
    "shuttingdown": 12,
    "activating": 13,
    "deactivating": 14,
    "errorprocessing": 15,
}
REQUEST_IDS = {
    ("unconfigured", "configure"): 1,
    ("inactive", "cleanup"): 2,
    ("inactive", "activate"): 3,
    ("active", "deactivate"): 4,
    ("unconfigured", "shutdown"): 5,
    ("inactive", "shutdown"): 6,
    ("active", "shutdown"): 7,
}
FIRST_OUTCOME_ID = {
    "configuring": 10,
    "cleaningup": 20,
    "activating": 30,
    "deactivating": 40,
    "shuttingdown": 50,
    "errorprocessing": 60,
}
IDS = {**REQUEST_IDS}
IDS.update({(state, OUTCOMES[i]): first + i for state, first in FIRST_OUTCOME_ID.items() for i in range(3)})


def machine_in(label: str):
    machine = machine_module.StateMachine()
    machine.state = next(state for state in machine_module.STATES if state.label == label)
    return machine


def test_states_and_transitions_carry_the_ids_of_lifecycle_msgs():
    assert {state.label: state.id for state in machine_module.STATES} == STATE_IDS
    transitions = machine_module.TRANSITIONS
    assert {(one.start.label, one.label): one.id for one in transitions} == IDS
    assert len(transitions) == len(IDS) == 25


def test_a_node_begins_unconfigured():
    assert machine_module.StateMachine().state.label == "unconfigured"


@pytest.mark.parametrize("state", STATE_IDS)
@pytest.mark.parametrize("label", sorted({label for _, label in TABLE}))
def test_every_state_with_every_label(state: str, label: str):
    machine = machine_in(state)
    taken = machine.take(label)
    expected = TABLE.get((state, label))
    assert machine.state.label == (expected or state)
    assert (taken.start.label, taken.goal.label) == (state, expected) if expected else taken is None


@pytest.mark.parametrize("state", STATE_IDS)
def test_every_state_with_every_id(state: str):
    label_of = {IDS[state, label]: label for start, label in IDS if start == state}
    for transition_id in range(256):  # uint8 on the wire
        machine = machine_in(state)
        taken = machine.take(transition_id)
        if transition_id in label_of:
            assert machine.state.label == TABLE[state, label_of[transition_id]]
        else:
            assert taken is None and machine.state.label == state
    assert {(one.label, one.goal.label) for one in machine_in(state).open()} == {
        (label, goal) for (start, label), goal in TABLE.items() if start == state
    }
