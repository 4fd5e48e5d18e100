"""What goes wrong on a GPU is a typed error that names both sides, and leaves nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from device_programs import Loader, equal, ids, model, opened, ready, rows_part, step
from emulated_parts import load
from fake_cuda import FakeCuda, environment

from edge_runtime.backends.cuda import bindings_driver, pycuda_driver
from edge_runtime.backends.cuda.backend import BACKEND, CudaBackend
from edge_runtime.backends.protocol import DeviceCode, PackedTensor, Part
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.memory import buffers_nbytes, weights_nbytes
from edge_runtime.engine.ops import Gather, Linear
from edge_runtime.engine.plan import TensorPlan
from edge_runtime.errors import (
    BackendUnavailable,
    BadEngineFile,
    DeviceMismatch,
    DoesNotFit,
    EdgeError,
    Unsupported,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Iterator[Loader]:
    """Loads a part on the fake GPU; at the end nothing of it is left there."""
    yield lambda part: load(ready(part, tmp_path))
    gc.collect()
    assert fake_gpu.used == 0 and fake_gpu.count("leaked allocations") == 0


GOOD = step((0, 0, ids(12)), (1, 3, ids(5, 6)))


# --- memory ------------------------------------------------------------------------------------------------


class Untouchable(Mapping[str, Any]):
    """Planes that must not be looked at."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"plane {name!r} was read")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("planes were read")

    def __len__(self) -> int:
        raise AssertionError("planes were counted")


def untouchable(part: Part) -> Part:
    def hidden(t: PackedTensor) -> PackedTensor:
        return replace(t, planes=Untouchable())

    return replace(part, weights={name: hidden(t) for name, t in part.weights.items()})


def planned(part: Part) -> tuple[int, int]:
    """Bytes of weights, and of all else, as the planner adds them up."""
    tensors = {name: TensorPlan(t.format, t.packing) for name, t in part.weights.items()}
    rest = buffers_nbytes(part.program, part.kv, part.step, threads=0, backend="cuda")
    return weights_nbytes(part.program, tensors), cache_nbytes(part.program, part.kv, part.step) + rest


PARTS: list[Callable[[], Part]] = [
    lambda: model("int4_g64", kv="int8"),
    lambda: model("nf4_g64_dq", kv="int4,fp8", head_dim=32, tied=True, page_tokens=32),
    lambda: model("bf16", kv="f16", layers=1, tokens=1, pages=3),
    lambda: rows_part(
        [Linear(x="x", out="y", weight="w")],
        {"x": 7, "y": 5},
        {"w": ("f16", np.ones((5, 7), np.float32))},
        {},
    ),
]


@pytest.mark.parametrize("make", PARTS)
def test_memory_is_what_the_planner_says(
    on_gpu: Loader,
    fake_gpu: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[], Part],
) -> None:
    """To the byte: with so many bytes free it loads, with one fewer it does not, and no plane is read."""
    part = make()
    packed = replace(
        part,
        weights={
            n: replace(t, packing="m16" if part.program.tensors[n].role != "vector" else "rows")
            for n, t in part.weights.items()
        },
    )
    weights, rest = planned(packed)
    with opened(on_gpu(part)) as executor:
        assert executor.memory_bytes == rest
        assert fake_gpu.used == weights + rest
    assert executor.memory_bytes == 0 == fake_gpu.used
    backend = CudaBackend()
    free, source = backend.memory()
    assert source == "free memory of the CUDA driver"
    backend.load(ready(part, tmp_path)).close()
    taken = (1 << 30) - free  # by the context
    monkeypatch.setenv("EDGE_FAKE_MEMORY", str(taken + weights + rest))
    with opened(on_gpu(part)):
        pass
    monkeypatch.setenv("EDGE_FAKE_MEMORY", str(taken + weights + rest - 1))
    with pytest.raises(DoesNotFit, match=f"needs {weights + rest} bytes of GPU memory") as caught:
        on_gpu(untouchable(part))
    assert (caught.value.need, caught.value.have) == (weights + rest, weights + rest - 1)
    monkeypatch.setenv("EDGE_FAKE_MEMORY", str(1 << 30))
    with pytest.raises(AssertionError, match="was read"):  # or this shows nothing
        on_gpu(untouchable(part))


