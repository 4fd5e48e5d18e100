"""The main of a node: spin until a signal, whatever a callback raises."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import rclpy
from rclpy.exceptions import InvalidHandle, ParameterException
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor

from edge_nodes.edge_node import EdgeNode
from edge_nodes.process import settle_process
from edge_runtime import EdgeError

THREADS = 4  # a transition, a service that asks the engine, and two for goals, parameters and timers


def _start_threads(executor: MultiThreadedExecutor) -> None:
    """All of them now: a process that has its size before the mission keeps it."""
    together = threading.Barrier(THREADS)
    for _ in range(THREADS):
        executor.create_task(_meet, together)


def _meet(together: threading.Barrier) -> None:
    with suppress(threading.BrokenBarrierError):
        together.wait(1.0)


def spin_node(make: Callable[[], EdgeNode], args: list[str] | None = None) -> int:
    """Make the node and serve it; returns the exit code."""
    settle_process()
    # rclpy ends the spinning at Ctrl-C by itself; Python's own handler would cut the clean-up at a second one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rclpy.init(args=args)
    node: EdgeNode | None = None
    try:
        node = make()
        executor = MultiThreadedExecutor(num_threads=THREADS)
        executor.add_node(node)
        _start_threads(executor)
        # What is there now stays: else a full collection walks every module, 50 ms in which no timer runs
        gc.collect()
        gc.freeze()
        while rclpy.ok():
            try:
                executor.spin()
            except (KeyboardInterrupt, ExternalShutdownException):
                break
            except InvalidHandle:
                continue  # rclpy was about to wait for a topic that a transition had just destroyed
            except Exception as error:  # of rclpy itself or a callback without a guard
                if rclpy.ok():  # else the process ends, and Humble was about to wait
                    node.unexpected("the executor", error)
        executor.shutdown()
        return 0
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    except (EdgeError, ParameterException) as error:  # a value of the launch file, for one
        print(f"edge_nodes: the node cannot start: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
