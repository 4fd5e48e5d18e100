"""Profiles: shipped files load and state their sources; every kind of bad file is a BadConfig that helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from edge_runtime.engine.profile import list_profiles, load_profile, read_profile
from edge_runtime.engine.strict_yaml import MAX_FILE_BYTES
from edge_runtime.errors import BadConfig

PROFILES = Path(__file__).parents[2] / "profiles"
FILES = sorted(PROFILES.glob("*.yaml"))
NANO = (PROFILES / "orin-nano-8gb.yaml").read_text()
EXPECTED = {
    *("orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "orin-agx-32gb", "orin-agx-64gb"),
    *("thor-t4000", "thor-t5000", "rtx-a2000", "rtx-3060", "rtx-3090", "rtx-4090", "rtx-5090"),
    *("h100", "h200", "cpu"),
}
# int8 operations per clock and SM of each generation's tensor cores
INT8_PER_CLOCK = {"8.6": 2048, "8.7": 4096, "8.9": 2048, "9.0": 8192, "11.0": 16384, "12.0": 2048}


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert NANO.count(old) >= 1
    path = tmp_path / "mine.yaml"
    path.write_text(NANO.replace(old, new, 1))
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        load_profile(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_all_devices_are_listed() -> None:
    assert {p.name for p in list_profiles()} >= EXPECTED


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_file_is_sound(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert 0 < profile.memory_available() < profile.memory.total_bytes
    assert profile.packing == ("n16k4" if profile.backend == "cpu" else "m16")
    assert profile.mode().mode_name == profile.default_mode
    assert profile.memory.unified == (profile.detect.soc is not None or profile.backend == "cpu")
    for mode in profile.power_modes.values():
        if profile.backend == "cuda":
            assert mode.gpu_mhz and mode.tpcs and profile.compute_capability
            peak = mode.tpcs * 2 * mode.gpu_mhz * INT8_PER_CLOCK[profile.compute_capability] / 1e6
            assert mode.compute.int8 == pytest.approx(peak, rel=0.01)
        if profile.detect.soc:
            assert mode.compute.fp16 == pytest.approx(mode.compute.int8 / 2, rel=0.01)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_figure_states_its_source(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r'\s*\w+: "?[0-9.]+( [KMG]iB)?"?\s*(#|$)', line):  # a key whose value is a figure
            assert re.search(r"# .*\[[^\]]*\b[SMDX]\b[^\]]*\]", line), f"{path.name}:{number}: {line}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_mapping_reads_back(path: Path, tmp_path: Path) -> None:
    profile = load_profile(path.stem)
    copy = tmp_path / "copy.yml"
    copy.write_text(yaml.safe_dump(profile.as_mapping()))
    assert read_profile(copy).as_mapping() == profile.as_mapping()


def test_known_figures() -> None:
    nano = load_profile("orin-nano-8gb")
    assert nano.sm == 87 and nano.memory.total_bytes == 7619 << 20
    assert nano.memory_available() == (7619 - 1600) << 20
    assert nano.mode().mode_name == "25W" and nano.mode("15W").bandwidth_gbps == 68.3
    assert not nano.supports("fp8")
    thor = load_profile("thor-t5000")
    assert thor.sm == 110 and thor.supports("nvfp4")
    assert thor.mode("MAXN").compute.nvfp4 == pytest.approx(1035, rel=0.01)
    assert load_profile("orin-agx-64gb").mode("MAXN").compute.int8 == pytest.approx(85, rel=0.01)


def test_aliases_and_paths() -> None:
    assert load_profile("orin").name == "orin-agx-64gb"
    assert load_profile("thor").name == "thor-t5000"
    assert load_profile(str(PROFILES / "h200.yaml")) == load_profile("h200")


def test_wrong_name_and_mode_name_the_nearest() -> None:
    with pytest.raises(BadConfig, match=r"'orin-nano-8g'.*did you mean 'orin-nano-8gb'"):
        load_profile("orin-nano-8g")
    with pytest.raises(BadConfig, match=r"'zzz'.*cpu.*thor"):
        load_profile("zzz")
    with pytest.raises(BadConfig, match=r"'MAXN_SUPR': did you mean 'MAXN_SUPER'\? \(modes: 7W, 15W"):
        load_profile("orin-nano-8gb").mode("MAXN_SUPR")
    with pytest.raises(BadConfig, match=r"no such file.*did you mean 'thor-t5000'"):
        load_profile("./thor-t500.yaml")
    for odd in ("", "..", "a\0b", "x" * 10_000):
        with pytest.raises(BadConfig):
            load_profile(odd)
    with pytest.raises(BadConfig):
        load_profile("./a\0b.yaml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "bandwidth_gbps",
            "bandwith_gbps",
            ("power_modes.7W.bandwith_gbps", "unknown key", "'bandwidth_gbps'"),
        ),
        ("reserve_bytes", "reserve", ("memory.reserve", "unknown key", "'reserve_bytes'")),
        ("title: ", "# ", ("title", "missing key")),
        ("  total_bytes: 7619 MiB", "", ("memory.total_bytes", "missing key")),
        (
            "total_bytes: 7619 MiB",
            "total_bytes: 7619 MB",
            ("memory.total_bytes", "7619 MiB or 8 GiB", "'7619 MB'"),
        ),
        ("total_bytes: 7619 MiB", "total_bytes: 1 MiB", ("memory", "leave nothing")),
        ("total_bytes: 7619 MiB", "total_bytes: 0", ("memory.total_bytes", ">= 1")),
        ("total_bytes: 7619 MiB", f"total_bytes: {'9' * 5000}", ()),
        ("total_bytes: 7619 MiB", f"total_bytes: {'9' * 400}", ("memory.total_bytes",)),
        ("reserve_bytes: 1600 MiB", "reserve_bytes: -1", ("memory.reserve_bytes", "-1")),
        ("unified: true", "unified: 1", ("memory.unified", "bool")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: -3", ("power_modes.7W.bandwidth_gbps", "-3")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: 0", ("power_modes.7W.bandwidth_gbps", "> 0")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: .nan", ("power_modes.7W.bandwidth_gbps", "finite")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: .inf", ("power_modes.7W.bandwidth_gbps", "finite")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: fast", ("power_modes.7W.bandwidth_gbps", "'fast'")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: true", ("power_modes.7W.bandwidth_gbps", "bool")),
        ("bandwidth_gbps: 68.3", "bandwidth_gbps: [1]", ("power_modes.7W.bandwidth_gbps", "a list of 1")),
        ("gpu_mhz: 408", "gpu_mhz: 408.5", ("power_modes.7W.gpu_mhz",)),
        ("int8: 6.68", "int88: 6.68", ("power_modes.7W.compute.int88", "'int8'")),
        ("bandwidth: 0.7", "bandwidth: 1.5", ("efficiency.bandwidth", "<= 1")),
        (
            "  bandwidth: 0.7",
            "  formats: {q8_k: 0.5}\n  bandwidth: 0.7",
            ("efficiency.formats.q8_k", "'q6_k'"),
        ),
        ("  bandwidth: 0.7", "  formats: {q6_k: 2}\n  bandwidth: 0.7", ("efficiency.formats.q6_k", "<= 1")),
        ('compute_capability: "8.7"', "compute_capability: 8.7", ("compute_capability", "put it in quotes")),
        ('compute_capability: "8.7"', "", ("compute_capability", "backend cuda")),
        ("backend: cuda", "backend: cud", ("backend", "'cud'", "'cuda'")),
        ("backend: cuda", "backend: cpu", ("backend", "no meaning")),
        ("packing: m16", "packing: m61", ("packing", "'m16'")),
        ("int2, nf4]", "int2, nf5]", ("precisions[9]", "'nf5'", "'nf4'")),
        ("int2, nf4]", "int2, fp8]", ("precisions", "fp8 needs compute capability 8.9, not 8.7")),
        ("int2, nf4]", "int2, int2]", ("precisions", "once")),
        ("aliases: []", "aliases: orin", ("aliases", "expected a list")),
        ("aliases: []", "aliases: [../x]", ("aliases[0]",)),
        ("name: orin-nano-8gb", "name: ../etc", ("name", "../etc")),
        ("default_mode: 25W", "default_mode: 25", ("default_mode", "expected `str`")),
        ("default_mode: 25W", "default_mode: 25w", ("default_mode", "'25W'")),
        ("  7W:", "  7:", ("power_modes", "key 7 is not text")),
        ("cuda:\n", "cuda: 12\nx:\n", ("x", "unknown key")),
        ("detect:\n", "detect: 5\nefficiency:\n", ("given twice",)),
        ("tpcs: 2", "tpcs: 2\n    tpcs: 3", ("line 2", "'tpcs' is given twice")),
        ("name: orin", "name: [orin", ("not valid YAML",)),
        ("name: orin-nano-8gb", "name: !!python/object:os.system x", ("not valid YAML",)),
        ("aliases: []", "aliases: &a [*a]", ("not read",)),
        ("title: NVIDIA", "title: 2024-13-45 #", ("not valid YAML",)),
        ("backend:", "memory_source: x\nbackend:", ("memory_source", "unknown key")),
        ("total_bytes: 7619 MiB", "total_bytes: 999999999 GiB", ("memory.total_bytes", "281474976710656")),
        ("bandwidth_gbps: 68.3", f"bandwidth_gbps: {'9' * 400}", ("power_modes.7W.bandwidth_gbps",)),
    ],
)
def test_bad_key_or_value(tmp_path: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    refused(edited(tmp_path, old, new), *words)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "nothing"),
        (b"- 1\n- 2\n", "a list of 2"),
        (b"just text", "'just text'"),
        (b"\x7fELF\x02\x01\xff\xfe\x00", "not UTF-8"),
        (b"a: \x00b", "not valid YAML"),
        (b"[" * 3_000, "not valid YAML"),
        (b"a: 1\n" * 20_000, "larger than 64 KiB"),
        (b"? [1, 2]\n: 3\n", "not valid YAML"),
        (b"null: 3\n", "not text"),
    ],
)
def test_bad_file(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    refused(path, word)


def test_not_a_file_and_oversized(tmp_path: Path) -> None:
    refused(tmp_path, "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")
    path = tmp_path / "big.yaml"
    path.write_text(NANO + "#" * (MAX_FILE_BYTES - len(NANO.encode()) + 1))
    refused(path, "larger than")
    path.write_text(NANO + "#" * (MAX_FILE_BYTES - len(NANO.encode())))
    assert load_profile(path).name == "orin-nano-8gb"


def test_a_new_device_is_one_file(tmp_path: Path) -> None:
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    board = NANO.replace("name: orin-nano-8gb", "name: my-board").replace("aliases: []", "aliases: [rover]")
    (tmp_path / "my-board.yaml").write_text(board)
    assert load_profile("rover", tmp_path).name == "my-board"
    assert "my-board" in {p.name for p in list_profiles(tmp_path)}


@pytest.mark.parametrize("taken", ["orin", "cpu", "auto"])
def test_one_alias_one_owner(tmp_path: Path, taken: str) -> None:
    for name in ("cpu", "orin-agx-64gb"):
        (tmp_path / f"{name}.yaml").write_text((PROFILES / f"{name}.yaml").read_text())
    (tmp_path / "zz.yaml").write_text(
        NANO.replace("name: orin-nano-8gb", "name: zz").replace("aliases: []", f"aliases: [{taken}]")
    )
    with pytest.raises(BadConfig, match=rf"zz\.yaml: aliases: '{taken}' is already taken"):
        list_profiles(tmp_path)


def test_file_name_is_the_name(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(NANO)
    with pytest.raises(BadConfig, match="must be the file's name, 'other'"):
        list_profiles(tmp_path)