def test_memory_in_blocks(on_gpu: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver refuses a large block the arena comes in several, with the same numbers."""
    part = model("int4_g64", kv="int8")
    with opened(on_gpu(part)) as executor:
        want = executor.forward(GOOD).copy()
    monkeypatch.setenv("EDGE_FAKE_LARGEST", str(100 << 10))
    with opened(on_gpu(part)) as executor:
        assert executor._place.blocks > 2
        assert equal(executor.forward(GOOD), want)


LOADING = ("cuMemAlloc", "cuModuleLoadData", "cuMemHostRegister", "cuModuleGetFunction", "cuStreamCreate")
LOADING += ("cuMemcpyHtoDAsync", "cuMemsetD8Async")


@pytest.mark.parametrize("function", LOADING)
@pytest.mark.parametrize("nth", [1, 3])
def test_a_load_that_fails_leaves_nothing(
    on_gpu: Loader, fake_gpu: FakeCuda, function: str, nth: int
) -> None:
    part = model("f16", kv="f16", layers=1)
    code = 801 if function == "cuModuleGetFunction" else 2
    fake_gpu.fail(f"{function}:{nth}:{code}")
    try:
        executor = on_gpu(part)
    except EdgeError as error:
        assert "CUDA_ERROR" in str(error)
        assert isinstance(error, DoesNotFit) == (code == 2)
    else:  # called less often than that, or there was another way
        executor.close()
    assert fake_gpu.used == 0
    fake_gpu.fail("")
    with opened(on_gpu(part)) as executor:
        executor.forward(GOOD)


# --- wrong machines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"CC": "9.0", "NAME": "H200"}, r"on H200 \(sm_90, driver for CUDA 12\.6\): cubin is for sm_87"),
        ({"CC": "8.6"}, r"on Fake GPU \(sm_86.*cubin is for sm_87"),
        ({"DRIVER": "11080"}, r"sm_87 is of CUDA 12\.6, the driver is for CUDA 11\.8; update"),
    ],
)  # fmt: skip
def test_another_gpu_or_driver(
    on_gpu: Loader, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
) -> None:
    """Before a context is made and any plane or blob is read."""
    for name, value in settings.items():
        monkeypatch.setenv(f"EDGE_FAKE_{name}", value)
    with pytest.raises(DeviceMismatch, match=says):
        on_gpu(untouchable(model()))
    assert fake_gpu.count("cuDevicePrimaryCtxRetain") == 0 == fake_gpu.count("cuModuleLoadData")


def test_no_gpu(on_gpu: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FAKE_DEVICES", "0")
    answer = BACKEND.available()
    assert not answer.ok and "CUDA_ERROR_NO_DEVICE" in answer.why and "no GPU is visible" in answer.why
    with pytest.raises(BackendUnavailable, match="no GPU is visible"):
        on_gpu(untouchable(model()))


def test_no_device_code(fake_gpu: FakeCuda) -> None:
    with pytest.raises(Unsupported, match="the engine has no device code; build it with a cuda profile"):
        load(untouchable(model()))


def test_kernels_that_are_missing_are_named(fake_gpu: FakeCuda, tmp_path: Path) -> None:
    part = ready(model(kv="int8"), tmp_path)
    assert part.code is not None
    (entry,) = part.code.entries
    kernels = {k: v for k, v in entry.kernels.items() if k != "rope_append_int8_int8_32"}
    fewer = DeviceCode((msgspec.structs.replace(entry, kernels=kernels),), part.code.read)
    says = r"no kernel 'rope_append_int8_int8_32': .* K,V = int8,int8 .* build it again with --kv int8,int8"
    with pytest.raises(Unsupported, match=says):
        load(untouchable(replace(part, code=fewer)))
    assert fake_gpu.count("cuDevicePrimaryCtxRetain") == 0
    # An entry that names what the code does not hold
    kernels = {**entry.kernels, "absent": entry.kernels["add"]}
    more = DeviceCode((msgspec.structs.replace(entry, kernels=kernels),), part.code.read)
    with opened(load(replace(part, code=more))) as executor:
        executor.forward(GOOD)


def test_device_code_that_is_none(fake_gpu: FakeCuda, tmp_path: Path) -> None:
    part = ready(model(), tmp_path)
    assert part.code is not None
    for image in (b"no code at all", bytes(part.code.read(part.code.entries[0].blob))[:-8]):
        broken = DeviceCode(part.code.entries, lambda name, image=image: memoryview(image))
        with pytest.raises((DeviceMismatch, BadEngineFile, BackendUnavailable), match="CUDA_ERROR"):
            load(replace(part, code=broken))
        assert fake_gpu.used == 0


WITHOUT = """
from edge_runtime.backends.cuda.backend import BACKEND
from edge_runtime.errors import BackendUnavailable
answer = BACKEND.available()
assert not answer.ok, answer
print(answer.why)
try:
    BACKEND.memory()
except BackendUnavailable as error:
    print(error)
"""


def test_no_libcuda(tmp_path: Path) -> None:
    """In a process of its own, where a libcuda.so.1 that is none comes first."""
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    path = {**environment(), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=path, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("libcuda" in line and "pip install" in line for line in lines)


def test_no_cuda_bindings_and_no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings_driver, "installed", lambda: False)
    monkeypatch.setattr(pycuda_driver, "installed", lambda: False)
    answer = CudaBackend().available()
    assert not answer.ok and "neither cuda-bindings nor pycuda is installed: pip install" in answer.why


# --- weights that are not the program's --------------------------------------------------------------------


def test_planes_that_do_not_fit(on_gpu: Loader, fake_gpu: FakeCuda) -> None:
    part = model("int4_g64", kv="int8", layers=1)

    def with_tensor(**changes: Any) -> Part:
        return replace(part, weights={**part.weights, "0.q": replace(part.weights["0.q"], **changes)})

    planes = dict(part.weights["0.q"].planes)
    for bad, says in (
        (with_tensor(rows=64), "'0.q' is 64x72, its program says 128x72"),
        (with_tensor(planes={"q": planes["q"]}), "plane 'scale' is missing, expected"),
        (with_tensor(planes=planes | {"q": planes["q"][:-1]}), r"plane 'q' is uint8 \(\d+,\), expected"),
        (with_tensor(planes=planes | {"scale": planes["scale"].view("u2")}), "plane 'scale' is uint16"),
    ):
        with pytest.raises(BadEngineFile, match=says):
            on_gpu(bad)
        assert fake_gpu.used == 0


@pytest.mark.parametrize(("bad", "said"), [(37.0, "37.0"), (-1.0, "-1.0"), (2.5, "2.5"), (np.nan, "nan")])
def test_an_order_out_of_range(on_gpu: Loader, bad: float, said: str) -> None:
    order = np.arange(20.0)
    order[11] = bad
    part = rows_part([Gather(x="x", out="y", order="o")], {"x": 37, "y": 20}, {}, {"o": np.zeros(20)})
    spoiled = replace(part.weights["o"], planes={"w": order.astype(np.float32)})
    message = f"tensor 'o' names column {said} at place 11, expected whole numbers below 37"
    with pytest.raises(BadEngineFile, match=message):
        on_gpu(replace(part, weights={**part.weights, "o": spoiled}))
