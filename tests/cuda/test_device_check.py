"""What is decided without a GPU: which device code runs, what a result code means, arrays of others."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends.cuda.current import CurrentContext
from edge_runtime.backends.cuda.device_array import DeviceArray, as_address
from edge_runtime.backends.cuda.device_check import check_device
from edge_runtime.backends.cuda.driver import DeviceFacts, open_driver
from edge_runtime.backends.cuda.failures import failure, is_lost
from edge_runtime.backends.cuda.pycuda_driver import code_of
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry
from edge_runtime.engine.probe import newest_ptx
from edge_runtime.errors import (
    BackendUnavailable,
    BadConfig,
    BadEngineFile,
    BadRequest,
    DeviceMismatch,
    DoesNotFit,
    EdgeError,
)


def gpu(capability: str = "8.7", driver: str = "12.6", integrated: bool = True) -> DeviceFacts:
    return DeviceFacts(
        name="Orin",
        compute_capability=capability,
        driver=driver,
        total_bytes=8 << 30,
        integrated=integrated,
        multiprocessors=8,
        shared_bytes=163840,
        l2_bytes=4 << 20,
        api="test",
    )


def code(kind: Any, sm: int, cuda: str = "12.6", ptx: str = "8.5") -> DeviceCodeEntry:
    kernels = {"k": KernelEntry(threads=32, shared_bytes=0)}
    return DeviceCodeEntry(
        blob=f"{kind}{sm}", kind=kind, sm=sm, ptx=ptx, cuda=cuda, nbytes=8, kernels=kernels
    )


@pytest.mark.parametrize(
    ("facts", "entries", "chosen"),
    [
        (gpu(), [code("ptx", 87), code("cubin", 87)], "cubin87"),
        (gpu("8.9"), [code("cubin", 86), code("ptx", 86)], "cubin86"),  # a later minor of the same major
        (gpu("8.6"), [code("cubin", 86), code("cubin", 80), code("ptx", 80)], "cubin86"),
        (gpu(), [code("cubin", 86), code("ptx", 86)], "ptx86"),  # cubins of desktops and Jetsons differ
        (gpu("8.9"), [code("cubin", 87), code("ptx", 87)], "ptx87"),
        (gpu("9.0"), [code("cubin", 87), code("ptx", 80), code("ptx", 87)], "ptx87"),
        (gpu("12.0", "12.8"), [code("cubin", 87), code("ptx", 87)], "ptx87"),
        (gpu("12.1", "13.0"), [code("cubin", 120), code("ptx", 120)], "cubin120"),
        (gpu(driver="13.2"), [code("cubin", 87)], "cubin87"),  # a newer driver runs older cubins
        (gpu(driver="12.2"), [code("cubin", 87), code("ptx", 87)], "cubin87"),  # within a major release
    ],
)
def test_the_best_device_code_is_chosen(
    facts: DeviceFacts, entries: list[DeviceCodeEntry], chosen: str
) -> None:
    assert check_device(facts, entries).blob == chosen
    assert check_device(facts, entries[::-1]).blob == chosen


@pytest.mark.parametrize(
    ("facts", "entries", "says"),
    [
        (
            gpu(),
            [code("cubin", 90), code("ptx", 90)],
            r"cubin is for sm_90; ptx is for sm_90 and later; build",
        ),
        (gpu("8.6"), [code("cubin", 89)], r"Orin \(sm_86, driver for CUDA 12\.6\): cubin is for sm_89"),
        (
            gpu(driver="12.6"),
            [code("cubin", 87, "13.0", "9.0"), code("ptx", 87, "13.0", "9.0")],
            r"cubin for sm_87 is of CUDA 13\.0, the driver is for CUDA 12\.6; ptx for sm_87 is of ISA 9\.0 "
            r"\(CUDA 13\.0\), the driver knows 8\.5; update the GPU's driver, or build",
        ),
        (gpu("8.9", "12.2"), [code("ptx", 80)], r"ISA 8\.5 .CUDA 12\.6., the driver knows 8\.2; update"),
        (gpu(driver="10.2"), [code("ptx", 87)], r"the driver knows older"),
        (gpu(), [], "it holds none; build the engine for this machine"),
    ],
)
def test_what_does_not_run_is_refused_naming_both_sides(
    facts: DeviceFacts, entries: list[DeviceCodeEntry], says: str
) -> None:
    with pytest.raises(DeviceMismatch, match=says):
        check_device(facts, entries)


@pytest.mark.parametrize(
    ("release", "isa"),
    [("11.4", "7.4"), ("12.0", "8.0"), ("12.5", "8.5"), ("12.6", "8.5"), ("12.8", "8.7"), ("13.0", "9.0")],
)
def test_newest_ptx_of_a_driver(release: str, isa: str) -> None:
    assert newest_ptx(release) == isa
    assert newest_ptx("10.2") is None


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (
            2,
            DoesNotFit,
            r"CUDA_ERROR_X while loading it: the GPU has not the 4096 bytes of 7 free \(the test\)",
        ),
        (100, BackendUnavailable, "CUDA_ERROR_X while loading it: no GPU is visible"),
        (101, BackendUnavailable, "no GPU of that number"),
        (200, DeviceMismatch, "the engine's device code for sm_90 does not run on Orin"),
        (209, DeviceMismatch, "CUDA_ERROR_X while loading it: .*build the engine for this machine"),
        (218, DeviceMismatch, "sm_90"),
        (222, DeviceMismatch, "sm_90"),
        (500, BadEngineFile, "CUDA_ERROR_X while loading it"),
        (700, BackendUnavailable, "the CUDA context is lost; close the engine and open it again"),
        (719, BackendUnavailable, "the CUDA context is lost"),
        (1, BackendUnavailable, "CUDA_ERROR_X while loading it"),
        (803, BackendUnavailable, "different releases"),
    ],
)
def test_each_result_code_becomes_an_error_with_its_name(
    number: int, kind: type[EdgeError], says: str
) -> None:
    error = failure(
        number,
        "CUDA_ERROR_X",
        "loading it",
        need=4096,
        have=7,
        source="the test",
        device="Orin",
        code_for="sm_90",
    )
    assert type(error) is kind
    with pytest.raises(kind, match=says):
        raise error
    if isinstance(error, DoesNotFit):
        assert (error.need, error.have, error.source) == (4096, 7, "the test")


def test_only_errors_that_end_a_context_do() -> None:
    assert all(map(is_lost, (700, 719, 709, 4))) and not any(map(is_lost, (1, 2, 209, 500, 701)))


def test_pycuda_says_a_code_by_its_description() -> None:
    codes = {"out of memory": 2, "invalid argument": 1, "invalid argument of sorts": 7}
    assert code_of("cuMemAlloc failed: out of memory", codes) == 2
    assert code_of("cuModuleLoadDataEx failed: invalid argument - a log", codes) == 1
    assert code_of("x failed: invalid argument of sorts - a log", codes) == 7
    assert code_of("x failed: invalid argument of", codes) == 0 == code_of("cannot pop", codes)


class Foreign:
    def __init__(self, face: Any) -> None:
        self.__cuda_array_interface__ = face


FACE = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3}


def test_a_device_array_is_read_by_its_own_rule() -> None:
    keep = object()
    made = DeviceArray(4096, (2, 3), np.dtype(np.float32), owner=keep, stream=17)
    face = made.__cuda_array_interface__
    assert face["version"] == 3 and face["stream"] == 17 and face["strides"] is None and made.nbytes == 24
    assert as_address(made, (2, 3), np.float32) == 4096 and made.owner is keep
    assert DeviceArray(4096, (0, 3), np.dtype("i4")).__cuda_array_interface__["data"] == (0, False)


@pytest.mark.parametrize("strides", [None, (12, 4)])
def test_arrays_of_others_are_taken(strides: tuple[int, ...] | None) -> None:
    assert as_address(Foreign({**FACE, "strides": strides}), (2, 3), "<f4") == 4096


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(3), "a ndarray is no array in device memory"),
        (Foreign({**FACE, "strides": (4, 8)}), "strides .4, 8.; make it contiguous"),
        (Foreign({**FACE, "mask": np.zeros(1)}), "mask"),
        (Foreign({**FACE, "shape": (3, 2)}), "shape .3, 2., expected .2, 3."),
        (Foreign({**FACE, "typestr": "<f2"}), "dtype float16, expected float32"),
        (Foreign({"shape": (2, 3)}), "lacks data, typestr"),
    ],
)
def test_arrays_that_are_not_what_is_wanted(array: object, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        as_address(array, (2, 3), np.float32)


def test_a_context_is_current_once_in_each_thread_and_left_as_it_was() -> None:
    calls: list[tuple[str, int]] = []
    here = threading.get_ident
    current = CurrentContext(lambda: calls.append(("push", here())), lambda: calls.append(("pop", here())))
    with current:
        thread = threading.Thread(target=lambda: current.__enter__())
        thread.start()
        thread.join()
        with current:
            assert current.depth == 2
    assert [c[0] for c in calls] == ["push", "push", "pop"] and calls[0][1] == calls[2][1] != calls[1][1]
    with pytest.raises(KeyError), current:
        raise KeyError
    assert current.depth == 0 and [c[0] for c in calls] == ["push", "push", "pop", "push", "pop"]


def test_a_push_that_fails_leaves_nothing_to_pop() -> None:
    def fail() -> None:
        raise BackendUnavailable("no")

    current = CurrentContext(fail, lambda: pytest.fail("popped"))
    with pytest.raises(BackendUnavailable), current:
        pass
    assert current.depth == 0


def test_a_pycuda_without_what_is_needed_is_said_to_be_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("pycuda.driver")
    old.Device = type("Device", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", old)
    with pytest.raises(BackendUnavailable, match=r"Device has no retain_primary_context; build pycuda 2024"):
        open_driver("pycuda")


def test_an_unknown_api_is_named() -> None:
    with pytest.raises(BadConfig, match=r"unknown CUDA driver API 'cupy'; .*cuda-bindings"):
        open_driver("cupy")
