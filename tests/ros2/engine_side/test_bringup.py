"""The file of a robot's nodes: read strictly, each slip named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from edge_nodes.bringup import read_bringup
from edge_nodes.parameter_table import TABLES

from edge_runtime import BadConfig

CONFIG = Path(__file__).resolve().parents[3] / "ros2_nodes" / "edge_nodes" / "config"


def test_the_example_of_a_robot_is_right() -> None:
    nodes = read_bringup(CONFIG / "orin_robot.yaml")
    assert {name: spec.kind for name, spec in nodes.items()} == {"planner": "planner", "chat": "language"}
    assert nodes["planner"].remap == {"command": "/speech/text"} and nodes["chat"].autostart


@pytest.mark.parametrize("kind", ["language", "planner"])
def test_parameters_of_the_example_files_are_known_and_in_range(kind: str) -> None:
    values = yaml.safe_load((CONFIG / f"{kind}.yaml").read_text())["/**"]["ros__parameters"]
    rows = {row.name: row for row in TABLES[kind]}
    for name, value in values.items():
        assert type(value) is type(rows[name].default), name
        assert rows[name].trouble(value) is None


@pytest.mark.parametrize("kind", ["language", "planner"])
def test_defaults_are_in_range(kind: str) -> None:
    for row in TABLES[kind]:
        assert row.trouble(row.default) is None and row.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a mapping"),
        ("nodes: {}", "nodes is empty"),
        ("node: {a: {kind: planner}}", "unknown key 'node'; did you mean 'nodes'"),
        ("nodes: {a: {kind: planer}}", r"nodes\.a\.kind is 'planer'; did you mean 'planner'"),
        ("nodes: {a: {}}", r"nodes\.a\.kind is None"),
        ("nodes: {1a: {kind: planner}}", "not a node's name"),
        ("nodes: {a: {kind: planner, autostrt: true}}", "did you mean 'autostart'"),
        ("nodes: {a: {kind: planner, autostart: 1}}", "expected true or false"),
        ("nodes: {a: {kind: planner, namespace: 1}}", "expected a string"),
        ("nodes: {a: {kind: planner, parameters: {engine.pth: x}}}", "did you mean 'engine.path'"),
        ("nodes: {a: {kind: planner, parameters: {engine.path: 1}}}", "expected str"),
        ("nodes: {a: {kind: planner, parameters: {worker.nice: 99}}}", "expected 0 to 19"),
        ("nodes: {a: {kind: planner, parameters: {input_qos: BEST}}}", "expected one of"),
        ("nodes: {a: {kind: planner, remap: {command: ''}}}", "expected a topic's name"),
        ("nodes: {a: {kind: planner}, a: {kind: language}}", "given twice"),
        ("nodes: [", "not valid YAML"),
    ],
)
def test_a_slip_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=words):
        read_bringup(path)


def test_a_whole_number_is_a_double_where_one_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text("nodes: {a: {kind: planner, parameters: {deadline.default: 2}}}")
    value = read_bringup(path)["a"].parameters["deadline.default"]
    assert value == 2.0 and isinstance(value, float)
