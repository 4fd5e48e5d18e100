"""The planner's grammar: repeatable, split by combination, and true to the skills."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
sys.path.insert(0, str(PLANNER))  # the example's scripts import one another by plain names

import grammar  # noqa: E402
import skills  # noqa: E402
import vocabulary  # noqa: E402
from verbs import INTENTS  # noqa: E402


@pytest.fixture(scope="module")
def training() -> list[grammar.Command]:
    return list(islice(grammar.commands(7), 8_000))


@pytest.fixture(scope="module")
def heldout() -> list[grammar.Command]:
    return grammar.heldout()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PLANNER / "model" / "tokenizer.json"))


def test_the_same_seed_gives_the_same_commands() -> None:
    first = list(islice(grammar.commands(3), 200))
    assert first == list(islice(grammar.commands(3), 200))
    assert first != list(islice(grammar.commands(4), 200))


def test_the_committed_heldout_file_is_what_the_grammar_writes(heldout: list[grammar.Command]) -> None:
    lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 2_000
    assert [json.loads(line) for line in lines] == [
        {"prompt": command.prompt, "expected": command.expected} for command in heldout
    ]


def test_no_combination_is_in_both_splits(
    training: list[grammar.Command], heldout: list[grammar.Command]
) -> None:
    seen = {triple for command in training for triple in (*command.triples, *command.implied)}
    asked = {triple for command in heldout for triple in command.triples}
    assert seen and asked
    assert not seen & asked
    assert all(command.triples for command in heldout)
    # Not only in this sample: the hash that keeps them apart holds for any command.
    assert not any(grammar.reserved(triple) for triple in seen)
    assert all(grammar.reserved(triple) for triple in asked)


def test_no_prompt_or_plan_is_in_both_splits(
    training: list[grammar.Command], heldout: list[grammar.Command]
) -> None:
    assert not {c.prompt for c in training} & {c.prompt for c in heldout}
    assert not {c.expected for c in training} & {c.expected for c in heldout}


def test_one_command_means_one_plan(training: list[grammar.Command], heldout: list[grammar.Command]) -> None:
    plans: dict[str, str] = {}
    for command in (*training, *heldout):
        assert plans.setdefault(command.prompt, command.expected) == command.expected


def test_every_expected_plan_fits_the_skills(
    training: list[grammar.Command], heldout: list[grammar.Command]
) -> None:
    for command in (*training, *heldout):
        skills.check_plan(command.plan)
        assert json.loads(command.expected) == command.plan
    assert {step["skill"] for command in training for step in command.plan} == set(skills.SKILLS)


def test_the_grammar_is_rich_enough(training: list[grammar.Command]) -> None:
    assert len(INTENTS) >= 16
    assert len(vocabulary.OBJECTS) >= 40
    assert len(vocabulary.PLACES) >= 25
    names = [place.name for place in vocabulary.PLACES]
    assert len(set(names)) == len(names)
    assert len({command.prompt for command in training}) > 0.95 * len(training)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ([], "1 to"),
        ({"skill": "stop"}, "1 to"),
        (["stop"], "step 0: not an object"),
        ([{"skill": "fly"}], "unknown skill 'fly'"),
        ([{"skill": ["stop"]}], "unknown skill"),
        ([{"skill": "stop"}, {"skill": "go_to"}], "step 1: go_to needs 'place'"),
        ([{"skill": "go_to", "place": ""}], "go_to.place"),
        ([{"skill": "stop", "place": "kitchen"}], "takes no argument 'place'"),
        ([{"skill": "wait", "seconds": True}], "wait.seconds"),
        ([{"skill": "wait", "seconds": 0}], "wait.seconds"),
        ([{"skill": "switch", "object": "fan", "state": "dim"}], "switch.state"),
        ([{"skill": "switch", "object": "fan", "state": ["on"]}], "switch.state"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_reason(plan: object, complaint: str) -> None:
    with pytest.raises(skills.PlanError, match=complaint.replace("[", r"\[")):
        skills.check_plan(plan)


def test_an_optional_argument_may_be_left_out() -> None:
    skills.check_plan([{"skill": "follow", "person": "Anna"}])
    skills.check_plan([{"skill": "follow", "person": "Anna", "place": "garage"}])


def test_the_committed_schema_is_what_the_skills_export(heldout: list[grammar.Command]) -> None:
    schema = json.loads((PLANNER / "plan.schema.json").read_text(encoding="utf-8"))
    assert schema == skills.json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    for command in heldout[:100]:
        validator.validate(command.plan)
    assert not validator.is_valid([{"skill": "stop", "place": "kitchen"}])


def test_the_tokenizer_gives_back_every_text(
    tokenizer: Tokenizer, training: list[grammar.Command], heldout: list[grammar.Command]
) -> None:
    for command in (*training[:1_000], *heldout[:1_000]):
        for text in (command.prompt, command.expected):
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["日本 \n\t x  y é", 'a  b\r\n{"x":1}', '[[{{"""abc":"q', "_z x_y_", "\u0000\U0001f916", ""]
)
def test_the_tokenizer_gives_back_text_that_it_never_saw(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_plan_is_few_tokens(tokenizer: Tokenizer, heldout: list[grammar.Command]) -> None:
    lengths = [len(tokenizer.encode(command.expected).ids) for command in heldout[:500]]
    assert sum(lengths) / len(lengths) < 50
    assert max(lengths) < 160


def test_target_and_draft_share_the_tokenizer_and_fit_every_format() -> None:
    model, draft = PLANNER / "model", PLANNER / "draft"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (draft / name).read_bytes()
    for folder in (model, draft):
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert shape["hidden_size"] % 256 == 0
        assert shape["intermediate_size"] % 256 == 0
    assert (model / "model.safetensors").stat().st_size <= 16 * 2**20
    assert (draft / "model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size / 3
