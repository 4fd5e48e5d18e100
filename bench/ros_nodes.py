"""What a robot feels of the nodes: timers beside decoding, floods, cancels, lost workers, the way of a plan.

    python bench/ros_nodes.py [--rounds 3] [--seconds 5]

On real rclpy where ROS is sourced, else over the layer of tests/ros2. Node, engine's worker and the robot
that asks share this machine's cores. Idle and decoding phases of the timer take turns. Writes
bench/results/<machine>-<date>-ros-nodes.json and .svg.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "ros2"))
os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")
os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)

# isort: split
from node_process import REAL, NodeProcess, children_of  # noqa: E402

# isort: split
from edge_interfaces.action import GenerateResponse, MakePlan  # noqa: E402
from edge_interfaces.msg import SamplingConfig  # noqa: E402
from edge_nodes.default_engine import planner_engine  # noqa: E402
from edge_nodes.supervisor import HEALTHY_SECONDS  # noqa: E402
from robot import DEEP, Robot  # noqa: E402
from std_msgs.msg import Float64MultiArray  # noqa: E402
from unique_identifier_msgs.msg import UUID  # noqa: E402

from edge_runtime import open_engine  # noqa: E402
from edge_runtime.serving.metrics import percentile  # noqa: E402

NODE, ACTION = "/language", "/generate_response"
HERTZ = 100
RATE = 200  # goals a second of the flood


def spread(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(percentile(values, q), 3) for q in (50, 95, 99)} | {"n": len(values)}


def long_goal(tokens: int = 900) -> Any:
    return GenerateResponse.Goal(
        prompt="go to", max_tokens=tokens, sampling_config=SamplingConfig(ignore_eos=True)
    )


class Busy:
    """Four goals under way all the time, until it is left."""

    def __init__(self, robot: Robot) -> None:
        self._robot = robot
        self._over = False
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        while not self._over:
            self._robot.send_goal(GenerateResponse, ACTION, long_goal()).result()

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()


def timer_beside_decoding(robot: Robot, rounds: int, seconds: float) -> dict[str, Any]:
    heard = robot.subscribe(f"{NODE}/lateness", Float64MultiArray)

    def phase() -> list[float]:
        time.sleep(0.7)  # ticks of the phase before are told in one message with the first of this one
        heard.messages.clear()
        time.sleep(seconds)
        return [tick for message in list(heard.messages) for tick in message.data]

    idle, decoding = [], []
    for _ in range(rounds):
        idle.append(phase())
        with Busy(robot):
            decoding.append(phase())
    more = [percentile(b, 99) - percentile(a, 99) for a, b in zip(idle, decoding, strict=True)]
    return {
        "hertz": HERTZ,
        "idle_ms": [spread(x) for x in idle],
        "decoding_ms": [spread(x) for x in decoding],
        "p99_more_ms": [round(x, 3) for x in more],
        "best_p99_more_ms": round(min(more), 3),
        "ticks": {"idle": [x for p in idle for x in p], "decoding": [x for p in decoding for x in p]},
    }


def flood(robot: Robot, seconds: float = 10.0) -> dict[str, Any]:
    """Answers to goals sent at 200 a second, from the call to the future's callback.

    By the action's own service, so that what is measured is the node and not this process, which as an
    ActionClient would also read every goal's state and feedback with the same interpreter.
    """
    service = GenerateResponse.Impl.SendGoalService
    client = robot.node.create_client(service, f"{ACTION}/_action/send_goal", qos_profile=DEEP)
    client.wait_for_service(timeout_sec=10.0)
    took: dict[bool, list[float]] = {True: [], False: []}

    def answered(at: float) -> Callable[[Any], None]:
        return lambda future: took[future.result().accepted].append(1e3 * (time.monotonic() - at))

    begin = time.monotonic()
    for number in range(int(seconds * RATE)):
        goal_id = UUID(uuid=list(uuid.uuid4().bytes))
        request = service.Request(goal_id=goal_id, goal=long_goal(200))
        time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
        client.call_async(request).add_done_callback(answered(time.monotonic()))
    time.sleep(2.0)
    robot.node.destroy_client(client)
    return {
        "sent": int(seconds * RATE),
        "taken": len(took[True]),
        "refused": len(took[False]),
        "refused_ms": spread(took[False]),
        "taken_ms": spread(took[True]),
    }


def cancels(robot: Robot, count: int = 50) -> dict[str, float]:
    """ms from asking to cancel a goal that decodes to its result."""
    took = []
    for _ in range(count):
        sent = robot.send_goal(GenerateResponse, ACTION, long_goal())
        while not sent.feedback:
            time.sleep(0.001)
        begin = time.monotonic()
        sent.cancel()
        sent.result()
        took.append(1e3 * (time.monotonic() - begin))
    return spread(took)


def faults(robot: Robot, process: NodeProcess, count: int = 1) -> dict[str, Any]:
    """Seconds from the signal to "lost" and to "open" again on /diagnostics; medians."""
    found: dict[str, Any] = {}
    for how in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP):
        lost, opened = [], []
        for _ in range(count):
            (worker,) = children_of(process.process.pid)
            robot.send_goal(GenerateResponse, ACTION, long_goal())
            begin, mark = time.monotonic(), robot.listen()
            os.kill(worker, how)
            robot.figures(NODE, lambda v: v["engine_state"] == "lost", 30.0, after=mark)
            lost.append(time.monotonic() - begin)
            robot.figures(NODE, lambda v: v["engine_state"] == "open", 30.0)
            opened.append(time.monotonic() - begin - lost[-1])
            time.sleep(HEALTHY_SECONDS + 0.5)  # else the back-off goes on
        found[how.name] = {
            "detected_s": round(statistics.median(lost), 3),
            "replaced_s": round(statistics.median(opened), 3),
        }
    return found


def way_of_a_plan(path: str, count: int = 200) -> dict[str, Any]:
    """ms of the same command by the action and in this process; they take turns."""
    command = "bring me the red mug from the kitchen"
    process = NodeProcess("edge_nodes.planner_node", "planner", {})
    action, here = [], []
    try:
        with Robot() as robot, open_engine(path) as session:
            robot.activate("/planner")
            for number in range(count + 10):
                begin = time.monotonic()
                robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=command)).result()
                between = time.monotonic()
                session.chat([{"role": "user", "content": command}])
                if number >= 10:
                    action.append(1e3 * (between - begin))
                    here.append(1e3 * (time.monotonic() - between))
    finally:
        process.stop()
    return {"action_ms": spread(action), "session_ms": spread(here)}


@contextmanager
def serving(parameters: dict[str, Any]) -> Iterator[tuple[Robot, NodeProcess]]:
    process = NodeProcess("ticking_node", "language", parameters)
    try:
        with Robot() as robot:
            robot.activate(NODE)
            yield robot, process
    finally:
        process.stop()


def picture(ticks: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, values in ticks.items():
        ordered = sorted(values)
        axis.plot(ordered, [1 - k / len(ordered) for k in range(len(ordered))], label=name)
    axis.set(xlabel="lateness of a tick (ms)", ylabel="share of ticks later than that", xscale="symlog")
    axis.set_yscale("log")
    axis.set_title(f"A {HERTZ} Hz timer in the node")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-faults", action="store_true", help="leave out the lost workers, three minutes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a phase of the timer")
    options = parser.parse_args()
    sys.setswitchinterval(0.0002)  # as the node: what is measured is not this process's interpreter
    path = str(planner_engine(print))
    over = "rclpy" if REAL else "the test layer on cyclonedds"
    results: dict[str, Any] = {"machine": machine(), "over": over}
    parameters = {
        "engine__path": path,
        "queue__depth": 8,
        "feedback__period": 0.02,
        "diagnostics__period": 0.05,
        "result__timeout": 60,
        "test__timer_hz": float(HERTZ),
    }
    # Each in a node of its own, as what one leaves behind (results that are kept) is no part of the next
    with serving(parameters) as (robot, _):
        results["timer"] = timer_beside_decoding(robot, options.rounds, options.seconds)
    with serving(parameters | {"diagnostics__period": 1.0, "test__timer_hz": 1.0}) as (robot, _):
        results["flood"] = flood(robot)  # of the node as it is by itself
    with serving(parameters) as (robot, process):
        results["cancel_to_result_ms"] = cancels(robot)
        if not options.no_faults:
            results["faults"] = faults(robot, process)
    results["plan"] = way_of_a_plan(path)
    ticks = results["timer"].pop("ticks")
    print(json.dumps(results, indent=1))
    kind = "ros-nodes" if not REAL else "ros-nodes-rclpy"
    name = f"cpu-{datetime.date.today()}-{kind}"
    folder = ROOT / "bench" / "results"
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(ticks, folder / f"{name}.svg")


if __name__ == "__main__":
    main()
