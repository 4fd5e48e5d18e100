"""Fleet files: which cells they make, with which options, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.cli import make_parser
from builders.fleet_file import Fleet, read_fleet
from edge_runtime.errors import BadConfig

GOOD: dict[str, Any] = {"models": ["a/one"], "profiles": ["cpu"]}


def fleet_of(folder: Path, data: Any) -> Fleet:
    path = folder / "robots.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return read_fleet(path, make_parser)


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    return vars(make_parser().parse_args(list(words)))


def test_every_model_profile_and_variant_is_a_cell(tmp_path: Path) -> None:
    fleet = fleet_of(
        tmp_path,
        {
            "output": "out",
            "models": [
                "a/one",
                {"path": "/abs/two", "name": "second", "options": {"draft": "d", "kv": "f16"}},
            ],
            "profiles": ["cpu", "own/mine.yaml"],
            "options": {"kv": "int8", "context": 64, "no-eval": True, "task-f32": False, "lora": ["x=p/q"]},
            "variants": {"a": {"weights": "int4_g64"}, "b": {"kv": "int4", "no-eval": False}},
        },
    )
    assert (fleet.name, fleet.output) == ("robots", tmp_path / "out")
    assert [c.name for c in fleet.cells] == [
        f"{model}-{profile}-{variant}"
        for model in ("one", "second")
        for profile in ("cpu", "mine")
        for variant in ("a", "b")
    ]
    first, last = parsed(fleet.cells[0].words), parsed(fleet.cells[-1].words)
    assert first["model"] == str(tmp_path / "a/one") and last["model"] == "/abs/two"
    assert (first["profile"], last["profile"]) == ("cpu", str(tmp_path / "own/mine.yaml"))
    assert first["output"] == tmp_path / "out" / "one-cpu-a.edge" == fleet.cells[0].target
    assert (first["weights"], first["kv"], first["context"], first["no_eval"]) == (
        "int4_g64",
        "int8",
        64,
        True,
    )
    assert last["draft"] == tmp_path / "d" and first["draft"] is None
    assert last["kv"] == "int4"  # the variant's, above the model's, above the file's
    assert parsed(fleet.cells[4].words)["kv"] == "f16"
    assert first["lora"] == [f"x={tmp_path / 'p/q'}"] and first["task_f32"] is False
    assert not any(cell.calibration for cell in fleet.cells)  # rounding to nearest needs none


def test_one_cell_has_no_variant_and_the_files_own_folder(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, GOOD)
    (cell,) = fleet.cells
    assert (cell.name, cell.variant, fleet.output) == ("one-cpu", "", tmp_path / "robots")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD | {"modles": []}, "modles: unknown key; did you mean 'models'?"),
        ({"profiles": ["cpu"]}, "models: expected a list"),
        (GOOD | {"profiles": []}, "profiles: expected a list"),
        (GOOD | {"models": [{"pth": "x"}]}, "models[0]: pth: unknown key; did you mean 'path'?"),
        (GOOD | {"models": [{"name": "x"}]}, "models[0]: path: missing key"),
        (GOOD | {"models": [3.5, True]}, "models[0]: expected keys and values"),
        (GOOD | {"profiles": [True]}, "profiles[0]: expected text"),
        (GOOD | {"options": {"wieghts": "f16"}}, "options: wieghts: unknown key; did you mean 'weights'?"),
        (GOOD | {"options": {"output": "x"}}, "options: output: unknown key"),
        (GOOD | {"options": {"no-eval": "yes"}}, "options.no-eval: expected true or false"),
        (GOOD | {"options": {"context": [1]}}, "options.context: expected text or a number"),
        (GOOD | {"options": {"context": "many"}}, "one-cpu: argument --context"),
        (GOOD | {"options": {"lora": "x=y"}}, "options.lora: expected a list"),
        (GOOD | {"variants": ["a"]}, "variants: expected keys and values"),
        (GOOD | {"variants": {}}, "0 engines, expected 1 to 1000"),
        (GOOD | {"variants": {"a": {"x": 1}}}, "variants.a: x: unknown key"),
        (GOOD | {"models": ["a/one", "b/one"]}, "two engines are named 'one-cpu'"),
        (GOOD | {"profiles": [f"p{i}" for i in range(1001)]}, "1001 engines"),
        ("models: [a]\nmodels: [b]\n", "is given twice"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("[1, 2", "not valid YAML"),
        ("just text", "expected keys and values"),
    ],
)
def test_mistakes_name_the_key(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        fleet_of(tmp_path, data)
    assert words in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        read_fleet(tmp_path / "no.yaml", make_parser)


def test_cells_of_one_calibration_share_its_folder(tmp_path: Path) -> None:
    data = {
        "models": ["one", "two"],
        "profiles": ["cpu", "orin"],
        "options": {"calibration": "text.txt", "seed": 1},
        "variants": {
            "int4": {"weights": "int4_g64"},
            "int8": {"weights": "int8_row"},
            "other": {"seed": 2},
            "own": {"calibration-folder": "mine"},
        },
    }
    cells = {c.name: c for c in fleet_of(tmp_path, data).cells}
    shared = cells["one-cpu-int4"].calibration
    assert shared is not None and shared.is_relative_to(tmp_path / "robots" / "calibrations")
    same = {name for name, cell in cells.items() if cell.calibration == shared}
    assert same == {"one-cpu-int4", "one-cpu-int8", "one-orin-int4", "one-orin-int8"}
    assert len({c.calibration for c in cells.values()}) == 5  # 2 models x 2 seeds, and None for their own
    assert f"--calibration-folder={shared}" in cells["one-orin-int8"].words
    assert parsed(cells["one-cpu-int4"].words)["calibration"] == str(tmp_path / "text.txt")
    assert f"--calibration-folder={tmp_path / 'mine'}" in cells["one-cpu-own"].words


@pytest.mark.parametrize(
    ("options", "calibrates"),
    [
        ({}, False),
        ({"algorithm": "rtn"}, False),
        ({"algorithm": "gptq"}, True),
        ({"sensitivity": "hessian"}, True),
        ({"calibration": "builtin"}, True),
    ],
)
def test_cells_that_need_no_statistics_have_no_folder(
    options: dict[str, Any], calibrates: bool, tmp_path: Path
) -> None:
    (cell,) = fleet_of(tmp_path, GOOD | {"options": options}).cells
    assert (cell.calibration is not None) == calibrates
    assert parsed(cell.words)["calibration_folder"] == cell.calibration


def test_a_switch_that_takes_a_value_may_stand_alone(tmp_path: Path) -> None:
    for given, want in ((True, 0), (3, 3), (False, None)):
        (cell,) = fleet_of(tmp_path, GOOD | {"options": {"rotate": given}}).cells
        assert parsed(cell.words)["rotate"] == want


def test_an_unknown_algorithm_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="did you mean 'gptq'"):
        fleet_of(tmp_path, GOOD | {"options": {"algorithm": "gptqq"}})
