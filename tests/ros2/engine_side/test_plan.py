"""Plans read while they are written: the same calls however the text is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from edge_nodes.plan import PlanReader

from edge_runtime import BadRequest

ROOT = Path(__file__).resolve().parents[3]


def plans() -> list[str]:
    lines = (ROOT / "examples" / "planner" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["expected"] for line in lines[:200]]


def test_calls_are_those_of_the_json_however_it_is_cut() -> None:
    rng = random.Random(1)
    for text in plans():
        reader, calls = PlanReader(), []
        at = 0
        while at < len(text):
            step = rng.randint(1, 30)
            calls += reader.feed(text[at : at + step])
            at += step
        wanted = json.loads(text)
        assert reader.complete and reader.text == text and reader.calls == calls
        assert [c.skill for c in calls] == [step["skill"] for step in wanted]
        for call, step in zip(calls, wanted, strict=True):
            found = {a.name: json.loads(a.value) if a.kind != "text" else a.value for a in call.arguments}
            assert {"skill": call.skill, **found} == step


def test_a_call_comes_when_it_is_whole_and_not_before() -> None:
    reader = PlanReader()
    assert reader.feed('[ {"skill": "go_to", "place": "a}]"') == []
    (call,) = reader.feed("}")
    assert call.skill == "go_to" and call.arguments[0].value == "a}]"
    assert not reader.complete
    assert (
        reader.feed(', {"skill":"wait","seconds":2.5,"loud":true,"times":3}')[0].arguments[1].value == "true"
    )
    assert [a.kind for a in reader.calls[1].arguments] == ["real", "boolean", "integer"]
    assert reader.feed(" ]\n") == [] and reader.complete


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("go", "expected '\\['"),
        ("[1]", "expected a skill call"),
        ('[{"skill":"a"} {"skill":"b"}]', "expected ','"),
        ('[{"skill":"a"}] and', "text follows"),
        ('[{"place":"a"}]', "expected its name"),
        ('[{"skill":""}]', "expected its name"),
        ('[{"skill":"a","x":[1]}]', "expected text or a number"),
        ('[{"skill":"a","x":null}]', "expected text or a number"),
        ('[{"skill":"a"},]', "expected a skill call"),
    ],
)
def test_what_is_no_plan_says_why(text: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        PlanReader().feed(text)


def test_an_empty_list_is_whole() -> None:
    reader = PlanReader()
    assert reader.feed("[]") == [] and reader.complete
