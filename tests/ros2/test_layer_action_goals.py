"""The layer's bookkeeping of goals, against the ROS 2 actions design and the comments of CancelGoal.srv."""

from __future__ import annotations

import pytest
from layer_parts import load

book_module = load("rclpy/action/goal_book.py")
GoalBook, GoalEvent = book_module.GoalBook, book_module.GoalEvent

# Constants of action_msgs/GoalStatus.
STATUS = {
    "accepted": 1,
    "executing": 2,
    "canceling": 3,
    "succeeded": 4,
    "canceled": 5,
    "aborted": 6,
}
# The state diagram of the design article: event by event.
DIAGRAM = {
    ("accepted", "EXECUTE"): "executing",
    ("accepted", "CANCEL_GOAL"): "canceling",
    ("executing", "CANCEL_GOAL"): "canceling",
    ("executing", "SUCCEED"): "succeeded",
    ("executing", "ABORT"): "aborted",
    ("canceling", "SUCCEED"): "succeeded",
    ("canceling", "ABORT"): "aborted",
    ("canceling", "CANCELED"): "canceled",
}
SECOND = 1_000_000_000


def uuid(number: int) -> bytes:
    return bytes([number]) * 16


def book_of(*stamps: int, result_timeout: int = 100):
    """Goals 1, 2, ... accepted at these times."""
    book = GoalBook(result_timeout)
    for number, stamp in enumerate(stamps, 1):
        book.accept(uuid(number), stamp)
    return book


def end(book, number: int) -> None:
    for event in (GoalEvent.EXECUTE, GoalEvent.SUCCEED):
        assert book.advance(book.goals[uuid(number)], event) is None


@pytest.mark.parametrize("event", [event.name for event in GoalEvent])
@pytest.mark.parametrize("state", STATUS)
def test_every_state_with_every_event(state: str, event: str):
    goal = book_module.Goal(uuid(1), 0, STATUS[state])
    reason = goal.advance(GoalEvent[event])
    expected = DIAGRAM.get((state, event))
    assert goal.status == STATUS[expected or state]
    if expected:
        assert reason is None
    else:
        assert state.upper() in reason and event in reason


def test_active_and_cancelable_states():
    goals = {name: book_module.Goal(uuid(1), 0, status) for name, status in STATUS.items()}
    assert {name for name, goal in goals.items() if goal.active} == {"accepted", "executing", "canceling"}
    assert {name for name, goal in goals.items() if goal.cancelable} == {"accepted", "executing"}


@pytest.mark.parametrize(
    ("number", "stamp", "code", "meant"),
    [
        (0, 0, 0, [1, 2, 4]),  # neither id nor stamp: all that can be cancelled (3 has ended)
        (2, 0, 0, [2]),  # an id alone: that goal
        (9, 0, 2, []),  # an unknown id
        (3, 0, 3, []),  # a goal that has ended
        (0, 20, 0, [1, 2]),  # a stamp alone: all up to it, it included
        (0, 5, 0, []),  # before all
        (4, 10, 0, [1, 4]),  # both: up to the stamp, and that goal
        (9, 20, 0, [1, 2]),  # an unknown id with a stamp is no error
    ],
)
def test_which_goals_a_cancel_request_means(number: int, stamp: int, code: int, meant: list[int]):
    book = book_of(10, 20, 30, 40)
    end(book, 3)
    got, goals = book.to_cancel(uuid(number), stamp)
    assert (got, [goal.uuid for goal in goals]) == (code, [uuid(one) for one in meant])


def test_a_goal_being_cancelled_is_not_cancelled_again():
    book = book_of(10)
    book.advance(book.goals[uuid(1)], GoalEvent.CANCEL_GOAL)
    assert book.to_cancel(uuid(1), 0) == (3, [])
    assert book.to_cancel(uuid(0), 0) == (0, [])


def test_only_ended_goals_expire_counted_from_acceptance():
    book = book_of(0, 10, 20, result_timeout=15 * SECOND)
    assert book.next_expiry(5 * SECOND) is None
    end(book, 1)
    end(book, 3)
    assert book.next_expiry(5 * SECOND) == 10 * SECOND
    assert book.expire(15 * SECOND) == []
    assert book.expire(15 * SECOND + 1) == [uuid(1)]
    assert book.next_expiry(15 * SECOND + 1) == 19
    assert book.expire(100 * SECOND) == [uuid(3)]
    assert list(book.goals) == [uuid(2)]


def test_a_goal_that_ran_longer_than_the_timeout_expires_when_it_ends():
    book = book_of(0, result_timeout=SECOND)
    assert book.expire(9 * SECOND) == []
    end(book, 1)
    assert book.next_expiry(9 * SECOND) == 0
    assert book.expire(9 * SECOND) == [uuid(1)]
