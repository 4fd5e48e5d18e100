"""Tuning: measured on the device, kept beside the engine, of use to it alone, and no number changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from emulated_parts import formats_for, part_of, random_weights
from fake_cuda import FakeCuda
from toy_engine import toy_program

from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.cuda.launcher import Launcher
from edge_runtime.backends.cuda.tuner import Tuner
from edge_runtime.backends.cuda.tuning import (
    FORMS,
    Tuning,
    candidates,
    default_form,
    read_tuning,
    tuning_path,
    write_tuning,
)
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.errors import BuildError


@pytest.fixture
def part(fake_gpu: FakeCuda, tmp_path: Path) -> Part:
    program = toy_program()
    made = part_of(program, random_weights(program, formats_for(program, "int4_g64")), tmp_path)
    assert made.code is not None
    return replace(made, code=replace(made.code, engine=tmp_path / "toy.edge"))


def prompt(count: int) -> StepBatch:
    return StepBatch(
        tokens=np.arange(count, dtype=np.int32),
        positions=np.arange(count, dtype=np.int32),
        sequence=np.zeros(count, np.int32),
        page_tables=np.arange(4, dtype=np.int32)[None],
        logit_rows=np.arange(count, dtype=np.int32),
    )


def test_every_form_gives_the_same_numbers(part: Part) -> None:
    executor = CudaBackend().load(part)
    try:
        whole = executor.forward(prompt(20)).copy()
        seen: set[tuple[str, str]] = set()
        tuning = executor.tune(lambda product, form, took: seen.add((product, form)))
        assert {product for product, _ in seen} == set(tuning.forms)
        assert all((product, form) in seen for product, form in tuning.forms.items())
        assert executor.forward(prompt(20)).tobytes() == whole.tobytes()
        launcher: Launcher = executor._launcher
        for form in FORMS:
            launcher.use(dict.fromkeys(tuning.forms, form))
            executor._graphs.clear()
            executor._launches.clear()
            assert executor.forward(prompt(20)).tobytes() == whole.tobytes(), form
    finally:
        executor.close()


def test_the_fastest_is_chosen(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"split1": 3.0, "deep": 2.0, "split2": 2.0, "split4": 4.0, "tile": 1.0}
    made: Callable[..., object] = Tuner._made
    running: dict[int, float] = {}

    def remember(self: Tuner, launches: list[object], rows: int, form: str) -> object:
        found = made(self, launches, rows, form)
        running[id(found)] = wanted[form]
        return found

    monkeypatch.setattr(Tuner, "_made", remember)
    monkeypatch.setattr(Tuner, "_time", lambda self, launches: running[id(launches)])
    executor = CudaBackend().load(part)
    try:
        forms = executor.tune().forms
    finally:
        executor.close()
    assert {form for key, form in forms.items() if key.endswith(" at 8")} == {"deep"}
    assert {form for key, form in forms.items() if key.endswith(" at 32")} == {"tile"}


def test_it_is_used_when_the_engine_is_opened_on_that_device(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert part.code is not None and part.code.engine is not None
    path = tuning_path(part.code.engine)
    executor = CudaBackend().load(part)
    forms = dict.fromkeys(executor.tune().forms, "tile")
    write_tuning(path, msgspec.structs.replace(executor.tune(), forms=forms))
    executor.close()

    def kernels(loaded: Part) -> set[str]:
        opened = CudaBackend().load(loaded)
        try:
            return {launch.symbol for launch in opened._launcher.step(1) if "linear" in launch.symbol}
        finally:
            opened.close()

    assert kernels(part) == {"linear_tile_int4_g64", "linear_tile_int8_row"}
    assert all("split1" in symbol for symbol in kernels(replace(part, code=replace(part.code, engine=None))))
    monkeypatch.setenv("EDGE_FAKE_NAME", "another GPU")
    assert all("split1" in symbol for symbol in kernels(part))


def test_a_damaged_or_foreign_file_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.tuning.json"
    tuning = Tuning(device="d", code="c", forms={"p": "deep"})
    write_tuning(path, tuning)
    assert read_tuning(path, "d", "c") == tuning
    assert read_tuning(path, "e", "c") is read_tuning(path, "d", "x") is None
    good = json.loads(path.read_text())
    for bad in ("", "{", "[]", json.dumps({**good, "more": 1}), json.dumps({**good, "forms": {"p": "fast"}})):
        path.write_text(bad)
        assert read_tuning(path, "d", "c") is None
    path.unlink()
    assert read_tuning(path, "d", "c") is None
    with pytest.raises(BuildError, match="cannot be written"):
        write_tuning(tmp_path / "none" / "x.tuning.json", tuning)
    assert not list(tmp_path.iterdir())


def test_forms_that_are_measured_hold_the_default() -> None:
    for rows in (1, 8, 9, 16, 17, 32, 33, 512):
        assert default_form(rows) in candidates(rows)
