"""Already quantized folders: every value as the method's specification gives it, equal and not merely close.

The folders come from quantized_folders.py (plain loops from the specifications); test_quantized_peers.py
compares with the methods' own libraries where those are installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_cases import CASES, WIDE, saver
from quantized_folders import Values, write_quantized

from builders.parts import read_architecture
from builders.reorder import order_inputs
from builders.sources import open_source, prequantized
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


def test_a_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dummy: every linear is stored as ones, times a scale."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "all_ones.py").write_text(
        "import numpy as np\n"
        "from builders.sources.integers import Integers\n"
        "from builders.sources.module_keys import modules\n"
        "def read(config, shards, notices):\n"
        "    shape = config.read(int, 'rows'), config.read(int, 'cols')\n"
        "    def one(module):\n"
        "        module.shape('scale', 2, 'F16')\n"
        "        return Integers(shape, bits=8, group=shape[1], read_zero=None,\n"
        "                        read_scale=lambda: module.scales('scale'),\n"
        "                        read=lambda: np.full(shape, 129, np.uint8))\n"
        "    return {f'{m.name}.weight': one(m) for m in modules(shards, 'scale')}\n"
    )
    monkeypatch.setattr(prequantized, "__path__", [*prequantized.__path__, str(tmp_path / "more")])
    assert "all-ones" in prequantized.known_methods()

    def writer(module: str, weight: np.ndarray, rng: np.random.Generator) -> Any:
        scale = np.full((len(weight), 1), 0.25, np.float16)
        return {f"{module}.scale": scale}, np.full((32, 32), 0.25, np.float32)

    config = {"quant_method": "all-ones", "rows": 32, "cols": 32}
    values = write_quantized(tmp_path / "m", config, writer, intermediate_size=32, num_key_value_heads=4)
    with open_source(tmp_path / "m") as source:
        assert len(source.matrices) == 14
        for key in source.matrices:
            np.testing.assert_array_equal(source.tensor(key), values[key])
