"""Part `decode`: a random-weight 8B-shape Llama end to end, and where its time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
from gpu_executors import opened, step
from gpu_kernels import Copy
from gpu_models import formats_of, llama, noise, part_of, read_each_token
from gpu_report import Report
from gpu_sizes import SIZES
from gpu_timing import Job, gpu_ms, graph_of, interleaved

from edge_runtime.backends.cuda.driver import Driver, Launch
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part
from edge_runtime.engine.launches import LinearLaunch, PrepareLaunch

FLOOR_GOAL = 65.0  # % of the bandwidth floor, by the issue


def decode(report: Report) -> None:
    """Tokens a second at batch 1, first token of a prompt, time by kind of kernel, cost on the host."""
    shape = SIZES.llama
    program = llama(shape)
    weights = noise(program, formats_of(program, "int4_g64"))
    context = min(shape.context, 4096)
    part = part_of(program, weights, kv="int8", context=context, tokens=SIZES.prompt, logits=8)
    began = time.perf_counter()
    with opened(part) as ours:
        report.figure("load", time.perf_counter() - began, "s")
        with ours._driver.current:
            report.each(
                {
                    "first token": lambda: _first_token(report, ours, part),
                    "decode": lambda: _tokens(report, ours, part, "as built"),
                    "tuning": lambda: _tuning(report, ours),
                    "decode, tuned": lambda: _tokens(report, ours, part, "tuned"),
                    "host": lambda: _host(report, ours, part),
                    "kinds of a decode step": lambda: _kinds(report, ours, part, 1),
                    "kinds of a prompt": lambda: _kinds(report, ours, part, SIZES.prompt),
                },
                seconds=5,
            )


def _tuning(report: Report, ours: CudaExecutor) -> None:
    """The fastest form of each product, used from here on."""
    seen: dict[str, dict[str, float]] = {}
    began = time.perf_counter()
    tuned = ours.tune(lambda key, form, us: seen.setdefault(key, {}).update({form: us}))
    report.figure("tuning", time.perf_counter() - began, "s")
    report.put("tuning", seen)
    for key, form in tuned.forms.items():
        if key.endswith(" at 8"):
            report.note(f"{key}: {form}; us: {', '.join(f'{f} {us:.2f}' for f, us in seen[key].items())}")


def _prompt(part: Part) -> np.ndarray:
    return np.random.default_rng(1).integers(3, part.program.vocab_size, SIZES.prompt)


def _first_token(report: Report, ours: CudaExecutor, part: Part) -> None:
    ids, seen = _prompt(part), []
    batch = step(part, {0: (0, ids)}, last=True)
    began = time.perf_counter()
    ours.likeliest(batch)
    report.figure(
        f"first prompt of {len(ids)}, graph captured on the way", 1e3 * (time.perf_counter() - began), "ms"
    )
    for _ in range(SIZES.rounds):
        began = time.perf_counter()
        ours.likeliest(batch)
        seen.append(1e3 * (time.perf_counter() - began))
    ms = statistics.median(seen)
    report.figure(f"first token of a prompt of {len(ids)}", ms, "ms", spread=(min(seen), max(seen)))
    work = 2 * len(ids) * sum(s.size for s in part.program.tensors.values() if s.role == "matrix")
    report.put("prefill_tflops", work / ms / 1e9)
    report.figure(
        f"prompt of {len(ids)}: its linears' operations over the whole time", work / ms / 1e9, "TFLOP/s"
    )


def _tokens(report: Report, ours: CudaExecutor, part: Part, state: str) -> None:
    """The executor's decode, token by token and as a chain, after the prompt, beside the copy."""
    driver, block = ours._driver, Copy(ours._driver)
    count = SIZES.decoded
    steps = [step(part, {0: (SIZES.prompt + i, np.array([7]))}) for i in range(count)]
    ours.warm_up([1], [1])
    graph = ours._graphs[1, False, False] if driver.graphs else None
    seen: dict[str, list[float]] = {name: [] for name in ("copy", "step", "chain", "graph")}
    for turn in range(min(SIZES.rounds, 5) + 1):
        if turn > 2 and report.left() < 10:
            break
        if turn == 1:  # the first warms up
            seen = {name: [] for name in seen}
        seen["copy"].append(block.rate(gpu_ms(driver, block.job, 4)))
        began = time.perf_counter()
        for i, batch in enumerate(steps):
            tokens = ours.likeliest(batch)
            steps[min(i + 1, count - 1)].tokens[:] = tokens
        seen["step"].append((time.perf_counter() - began) / count)
        if graph is not None:
            seen["graph"].append(gpu_ms(driver, lambda: driver.launch_graph(graph), 16) / 1e3)
        began = time.perf_counter()
        ours.chain(steps[0], count)
        seen["chain"].append((time.perf_counter() - began) / count)
    block.release()
    rate = statistics.median(seen.pop("copy"))
    kv = sum(a.nbytes for a in ours._place.cache) * (SIZES.prompt + count // 2) / part.step.context
    nbytes = read_each_token(part) + kv
    report.put("bytes_a_token", nbytes)
    report.figure(f"decode {state}, bandwidth floor of a token", nbytes / rate * 1e6, "us")
    names = {"step": "token by token", "chain": "chained on the device", "graph": "the GPU's time alone"}
    for name, seconds in seen.items():
        if seconds:
            middle, what = statistics.median(seconds), f"decode {state}, {names[name]}"
            spread = 1 / max(seconds), 1 / min(seconds)
            report.figure(f"{what}: rate", 1 / middle, "tokens/s", spread=spread)
            goal = FLOOR_GOAL if name == "step" else None
            report.figure(f"{what}: of the floor", 100 * nbytes / rate / middle, "%", goal=goal)
            report.put(f"seconds_{name}", middle)


def _host(report: Report, ours: CudaExecutor, part: Part) -> None:
    """Python's share of a step, and what a launch in a graph costs the GPU."""
    driver, queued, waited = ours._driver, [], []
    for i in range(SIZES.decoded):
        batch = step(part, {0: (SIZES.prompt + i, np.array([7]))})
        began = time.perf_counter()
        ours._step(batch)
        middle = time.perf_counter()
        ours._finish()
        queued.append(1e6 * (middle - began))
        waited.append(1e6 * (time.perf_counter() - middle))
    report.figure("host: a step checked, staged and launched", statistics.median(queued), "us")
    report.figure("host: waiting for its answer", statistics.median(waited), "us")
    launches = ours._launches_of((1, False, False))
    report.figure("launches of a decode step", len(launches), "kernels")
    small = min(launches, key=lambda la: (la.symbol != "pick_tokens", la.symbol != "angles"))
    if driver.graphs:
        many = graph_of(driver, [small] * 200)
        found = interleaved(driver, {"small": Job(lambda: driver.launch_graph(many))}, 3, report.deadline)
        report.figure(f"a small kernel ({small.symbol}) in a graph", found["small"].ms * 5, "us")
        began = time.perf_counter()
        driver.launch_graph(many)
        report.figure("host: launch of a graph", 1e6 * (time.perf_counter() - began), "us")
        driver.synchronize()


def _kinds(report: Report, ours: CudaExecutor, part: Part, tokens: int) -> None:
    """Time of each kind of launch of a step: all of a kind in a graph of their own."""
    driver = ours._driver
    start = SIZES.prompt if tokens == 1 else 0
    ours.likeliest(step(part, {0: (start, _prompt(part)[:tokens])}, last=True))  # which stays staged
    by_kind = labelled(ours, part, tokens)
    jobs = {name: _replayed(driver, launches) for name, launches in by_kind.items()}
    jobs["whole step"] = _replayed(driver, ours._launcher.step(tokens))
    ours._launcher.overlap = False
    jobs["without overlap"] = _replayed(driver, ours._launcher.step(tokens))
    ours._launcher.overlap = True
    found = interleaved(driver, jobs, min(SIZES.rounds, 3), report.deadline - 2)
    where = f"{tokens} token{'s' * (tokens > 1)}"
    report.figure(f"{where}, whole step", found.pop("whole step").ms * 1e3, "us")
    report.figure(f"{where}, whole step without overlap", found.pop("without overlap").ms * 1e3, "us")
    for name, timed in sorted(found.items(), key=lambda item: -item[1].ms):
        report.figure(f"{where}, {len(by_kind[name])} x {name}", timed.ms * 1e3, "us")
    report.figure(f"{where}, sum of the kinds", sum(t.ms for t in found.values()) * 1e3, "us")
    # What was multiplied on its own may have overflowed: the next step begins anew
    ours._driver.fill(ours._place.region("answer"), 4)
    ours._driver.fill(ours._place.region("buffers"), ours._place.regions["buffers"])


def _replayed(driver: Driver, launches: Sequence[Launch]) -> Job:
    graph = graph_of(driver, launches)
    return Job(lambda: driver.launch_graph(graph))


def labelled(ours: CudaExecutor, part: Part, tokens: int) -> dict[str, list[Launch]]:
    """Launches of a step by kind, those of linears with their shapes."""
    launcher, lowered, found = ours._launcher, ours._lowered, {}
    rows = min(part.step.logits, tokens)
    for launch in lowered.launches:
        for kernel, grid, record in launcher._of(launch, tokens, rows):
            name = kernel.symbol
            if isinstance(launch, LinearLaunch):
                height = sum(part.weights[p.weight].rows for p in launch.products)
                name = f"{name} {height}x{launch.cols}"
            elif isinstance(launch, PrepareLaunch):
                name = f"{name} {launch.width}"
            found.setdefault(name, []).append(launcher._prepare(kernel, grid, record))
    whole = launcher.step(tokens)
    known = sum(map(len, found.values()))
    for launch in whole[known:]:
        found.setdefault(launch.symbol, []).append(launch)
    return found
