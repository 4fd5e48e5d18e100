"""Decode and prefill of a 1.1B-shape Llama at int4_g64 beside llama.cpp's Q4_0, interleaved in one run.

    python bench/decode_llama_1b.py [--shape llama-1.1b] [--rounds 7] [--threads 2] [--work build/bench]

Prints medians and the ratio, and writes bench/results/<machine>-<date>-decode-<shape>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor
from random_llama import SHAPES, Shape, write_folder, write_gguf

from edge_runtime.backends.protocol import Executor, Part, StepBatch

ROOT = Path(__file__).resolve().parent.parent
DECODE_TOKENS = 32
PREFILLS = (128, 512)


class Ours:
    """The cpu backend, driven below the session so that both sides do the same work."""

    def __init__(self, engine_path: Path, threads: int) -> None:
        from edge_runtime.backends.cpu import BACKEND
        from edge_runtime.engine.file import read_engine

        self.engine = read_engine(engine_path, verify=False)
        entry = self.engine.part("language")
        self.step, self.kv = entry.plan.step, entry.plan.kv
        part = Part(entry.program, entry.weights, entry.plan.kv, entry.plan.step)
        self.executor: Executor = BACKEND.load(part, threads=threads)
        self.table = np.arange(self.kv.pages, dtype=np.int32)[None, :]

    def run(self, ids: list[int], start: int) -> None:
        for at in range(0, len(ids), self.step.tokens):
            chunk = ids[at : at + self.step.tokens]
            n = len(chunk)
            self.executor.forward(
                StepBatch(
                    tokens=np.array(chunk, np.int32),
                    positions=np.arange(start + at, start + at + n, dtype=np.int32),
                    sequence=np.zeros(n, np.int32),
                    page_tables=self.table,
                    logit_rows=np.array([n - 1], np.int32),
                )
            )


class LlamaCpp:
    """llama-cpp-python, batch of 512, flash attention on (its faster setting at short context)."""

    def __init__(self, gguf: Path, threads: int, context: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(gguf), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512,
            flash_attn=True, verbose=False,
        )  # fmt: skip

    def run(self, ids: list[int], start: int) -> None:
        self.llama.n_tokens = start
        self.llama.eval(ids)


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(sides: dict[str, Ours | LlamaCpp], rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens/s of each job and side; the sides alternate within every round."""
    seen: dict[str, dict[str, list[float]]] = {}
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 500, max(PREFILLS))]

    def decode(side: Ours | LlamaCpp) -> None:
        for i in range(DECODE_TOKENS):
            side.run([ids[i]], 16 + i)

    for round_ in range(rounds + 1):  # the first round warms up and is not counted
        for name, side in sides.items():
            side.run(ids[:16], 0)
            jobs = {"decode": DECODE_TOKENS / timed(lambda side=side: decode(side))}
            for n in PREFILLS:
                jobs[f"prefill {n}"] = n / timed(lambda side=side, n=n: side.run(ids[:n], 0))
            if round_:
                for job, rate in jobs.items():
                    seen.setdefault(job, {}).setdefault(name, []).append(rate)
    return {job: {n: statistics.median(v) for n, v in by.items()} for job, by in seen.items()}


def read_bandwidth(threads: int) -> float:
    """GB/s of a plain read loop (numpy sum) over 1 GiB with `threads` threads: the same-run yardstick."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.ones(2**30 // 8 // threads * threads, np.int64).reshape(threads, -1)
    with ThreadPoolExecutor(threads) as pool:
        best = min(timed(lambda: list(pool.map(np.sum, data)) and None) for _ in range(5))
    return float(data.nbytes / best / 1e9)


def build(shape: Shape, work: Path) -> tuple[Path, float | None]:
    """The engine, and the seconds that building it took; None when an earlier run had built it."""
    engine = work / f"{shape.name}-int4_g64.edge"
    folder = write_folder(shape, work / shape.name)
    if engine.is_file():
        return engine, None
    began = time.perf_counter()
    argv = ["--profile", "cpu", "--weights", "int4_g64", "--kv", "f16", "--context", "2048"]
    argv += ["--step-tokens", "512", "--no-eval", "-o", str(engine), str(folder)]
    subprocess.run([sys.executable, "-m", "builders.cli", *argv], check=True)
    return engine, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1.1b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    args.work.mkdir(parents=True, exist_ok=True)
    engine, seconds = build(shape, args.work)
    gguf = write_gguf(shape, args.work / f"{shape.name}-q4_0.gguf")
    ours, peer = Ours(engine, args.threads), LlamaCpp(gguf, args.threads, 2048)
    sides = {"edge int4_g64": ours, "llama.cpp Q4_0": peer}
    rates = measure(sides, args.rounds)
    first, second = sides
    print(f"{processor()}, {args.threads} threads, median of {args.rounds} interleaved rounds, tokens/s")
    print(f"{'job':<12}{first:>16}{second:>16}{'ratio':>8}")
    for job, by in rates.items():
        print(f"{job:<12}{by[first]:>16.1f}{by[second]:>16.1f}{by[first] / by[second]:>8.2f}")
    bandwidth = read_bandwidth(args.threads)
    reads = rates["decode"][first] * engine.stat().st_size / 1e9
    print(f"plain read loop {bandwidth:.1f} GB/s; decode reads {reads:.1f} GB/s")
    today = datetime.date.today().isoformat()
    result: dict[str, Any] = {
        "machine": processor(), "threads": args.threads, "rounds": args.rounds, "shape": shape.name,
        "tokens_per_s": rates, "plain_read_gb_per_s": bandwidth, "build_seconds": seconds,
        "engine_bytes": engine.stat().st_size, "gguf_bytes": gguf.stat().st_size,
    }  # fmt: skip
    target = ROOT / "bench" / "results" / f"cpu-{today}-decode-{shape.name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
