"""Fleet files: which cells they make, with which options, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.cli import make_parser
from builders.fleet_file import Fleet, read_fleet
from edge_runtime.errors import BadConfig

PROFILES = Path(__file__).resolve().parents[2] / "profiles"
GOOD: dict[str, Any] = {"models": ["a/one"], "profiles": ["cpu"]}


def fleet_of(folder: Path, data: Any) -> Fleet:
    """With all that the tests name there, as far as it must be: no model is read."""
    for name in ("a/one", "b/one", "one", "two", "d", "p/q"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("the quick brown fox")
    path = folder / "robots.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return read_fleet(path, make_parser)


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    return vars(make_parser().parse_args(list(words)))


def test_every_model_profile_and_variant_is_a_cell(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    mine = (PROFILES / "cpu.yaml").read_text().replace("name: cpu", "name: mine")
    (tmp_path / "own" / "mine.yaml").write_text(mine)
    fleet = fleet_of(
        tmp_path,
        {
            "output": "out",
            "models": [
                "a/one",
                {"path": str(tmp_path / "two"), "name": "second", "options": {"draft": "d", "kv": "f16"}},
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
    assert first["model"] == str(tmp_path / "a/one") and last["model"] == str(tmp_path / "two")
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
        (GOOD | {"variants": {f"v{i}": {} for i in range(1001)}}, "1001 engines"),
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


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"profiles": ["cpu", "orin-nona-8gb"]}, "profiles[1]: no profile named 'orin-nona-8gb': did you me"),
        ({"profiles": ["cpu", "own/mine.yaml"]}, "profiles[1]: {folder}/own/mine.yaml: no such file"),
        ({"models": ["a/one", "a/oen"]}, "models[1]: path: {folder}/a/oen does not exist"),
        (
            {"options": {"algorithm": "gptqq"}},
            "options.algorithm: unknown algorithm 'gptqq'; did you mean 'gp",
        ),
        ({"options": {"algorithm": "awq+gtpq"}}, "options.algorithm: unknown algorithm 'gtpq'; did you mean"),
        (
            {"variants": {"a": {"weights": "int4_g46"}}},
            "variants.a.weights: unknown format 'int4_g46'; did y",
        ),
        ({"options": {"head-weights": "f61"}}, "options.head-weights: unknown format 'f61'; did you mean"),
        ({"options": {"formats": "int4_g64,x"}}, "options.formats: --formats: unknown weight format 'x'"),
        ({"options": {"kv": "itn8"}}, "options.kv: "),
        ({"options": {"observer": "mze"}}, "options.observer: unknown observer 'mze'; did you mean 'mse'?"),
        ({"options": {"max-memory": "3 gb of it"}}, "options.max-memory: the value '3 gb of it': expected a"),
        ({"options": {"calibration": "txet.txt"}}, "options.calibration: {folder}/txet.txt does not exist"),
        ({"options": {"eval": "no.txt"}}, "options.eval: {folder}/no.txt does not exist"),
        ({"options": {"lora": ["x=p/q", "y=p/r"]}}, "options.lora: {folder}/p/r does not exist"),
        ({"models": [{"path": "two", "options": {"draft": "e"}}]}, "models[0]: options.draft: {folder}/e do"),
        (
            {"profiles": ["orin"], "options": {"power-mode": "16W"}},
            "one-orin: profile 'orin-agx-64gb' has no",
        ),
        ({"options": {"task-f32": True}}, "one-cpu: --task-f32 needs --task"),
        (
            {"options": {"max-kl": 0.1, "no-eval": True}},
            "one-cpu: --max-kl 0.1 needs 0 or more, and no --no-",
        ),
        ({"options": {"sensitivity-file": "text.txt"}}, "one-cpu: {folder}/text.txt is no sensitivity file"),
    ],
)
def test_values_are_proved_before_any_work(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        fleet_of(tmp_path, GOOD | data)
    assert str(caught.value).startswith(f"robots.yaml: {words.format(folder=tmp_path)}")


def test_what_edge_build_takes_is_taken(tmp_path: Path) -> None:
    options = {"weights": "auto", "kv": "auto", "formats": "int4_g64, f16", "bits": 5, "calibration": "self"}
    options |= {"algorithm": "awq+gptq", "max-memory": "3GiB", "head-weights": "f16", "observer": "mse"}
    (cell,) = fleet_of(tmp_path, GOOD | {"profiles": ["auto"], "options": options}).cells
    assert parsed(cell.words)["weights"] == "auto"
    fleet_of(tmp_path, GOOD | {"options": {"weights": "keep", "kv": "f16,int8", "calibration": "builtin"}})
