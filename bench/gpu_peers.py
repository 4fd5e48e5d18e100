"""Part `peers`: torch on the same GPU in the same run: its bf16 matrix rate, bf16 and int4 linears."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from gpu_code import EMULATED
from gpu_report import Report
from gpu_sizes import SIZES

GROUP = 64


def peers(report: Report) -> None:
    """Nothing where torch is not installed or does not see the GPU."""
    if EMULATED:
        report.note("not run: torch does not see the fake GPU")
        return
    try:
        import torch
    except ImportError:
        report.note("not run: torch is not installed")
        return
    if not torch.cuda.is_available():
        report.note("not run: torch does not see the GPU")
        return
    report.note(f"torch {torch.__version__}")
    report.put("matrices", {})
    jobs: dict[str, Callable[[], None]] = {"bf16 matrix rate": lambda: _rate(report, torch)}
    for rows, cols in SIZES.matrices:
        jobs[f"bf16 {rows}x{cols}"] = lambda r=rows, c=cols: _linear(report, torch, r, c)
    jobs["int4 weight-only"] = lambda: _int4(report, torch)
    jobs["bf16 layers of the Llama"] = lambda: _layers(report, torch)
    jobs["compiled bf16"] = lambda: _compiled(report, torch)
    report.each(jobs, seconds=6, ours=False)


def _time(torch: Any, job: Callable[[], None], rounds: int = 7, repeats: int = 5) -> float:
    """Milliseconds: median of rounds by CUDA events, warm."""
    torch.cuda.empty_cache()  # of the piece before
    for _ in range(2):
        job()
    seen = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            job()
        last.record()
        last.synchronize()
        seen.append(first.elapsed_time(last) / repeats)
    return statistics.median(seen)


def _graph(torch: Any, job: Callable[[], None]) -> Callable[[], None]:
    """The job as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay  # type: ignore[no-any-return]


def _random(torch: Any, *shape: int) -> Any:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def _rate(report: Report, torch: Any) -> None:
    """The yardstick of matrix-bound work: products of random bf16 matrices; the greatest of three sizes."""
    best = 0.0
    for size in (4096, 8192):
        a, b = _random(torch, size, size), _random(torch, size, size)
        out = torch.empty_like(a)
        ms = _time(torch, lambda a=a, b=b, out=out: torch.matmul(a, b, out=out), repeats=10)
        rate = 2 * size**3 / ms / 1e9
        report.figure(f"bf16 {size}^3 by torch.matmul", rate, "TFLOP/s")
        best = max(best, rate)
        if size == 4096:
            report.put("bf16_tflops", rate)
    report.put("bf16_tflops_best", best)


def _linear(report: Report, torch: Any, rows: int, cols: int) -> None:
    """bf16 by cuBLAS, copies beyond the L2, one graph; one token and a prompt."""
    count = max(2, min(64, SIZES.working_set // (2 * rows * cols)))
    weights = [_random(torch, rows, cols) for _ in range(count)]
    for tokens in (1, SIZES.prompt):
        x, few = _random(torch, tokens, cols), weights if tokens == 1 else weights[:4]
        out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)

        def job(x: Any = x, few: Any = few, out: Any = out) -> None:
            for w in few:
                torch.matmul(x, w.t(), out=out)

        us = _time(torch, _graph(torch, job)) * 1e3 / len(few)
        report.put("matrices", report.found["matrices"] | {f"bf16 {rows}x{cols} {tokens}": us})
        report.figure(f"torch bf16 {rows}x{cols}, {tokens} token{'s' * (tokens > 1)}", us, "us")


def _int4(report: Report, torch: Any) -> None:
    """torch's own int4 weight-only product (tinygemm, groups of 64), where this release has it."""
    for rows, cols in SIZES.goal_matrices:
        codes = torch.randint(0, 255, (rows, cols // 2), device="cuda", dtype=torch.uint8)
        count = max(2, min(64, 2 * SIZES.working_set // (rows * cols)))
        packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(count)]
        scales = _random(torch, cols // GROUP, rows, 2).contiguous()
        x = _random(torch, 1, cols)

        def job(x: Any = x, packed: Any = packed, scales: Any = scales) -> None:
            for w in packed:
                torch.ops.aten._weight_int4pack_mm(x, w, GROUP, scales)

        us = _time(torch, _graph(torch, job)) * 1e3 / count
        report.put("matrices", report.found["matrices"] | {f"int4 {rows}x{cols} 1": us})
        report.figure(f"torch int4 weight-only {rows}x{cols}, 1 token", us, "us")


def _weights(torch: Any) -> list[Any]:
    """The matrices that the Llama's decode reads, in its order: shapes as its launches have them."""
    shape = SIZES.llama
    found = [_random(torch, r, c) for _ in range(shape.layers) for r, c in shape.matrices]
    return [*found, _random(torch, shape.vocab, shape.hidden)]


def _layers(report: Report, torch: Any) -> None:
    """A decode step's linears alone, in bf16, as one graph: what a whole step of ours is compared with."""
    weights = _weights(torch)
    inputs = {c: _random(torch, 1, c) for c in {w.shape[1] for w in weights}}

    def job() -> None:
        for w in weights:
            torch.matmul(inputs[w.shape[1]], w.t())

    ms = _time(torch, _graph(torch, job), rounds=5, repeats=3)
    report.put("seconds_bf16_linears", ms / 1e3)
    report.figure("torch bf16, all linears of a decoded token, one graph", ms * 1e3, "us")


def _compiled(report: Report, torch: Any) -> None:
    """The same through torch.compile, a layer compiled once and a graph around all of them."""
    shape = SIZES.llama
    weights = _weights(torch)
    groups = [weights[i : i + 4] for i in range(0, 4 * shape.layers, 4)]

    def layer(x: Any, qkv: Any, o: Any, gate_up: Any, down: Any) -> Any:
        h = torch.nn.functional.linear(x, qkv)[..., : shape.hidden]
        x = x + torch.nn.functional.linear(h, o)
        gate, up = torch.nn.functional.linear(x, gate_up).chunk(2, -1)
        return x + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)

    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    x = _random(torch, 1, shape.hidden)
    with torch.no_grad():
        compiled(x, *groups[0])

        def job() -> None:
            y = x
            for group in groups:
                y = compiled(y, *group)
            torch.matmul(y, weights[-1].t())

        ms = _time(torch, _graph(torch, job), rounds=5, repeats=3)
    report.put("seconds_bf16_compiled", ms / 1e3)
    report.figure("torch.compile bf16, all linears of a decoded token, one graph", ms * 1e3, "us")
