"""Already quantized folders: every value as the method's specification gives it, equal and not merely close.

The folders come from quantized_folders.py (plain loops from the specifications); test_quantized_peers.py
compares with the methods' own libraries where those are installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from import_cases import CASES, WIDE, saver
from quantized_folders import Values, write_quantized

from builders.parts import read_architecture
from builders.reorder import order_inputs
from builders.sources import open_source
from builders.weights import CheckpointWeights
from edge_runtime.engine.formats import get_format


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Values, set[str]]:
    writer, config, formats = CASES[request.param]
    values = write_quantized(tmp_path / "m", config, writer, save=saver(config), **WIDE)
    return tmp_path / "m", values, formats


def test_values_and_planes_are_exact(case: tuple[Path, Values, set[str]]) -> None:
    folder, values, formats = case
    with open_source(folder) as source:
        assert source.quantized
        assert source.shapes() == {key: value.shape for key, value in values.items()}
        found = set()
        for key, value in values.items():
            np.testing.assert_array_equal(source.tensor(key), value)
            if key not in source.matrices:
                continue
            np.testing.assert_array_equal(source.tensor(key, (3, 20)), value[3:20])
            stored, order = source.stored(key), source.matrices[key].order
            assert stored is not None and stored.error == 0.0
            found.add(stored.format)
            planes = get_format(stored.format).decode(stored.planes, *value.shape)
            np.testing.assert_array_equal(planes, value if order is None else value[:, order])
            part = stored.rows(5, 21)
            np.testing.assert_array_equal(
                get_format(part.format).decode(part.planes, 16, value.shape[1]), planes[5:21]
            )
        assert found == formats


def test_kept_names_every_matrix(case: tuple[Path, Values, set[str]]) -> None:
    folder, _, formats = case
    with open_source(folder) as source:
        architecture = order_inputs(read_architecture(source.config, None), source.orders())
        kept, notices = CheckpointWeights(architecture, source).kept()
    matrices = {n for n, spec in architecture.program.tensors.items() if spec.role == "matrix"}
    assert set(kept) == matrices and set(kept.values()) == formats
    assert notices == []
