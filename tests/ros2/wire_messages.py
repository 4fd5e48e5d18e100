"""Messages of every shape that the nodes use, and the CDR that ROS 2 makes of them (wire.json).

    . /opt/ros/humble/setup.bash; . install/setup.bash; python tests/ros2/wire_messages.py

writes wire.json anew, from a real ROS 2 only.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from node_process import REAL

# isort: split
from action_msgs.msg import GoalInfo, GoalStatus, GoalStatusArray
from action_msgs.srv import CancelGoal
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from edge_interfaces.action import GenerateResponse, MakePlan
from edge_interfaces.msg import (
    Argument,
    PartialResponse,
    Plan,
    Response,
    SamplingConfig,
    SkillCall,
    Timing,
    TokenProb,
    TokenProbArray,
    Usage,
)
from edge_interfaces.srv import Tokenize
from lifecycle_msgs.msg import State, Transition, TransitionDescription, TransitionEvent
from lifecycle_msgs.srv import ChangeState, GetAvailableStates, GetAvailableTransitions
from rcl_interfaces.msg import (
    FloatingPointRange,
    Parameter,
    ParameterDescriptor,
    ParameterType,
    ParameterValue,
)
from rcl_interfaces.srv import DescribeParameters, SetParameters
from std_msgs.msg import Float64MultiArray, Header, MultiArrayDimension, MultiArrayLayout, String
from unique_identifier_msgs.msg import UUID

WIRE = Path(__file__).resolve().parent / "wire.json"


def messages() -> dict[str, Any]:
    goal_id = UUID(uuid=list(range(240, 256)))
    stamp = Time(sec=-7, nanosec=999_999_999)
    statuses = [
        GoalStatus(goal_info=GoalInfo(goal_id=goal_id, stamp=stamp), status=status) for status in (1, 4, 6)
    ]
    calls = [
        SkillCall(skill="go_to", arguments=[Argument(name="place", kind=0, value="küche")]),
        SkillCall(skill="stop", arguments=[]),
        SkillCall(
            skill="wait",
            arguments=[
                Argument(name="s", kind=2, value="1.5"),
                Argument(name="quiet", kind=3, value="true"),
            ],
        ),
    ]
    usage = Usage(prompt_tokens=3, completion_tokens=5, total_tokens=8, cached_tokens=1)
    timing = Timing(ttft_ms=1.25, total_ms=1e9, drafted=-1, deadline_missed=True)
    probs = [
        TokenProbArray(
            data=[TokenProb(token=9, probability=0.125, token_text="€"), TokenProb(token=1)], chosen_token=9
        ),
        TokenProbArray(),
    ]
    send, result = GenerateResponse.Impl.SendGoalService, GenerateResponse.Impl.GetResultService
    goal = GenerateResponse.Goal(
        prompt="go",
        stop=["", "\n", "end"],
        reset=False,
        sampling_config=SamplingConfig(seed=2**62, ignore_eos=True, penalty_present=-0.5),
        max_tokens=900,
        deadline=Duration(sec=1, nanosec=5),
        priority=-3,
        json_schema='{"a": 1}',
    )
    answer = GenerateResponse.Result(
        response=Response(text="a b", tokens=array("i", [1, -2, 3]), probs=probs),
        finish_reason="stop",
        usage=usage,
        timing=timing,
    )
    descriptor = ParameterDescriptor(
        name="sampling.top_p",
        type=ParameterType.PARAMETER_DOUBLE,
        read_only=True,
        floating_point_range=[FloatingPointRange(from_value=0.0, to_value=1.0, step=0.0)],
    )
    values = [
        Parameter(name="a", value=ParameterValue(type=1, bool_value=True)),
        Parameter(name="bc", value=ParameterValue(type=4, string_value="xyz")),
        Parameter(name="d", value=ParameterValue(type=9, string_array_value=["", "long one"])),
        Parameter(name="e", value=ParameterValue(type=8, double_array_value=array("d", [0.5, -1.0]))),
        Parameter(name="f", value=ParameterValue(type=6, bool_array_value=[True, False, True])),
        Parameter(name="g", value=ParameterValue(type=5, byte_array_value=[b"\x00", b"\xff"])),
    ]
    report = DiagnosticStatus(
        level=b"\x02",
        name="planner: engine",
        message="lost",
        values=[KeyValue(key="goals", value="1"), KeyValue(key="", value="")],
    )
    layout = MultiArrayLayout(dim=[MultiArrayDimension(label="x", size=2, stride=2)], data_offset=1)
    inactive = State(id=2, label="inactive")
    configure = Transition(id=1, label="configure")
    return {
        "String": String(data="héllo"),
        "String, empty": String(),
        "Header": Header(stamp=stamp, frame_id="base"),
        "Float64MultiArray": Float64MultiArray(layout=layout, data=array("d", [1.5, -2.0])),
        "GoalStatusArray": GoalStatusArray(status_list=statuses),
        "CancelGoal request": CancelGoal.Request(goal_info=GoalInfo(goal_id=goal_id, stamp=stamp)),
        "CancelGoal response": CancelGoal.Response(return_code=3, goals_canceling=[GoalInfo()]),
        "send_goal request": send.Request(goal_id=goal_id, goal=goal),
        "send_goal request, defaults": send.Request(goal_id=goal_id, goal=GenerateResponse.Goal()),
        "send_goal response": send.Response(accepted=True, stamp=stamp),
        "get_result request": result.Request(goal_id=goal_id),
        "get_result response": result.Response(status=4, result=answer),
        "feedback": GenerateResponse.Impl.FeedbackMessage(
            goal_id=goal_id,
            feedback=GenerateResponse.Feedback(
                partial_response=PartialResponse(text="ab", token=7, tokens=array("i", [6, 7]))
            ),
        ),
        "MakePlan feedback": MakePlan.Impl.FeedbackMessage(
            goal_id=goal_id, feedback=MakePlan.Feedback(first=1, calls=calls[1:])
        ),
        "Plan": Plan(
            header=Header(stamp=stamp), command="go", calls=calls, complete=True, json='[{"skill":"stop"}]'
        ),
        "Tokenize response": Tokenize.Response(tokens=array("i", [5]), success=True, message=""),
        "GetAvailableStates request": GetAvailableStates.Request(),
        "DiagnosticArray": DiagnosticArray(header=Header(stamp=stamp), status=[report, report]),
        "ChangeState request": ChangeState.Request(transition=configure),
        "GetAvailableTransitions response": GetAvailableTransitions.Response(
            available_transitions=[
                TransitionDescription(transition=configure, start_state=State(id=1), goal_state=inactive)
            ]
        ),
        "TransitionEvent": TransitionEvent(
            timestamp=2**63, transition=configure, start_state=State(id=1), goal_state=inactive
        ),
        "SetParameters request": SetParameters.Request(parameters=values),
        "DescribeParameters response": DescribeParameters.Response(
            descriptors=[descriptor, ParameterDescriptor()]
        ),
    }


def encoded(message: Any) -> bytes:
    """CDR with its header; rclpy leaves out the padding after the last field, the layer does not."""
    if REAL:
        from rclpy.serialization import serialize_message

        return bytes(serialize_message(message))
    return bytes(message._codec.encode(message))


def decoded(data: bytes, kind: type) -> Any:
    if REAL:
        from rclpy.serialization import deserialize_message

        return deserialize_message(data, kind)
    return kind._codec.decode(data)  # type: ignore[attr-defined]


if __name__ == "__main__":
    if not REAL:
        raise SystemExit("no ROS 2 is sourced; wire.json is what a real one makes")
    lines = {name: encoded(message).hex() for name, message in messages().items()}
    WIRE.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
