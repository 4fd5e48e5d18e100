"""edge-bench --calibrate: a profile that loads, of figures that are times; no figure is judged here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.cli import bench, synthetic
from edge_runtime.cli.calibrate import (
    Calibrated,
    cache_ends,
    calibrate,
    core_cache,
    last_cache,
    profile_yaml,
    runnable,
)
from edge_runtime.cli.calibration_answer import compare
from edge_runtime.cli.experiment import Experiment, Served
from edge_runtime.cli.output import Progress
from edge_runtime.cli.timer import Timer, session_seconds
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.errors import BadConfig, Unsupported
from edge_runtime.serving.device import get_backend
from edge_runtime.serving.open import open_engine

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    if not get_backend("cpu").available().ok:
        pytest.skip("the native library is not built")
    with pytest.MonkeyPatch.context() as patch:  # some servers have caches of hundreds of MB to read through
        patch.setattr("edge_runtime.cli.calibrate.last_cache", lambda: 16 << 20)
        return calibrate(load_profile("cpu"), 1, lambda *_: None, ("int8_row", "f16"), limit_s=0.02)


@pytest.fixture(scope="module")
def measured(calibrated: Calibrated) -> Profile:
    return calibrated.profile


def test_every_figure_is_there_and_is_a_time_or_a_rate(measured: Profile) -> None:
    found = measured.efficiency.measured
    assert found is not None and found.threads == 1
    assert set(found.formats) == {"int8_row", "f16"} and set(found.kv_ns) == set(K_FORMATS)
    for speed in found.formats.values():
        assert min(speed.gbps, speed.cached_gbps, speed.gops) > 0
        assert min(speed.output_ns, speed.chunk_output_ns) >= 0
    assert min(found.unit_us, found.odd_head_ns, found.small_step_us) >= 0
    assert min(found.step_us, found.token_us, found.request_us, found.query.value_ns) >= 0
    assert 0 < measured.efficiency.bandwidth <= 1 and 0 < measured.efficiency.compute <= 1


def test_the_file_reads_back_to_four_digits(measured: Profile, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(profile_yaml(measured, "a machine", "2026-11-25"))
    back = load_profile(path)
    assert back.efficiency.measured is not None and measured.efficiency.measured is not None
    for name, speed in measured.efficiency.measured.formats.items():
        assert back.efficiency.measured.formats[name].gops == pytest.approx(speed.gops, rel=1e-3)
    assert back.efficiency.measured.step_us == pytest.approx(measured.efficiency.measured.step_us, rel=1e-3)
    again = tmp_path / "again.yaml"
    again.write_text(profile_yaml(back, "a machine", "2026-11-25"))
    assert again.read_text() == path.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("step_us: ", "step_ms: "),
        ("int8_row:", "int8_raw:"),
        ("threads: 1", "threads: 0"),
        ("row_ns: ", "row_ns: -"),
    ],
)
def test_a_damaged_file_is_refused(measured: Profile, tmp_path: Path, change: str, words: str) -> None:
    text = profile_yaml(measured, "a machine", "2026-11-25")
    assert change in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(change, words, 1).replace("row_ns: -0.0", "row_ns: -1.0"))
    with pytest.raises(BadConfig, match=r"efficiency\.measured"):
        load_profile(path)


def test_a_file_of_an_older_calibration_says_to_calibrate_again(measured: Profile, tmp_path: Path) -> None:
    """Until rows had a cost for each format, `output_ns` was one figure of all."""
    path = tmp_path / "old.yaml"
    text = profile_yaml(measured, "a machine", "2026-11-25")
    path.write_text(text.replace("    unit_us: ", "    output_ns: "))
    with pytest.raises(BadConfig, match=r"efficiency\.measured\.output_ns: .*calibrate"):
        load_profile(path)


def test_shipped_profiles_have_nothing_measured_and_other_devices_are_refused() -> None:
    assert load_profile("cpu").efficiency.measured is None
    with pytest.raises(Unsupported, match="--profile cpu or auto"):
        calibrate(load_profile("orin"), 1, lambda *_: None)


def test_every_format_with_kernels_is_timed_by_default() -> None:
    names = runnable()
    assert {"int4_g64", "int8_row", "f16", "f32"} <= set(names) <= set(FORMATS)


def test_where_a_cache_ends_is_told_by_the_time_of_a_byte() -> None:
    sizes = [1 << k for k in range(20, 27)]
    assert cache_ends(sizes, [1, 1, 1, 1, 2, 2, 2]) == (round(2**23.1), round(2**23.9))
    least, most = cache_ends(sizes, [1, 1.01, 1.05, 1.5, 1.8, 1.96, 2])
    assert sizes[2] < least < sizes[3] and sizes[4] < most < sizes[5]
    assert cache_ends(sizes, [1] * 7) == (sizes[0], sizes[0])  # no end was met: nothing is known beyond
    assert cache_ends(sizes, [1, 0.9, 0.9, 1.5, 2, 2, 1.9])[0] < sizes[4]  # noise


def test_the_cache_s_size_is_read_as_the_system_writes_it(tmp_path: Path) -> None:
    for index, (level, size) in enumerate(((1, "32K"), (1, "48K"), (2, "1024K"), (3, "32M"))):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_cache(tmp_path) == 32 << 20 and core_cache(tmp_path) == 1 << 20
    assert last_cache(tmp_path / "nowhere") == core_cache(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    "program",
    [
        synthetic.products(64, 33),
        synthetic.product(48, 64),
        synthetic.attending(4, 2, 16, 2, 64),
        synthetic.decoder(100, layers=2, heads=8),
    ],
    ids=["products", "product", "attending", "decoder"],
)
def test_programs_are_sound_and_their_weights_lie_apart(program: synthetic.Program) -> None:
    program.check()
    weights = synthetic.weights_of(program, synthetic.plans_of(program, "int4_g64"))
    places = [p.ctypes.data for w in weights.values() for p in w.planes.values()]
    assert len(set(places)) == len(places) and all(place % 64 == 0 for place in places)
    step = StepShape(context=program.max_context, sequences=1, tokens=128, logits=1)
    assert bool(synthetic.cache_of(program, "int8", "int8", step).pages) == bool(program.cache)


def test_an_engine_of_known_work_answers_and_is_compared(measured: Profile, tmp_path: Path) -> None:
    path = tmp_path / "known.edge"
    synthetic.write_engine(path, synthetic.decoder(256, layers=2), "int8_row")
    with open_engine(str(path), backend="cpu", threads=1) as session:
        clock = Timer(1, 0.02)
        first, step = session_seconds(session, clock, 32, 64)
        rows = compare(session, measured, clock)
    assert first > 0 and np.isfinite(step)
    assert [r["what"] for r in rows] == ["tokens/s at 128", "first token of 255, ms"]
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)


def test_the_command_writes_the_profile(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """The measurement itself is in the tests above."""
    monkeypatch.setattr("edge_runtime.cli.calibration_answer.calibrate", lambda *_: calibrated)
    output = tmp_path / "mine.yaml"
    options = ["--profile", "cpu", "--formats", "int8_row", "--output", str(output)]
    assert bench.main(["--calibrate", "--json", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == str(output) and data["check"] is None
    assert data["fit"] == pytest.approx(calibrated.errors)
    assert load_profile(output).efficiency.measured is not None
    assert (
        msgspec.to_builtins(calibrated.profile.efficiency.measured.query)
        == data["profile"]["efficiency"]["measured"]["query"]
    )  # type: ignore[union-attr]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_ten_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        told = Progress("timing", stream)
        for i in range(201):
            told(i, 200, f"thing {i}")
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("100% thing 200\n")
    assert " 50% thing 100" in terminal.getvalue()
    lines = file.getvalue().splitlines()
    assert len(lines) == 11 and lines[5] == "timing 50%: thing 100"


def test_every_round_is_watched_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    if not get_backend("cpu").available().ok:
        pytest.skip("the native library is not built")
    taken = {"seconds": 0}

    def run(self: Experiment | Served, clock: Timer) -> list[float]:
        taken["seconds"] += 1
        return [1e-3] if isinstance(self, Experiment) else [3e-3, 1e-3, 4e-3]

    for kind in (Experiment, Served):
        monkeypatch.setattr(kind, "run", run)
    seen: list[tuple[int, int]] = []
    calibrate(load_profile("cpu"), 1, lambda done, total, _: seen.append((done, total)), ("f16",), 0.02)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 0 and seen[-1] == (taken["seconds"], taken["seconds"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibrate", "--output", "mine.txt"], "ends in .yaml"),
        (["--calibrate", "--formats", "int9"], "unknown format 'int9'"),
        (["--calibrate", "--profile", "orin"], "--profile cpu or auto"),
        (["--output", "mine.yaml"], "--output is for --calibrate"),
    ],
)
def test_wrong_options_are_named(options: list[str], words: str, capsys: Captured) -> None:
    assert bench.main(options) == 1
    assert words in capsys.readouterr().err
