"""The fake libcuda under the real cuda-bindings: launches, streams and graphs run as late as CUDA may."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from fake_context import CAPTURE_GLOBAL, CAPTURE_RELAXED, CAPTURE_THREAD, Args, Gpu, code, cu, ok
from fake_cuda import FakeCuda

# --- launches ---


def test_launches_that_cuda_refuses(gpu: Gpu, capfd: Any) -> None:
    args = Args(gpu.array(np.zeros(64, np.float32)), 64, 1)
    assert gpu.launch("add", args, grid=(0, 1, 1)) == 1
    assert gpu.launch("add", args, grid=(1, 65536, 1)) == 1
    assert gpu.launch("add", args, threads=32) == 1
    assert "made for blocks of 64 threads" in capfd.readouterr().err
    assert gpu.launch("add", args, shared=(48 << 10) + 1) == 1
    kernel, which = gpu.kernel("add"), cu.CUfunction_attribute
    largest = which.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert code(cu.cuFuncSetAttribute(kernel, largest, (163 << 10) + 1)) == 1
    ok(cu.cuFuncSetAttribute(kernel, largest, 100 << 10))
    assert ok(cu.cuFuncGetAttribute(largest, kernel)) == 100 << 10
    assert ok(cu.cuFuncGetAttribute(which.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, kernel)) == 64
    assert gpu.launch("add", args, shared=100 << 10) == 0
    assert gpu.read(args.x, 64).sum() == 64
    ok(cu.cuModuleUnload(gpu.module))
    record = (ctypes.c_void_p * 1)(ctypes.addressof(args))
    result = cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, ctypes.addressof(record), 0)
    assert code(result) == 400


def test_what_the_emulator_finds_is_a_launch_failure(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    assert gpu.launch("half_a_block", Args(0, 0, 0)) == 0, "found when it runs"
    assert code(cu.cuCtxSynchronize()) == 719
    assert "kernel half_a_block: emulator: " in faulty_gpu.fault and "__syncthreads" in faulty_gpu.fault
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 719


def test_a_write_behind_shared_memory_is_a_launch_failure(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    assert gpu.launch("shared", Args(0, 128, 0), threads=32, shared=128) == 0
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 719
    assert "behind 128 bytes of dynamic shared memory" in faulty_gpu.fault


def test_a_record_may_come_as_one_buffer(gpu: Gpu) -> None:
    """CU_LAUNCH_PARAM_BUFFER_POINTER, as pycuda launches."""
    args = Args(gpu.array(np.zeros(64, np.float32)), 64, 3)
    size = ctypes.c_size_t(ctypes.sizeof(args))
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(args), 2, ctypes.addressof(size), 0)
    kernel, at = gpu.kernel("add"), ctypes.addressof(extra)
    ok(cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, 0, at))
    assert (gpu.read(args.x, 64) == 3).all()
    size.value = 8
    assert code(cu.cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, gpu.stream, 0, at)) == 1


# --- order ---


def test_work_runs_when_it_is_waited_for(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host, back = gpu.pinned(64), gpu.pinned(64)
    host[:], back[:] = 1, -1
    address = gpu.array(np.zeros(64, np.float32))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, gpu.stream))
    host[:] = 5  # too early: the copy has yet to read it
    assert fake_gpu.count("kernels") == 0 and (back == -1).all()
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert (back == 6).all() and fake_gpu.count("kernel add") == 1


def test_pageable_memory_is_read_at_once_and_written_after_a_wait(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host = np.ones(64, np.float32)
    address = gpu.array(np.zeros(64, np.float32))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    host[:] = 5
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    before = fake_gpu.count("syncs")
    ok(cu.cuMemcpyDtoHAsync(host.ctypes.data, address, 256, gpu.stream))
    assert (host == 2).all() and fake_gpu.count("syncs") == before + 1


def test_the_legacy_stream_does_not_wait_for_non_blocking_ones(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    blocking, back = ok(cu.cuStreamCreate(0)), np.zeros(64, np.float32)
    assert gpu.launch("add", Args(address, 64, 1)) == 0
    assert gpu.launch("add", Args(address, 64, 10), stream=blocking) == 0
    ok(cu.cuMemcpyDtoH(back.ctypes.data, address, 256))
    assert (back == 10).all()
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert (gpu.read(address, 64) == 11).all()


def test_events_order_streams_and_measure(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    other, first, last = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(0)), ok(cu.cuEventCreate(0))
    ok(cu.cuEventRecord(first, gpu.stream))
    assert gpu.launch("add", Args(address, 64, 2)) == 0
    ok(cu.cuEventRecord(last, gpu.stream))
    ok(cu.cuStreamWaitEvent(other, last, 0))
    back = gpu.pinned(64)
    back[:] = 0
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, other))
    assert code(cu.cuEventElapsedTime(first, last)) == 600
    ok(cu.cuStreamSynchronize(other))
    assert (back == 2).all()
    assert code(cu.cuEventQuery(last)) == 0 and ok(cu.cuEventElapsedTime(first, last)) >= 0
    turns = 0
    for _ in range(3):
        assert gpu.launch("add", Args(address, 64, 1)) == 0
    while code(cu.cuStreamQuery(gpu.stream)) == 600:
        turns += 1
    assert turns == 3 and (gpu.read(address, 64) == 5).all()


# --- graphs ---


def test_a_capture_runs_nothing_and_a_replay_reads_what_is_there_then(gpu: Gpu, fake_gpu: FakeCuda) -> None:
    host, back = gpu.pinned(64), gpu.pinned(64)
    host[:], back[:] = 1, -1
    address = gpu.array(np.zeros(64, np.float32))
    args = Args(address, 64, 3)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_GLOBAL)))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    assert gpu.launch("add", args) == 0
    args.by = 1000  # the record was copied
    ok(cu.cuMemcpyDtoHAsync(back.ctypes.data, address, 256, gpu.stream))
    graph = ok(cu.cuStreamEndCapture(gpu.stream))
    ok(cu.cuStreamSynchronize(gpu.stream))
    assert fake_gpu.count("kernels") == 0 and (back == -1).all()
    assert ok(cu.cuGraphGetNodes(graph))[1] == 3
    exec_graph = ok(cu.cuGraphInstantiate(graph, 0))
    ok(cu.cuGraphDestroy(graph))
    waits = fake_gpu.count("syncs")
    for turn in range(3):
        host[:] = turn
        ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
        assert fake_gpu.count("syncs") == waits + turn
        ok(cu.cuStreamSynchronize(gpu.stream))
        assert (back == turn + 3).all()
    assert fake_gpu.count("cuGraphLaunch") == 3 == fake_gpu.count("kernel add")
    assert fake_gpu.count("cuLaunchKernel") == 1
    ok(cu.cuGraphExecDestroy(exec_graph))
    assert code(cu.cuGraphLaunch(exec_graph, gpu.stream)) == 400


def captured(gpu: Gpu, args: Args, times: int = 1) -> Any:
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    for _ in range(times):
        assert gpu.launch("add", args) == 0
    return ok(cu.cuStreamEndCapture(gpu.stream))


def test_a_graph_is_updated_by_one_of_its_shape(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    exec_graph = ok(cu.cuGraphInstantiate(captured(gpu, Args(address, 64, 1)), 0))
    ok(cu.cuGraphExecUpdate(exec_graph, captured(gpu, Args(address, 64, 100))))
    assert code(cu.cuGraphExecUpdate(exec_graph, captured(gpu, Args(address, 64, 1), times=2))) == 910
    ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
    assert (gpu.read(address, 64) == 100).all()


def test_another_stream_joins_a_capture_by_an_event(gpu: Gpu) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    other, event = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(0))
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_RELAXED)))
    ok(cu.cuEventRecord(event, gpu.stream))
    ok(cu.cuStreamWaitEvent(other, event, 0))
    assert gpu.launch("add", Args(address, 64, 7), stream=other) == 0
    assert code(cu.cuStreamEndCapture(other)) == 903
    graph = ok(cu.cuStreamEndCapture(gpu.stream))
    ok(cu.cuGraphLaunch(ok(cu.cuGraphInstantiate(graph, 0)), gpu.stream))
    assert (gpu.read(address, 64) == 7).all()


@pytest.mark.parametrize("call", ["sync", "alloc", "free", "pageable", "device", "legacy copy"])
def test_what_a_capture_cannot_hold_breaks_it(gpu: Gpu, call: str) -> None:
    host = np.zeros(4, np.float32)
    address = gpu.array(host)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    found = {
        "sync": lambda: cu.cuStreamSynchronize(gpu.stream),
        "alloc": lambda: cu.cuMemAlloc(16),
        "free": lambda: cu.cuMemFree(address),
        "pageable": lambda: cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 16, gpu.stream),
        "device": lambda: cu.cuCtxSynchronize(),
        "legacy copy": lambda: cu.cuMemcpyHtoD(address, host.ctypes.data, 16),
    }[call]()
    assert code(found) == 900
    assert gpu.launch("add", Args(address, 4, 1)) == 901
    assert code(cu.cuStreamEndCapture(gpu.stream)) == 901
    assert gpu.launch("add", Args(address, 4, 1)) == 0, "the stream serves on"


def test_a_capture_of_another_thread_disturbs_nobody(gpu: Gpu) -> None:
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    found: list[int] = []

    def work() -> None:
        ok(cu.cuCtxPushCurrent(gpu.context))
        found.append(code(cu.cuMemAlloc(16)))
        found.append(code(cu.cuStreamEndCapture(gpu.stream)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, 908]
    ok(cu.cuStreamEndCapture(gpu.stream))


def test_a_graph_whose_memory_is_gone_faults(gpu: Gpu, faulty_gpu: FakeCuda) -> None:
    address = gpu.array(np.zeros(64, np.float32))
    host = gpu.pinned(64)
    ok(cu.cuStreamBeginCapture(gpu.stream, cu.CUstreamCaptureMode(CAPTURE_THREAD)))
    ok(cu.cuMemcpyHtoDAsync(address, host.ctypes.data, 256, gpu.stream))
    exec_graph = ok(cu.cuGraphInstantiate(ok(cu.cuStreamEndCapture(gpu.stream)), 0))
    ok(cu.cuMemFree(address))
    ok(cu.cuGraphLaunch(exec_graph, gpu.stream))
    assert code(cu.cuStreamSynchronize(gpu.stream)) == 700 and "where no allocation is" in faulty_gpu.fault
