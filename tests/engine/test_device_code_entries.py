"""Device code in a manifest: it comes back as it was written, and what contradicts itself is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from device_engine import CODE, CUBIN, ENTRIES, KERNELS, PTX, write_device_toy
from forged_file import rewrite
from toy_engine import write_toy

from edge_runtime.engine.file import read_engine
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry, Manifest
from edge_runtime.engine.proof import MAX_DEVICE_CODE, MAX_KERNELS, check_manifest
from edge_runtime.errors import BadEngineFile

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_device_toy(tmp_path_factory.mktemp("device") / "m.edge")


def test_code_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_device_toy(tmp_path / "m.edge")
    with read_engine(tmp_path / "m.edge") as engine:
        assert engine.manifest == written and engine.manifest.device_code == ENTRIES
        assert {name: bytes(engine.blob(name)) for name in CODE} == CODE
    write_toy(tmp_path / "cpu.edge")
    assert read_engine(tmp_path / "cpu.edge").manifest.device_code == ()


def test_a_cuda_engine_may_be_without(tmp_path: Path) -> None:
    write_device_toy(tmp_path / "m.edge", ())
    assert read_engine(tmp_path / "m.edge").manifest.device_code == ()


def kernel(of: str = "norm_256", **changes: object) -> tuple[DeviceCodeEntry, ...]:
    kernels = KERNELS | {of: replace(KERNELS[of], **changes)}
    return (replace(ENTRIES[0], kernels=kernels), ENTRIES[1])


def cubin(**changes: object) -> tuple[DeviceCodeEntry, ...]:
    return (replace(ENTRIES[0], **changes), ENTRIES[1])


PLAIN = KernelEntry(threads=1, shared_bytes=0)
REFUSED: dict[str, tuple[tuple[DeviceCodeEntry, ...], str]] = {
    "a blob twice": ((ENTRIES[0], ENTRIES[0]), f"device code '{CUBIN}': it is named twice"),
    "no such blob": (cubin(blob="device.sm_88.cubin"), f"no such blob; did you mean '{CUBIN}'"),
    "another size": (cubin(nbytes=9), f"it is said to have 9 bytes, the blob has {len(CODE[CUBIN])}"),
    "no sm": (cubin(sm=0), "sm is 0, expected 10 to 999"),
    "huge sm": (cubin(sm=1 << 40), "expected 10 to 999"),
    "no kernels": (cubin(kernels={}), f"0 kernels, expected 1 to {MAX_KERNELS}"),
    "a lot of kernels": (
        cubin(kernels={f"k{i}": PLAIN for i in range(MAX_KERNELS + 1)}),
        f"{MAX_KERNELS + 1} kernels, expected",
    ),
    "no threads": (kernel(threads=0), "threads of norm_256 is 0, expected 1 to"),
    "negative registers": (kernel(registers=-1), "registers of norm_256 is -1, expected 0 to"),
    "huge spills": (kernel(spill_loads=1 << 50), "spill_loads of norm_256 is"),
    "a cubin without registers": (kernel(registers=None), "of cubins, and of all of them"),
    "a cubin without spills": (kernel("linear_tile", spill_stores=None), "linear_tile: registers, stack"),
    "PTX with registers": ((ENTRIES[0], replace(ENTRIES[1], kernels=KERNELS)), "of cubins, and of all"),
    "too many blobs": (
        (ENTRIES[0],) * (MAX_DEVICE_CODE + 1),
        f"{MAX_DEVICE_CODE + 1} blobs of device code, expected at most {MAX_DEVICE_CODE}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_entries_that_cannot_be_are_refused(manifest: Manifest, case: str) -> None:
    entries, message = REFUSED[case]
    check_manifest(manifest)
    with pytest.raises(BadEngineFile) as found:
        check_manifest(replace(manifest, device_code=entries))
    assert message in str(found.value)


def test_code_is_for_cuda_and_within_the_plan(manifest: Manifest) -> None:
    with pytest.raises(BadEngineFile, match="device code in an engine for backend 'cpu'"):
        check_manifest(replace(manifest, fingerprint=replace(manifest.fingerprint, backend="cpu")))
    language = manifest.parts["language"]
    total = max(len(code) for name, code in CODE.items() if name.endswith(".cubin"))
    for room in (total, total - 1):
        memory = replace(language.plan.memory, device_code=room)
        parts = {"language": replace(language, plan=replace(language.plan, memory=memory))}
        if room == total:
            check_manifest(replace(manifest, parts=parts))
        else:
            with pytest.raises(BadEngineFile, match=f"says {room} bytes of device code, it takes {total}"):
                check_manifest(replace(manifest, parts=parts))


FORGED: dict[str, tuple[Callable[[str], str], str]] = {
    "unknown kind": (lambda t: t.replace('"kind":"ptx"', '"kind":"elf"'), "Invalid enum value 'elf'"),
    "unknown field": (lambda t: t.replace('"kind":"ptx"', '"kind":"ptx","x":1'), "unknown field `x`"),
    "odd symbol": (lambda t: t.replace('"norm_256"', '"norm-256"'), "matching regex"),
    "odd release": (lambda t: t.replace('"cuda":"12.6"', '"cuda":"12.6;"'), "matching regex"),
    "text for a number": (lambda t: t.replace('"sm":87', '"sm":"87"'), "Expected `int`"),
    "a missing field": (lambda t: t.replace('"sm":87,', ""), "missing required field `sm`"),
    "a kernel twice": (
        lambda t: t.replace('"kernels":{', '"kernels":{"norm_256":{"threads":1,"shared_bytes":0},', 1),
        "not what its manifest asks for",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_text_is_refused(tmp_path: Path, case: str) -> None:
    change, message = FORGED[case]
    write_device_toy(tmp_path / "m.edge")
    rewrite(tmp_path / "m.edge", change)
    with pytest.raises(BadEngineFile) as found:
        read_engine(tmp_path / "m.edge")
    assert message in str(found.value)


def test_damaged_code_is_found(tmp_path: Path) -> None:
    write_device_toy(tmp_path / "m.edge")
    raw = bytearray((tmp_path / "m.edge").read_bytes())
    raw[raw.rindex(CODE[PTX])] ^= 1
    (tmp_path / "m.edge").write_bytes(raw)
    with pytest.raises(BadEngineFile, match=f"blob/{PTX}' does not match its digest"):
        read_engine(tmp_path / "m.edge")
