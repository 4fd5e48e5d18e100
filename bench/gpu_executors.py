"""Parts `executors` and `exactness`: whole programs against the reference backend, and against themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from gpu_code import EMULATED
from gpu_models import Shape, encoded, formats_of, llama, load, packed, part_of
from gpu_report import Report
from gpu_sizes import SIZES

from builders.archs import Architecture, read_program
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import Array

PLANNER = Path(__file__).resolve().parent.parent / "examples" / "planner" / "model"
# Formats of matrices by KV formats, each of both at least once
PAIRS = {
    "int4_g64": "int8",
    "int8_row": "f16",
    "f16": "fp8",
    "bf16": "int4",
    "nf4_g64": "int8,int4",
    "fp8_e4m3_row": "f16,int8",
    "int4_g32_zp": "fp8",
    "int8_g128": "int4",
}
PLANNERS = {"int4_g64": "int8", "f16": "f16"}
if EMULATED:
    PAIRS, PLANNERS = {"int4_g64": "int8"}, {}


def executors(report: Report) -> None:
    """Logits of a prompt and of decoded tokens: how far from the reference's; likeliest tokens, chains."""
    jobs = {
        **{
            f"planner {fmt}, KV {kv}": lambda f=fmt, k=kv: _planner(report, f, k)
            for fmt, kv in PLANNERS.items()
        },
        **{f"toy {fmt}, KV {kv}": lambda f=fmt, k=kv: _toy(report, f, k) for fmt, kv in PAIRS.items()},
    }
    report.each(jobs, seconds=3)


def exactness(report: Report) -> None:
    """Logits equal to the bit: alone or among others, in any chunks, in any bucket, graph or none, again."""
    pairs = PAIRS.items()
    report.each(
        {f"{fmt}, KV {kv}": (lambda f=fmt, k=kv: _exact(report, f, k)) for fmt, kv in pairs}, seconds=3
    )


def _shape() -> Shape:
    return SIZES.toy


def toy_part(fmt: str, kv: str, sequences: int = 3) -> Part:
    """A toy Llama with random weights."""
    shape = _shape()
    program = llama(shape)
    weights = encoded(program, formats_of(program, fmt))
    return part_of(program, weights, kv=kv, context=shape.context, tokens=64, logits=64, sequences=sequences)


def _toy(report: Report, fmt: str, kv: str) -> None:
    part = toy_part(fmt, kv)
    ids = np.random.default_rng(1).integers(3, part.program.vocab_size, 24 if EMULATED else 60)
    _compare(report, f"toy {fmt}, KV {kv}", part, ids)


def _planner(report: Report, fmt: str, kv: str) -> None:
    part = planner_part(fmt, kv)
    ids = np.random.default_rng(2).integers(3, part.program.vocab_size, 96)
    _compare(report, f"planner {fmt}, KV {kv}", part, ids)


def planner() -> Architecture:
    """The shipped planner's Program, and where its tensors come from."""
    return read_program(json.loads((PLANNER / "config.json").read_text(encoding="utf-8")), context=256)


def planner_part(fmt: str, kv: str) -> Part:
    """Its weights rounded to nearest."""
    from safetensors.numpy import load_file

    architecture = planner()
    tensors = load_file(PLANNER / "model.safetensors")
    program, weights = architecture.program, {}
    formats = formats_of(program, fmt)
    for name, spec in program.tensors.items():
        made = architecture.sources[name]
        values = made.constant if made.constant is not None else tensors[made.key]
        values = np.asarray(values, np.float32).reshape(-1, spec.cols)
        if made.rows is not None:
            values = values[made.rows[0] : made.rows[1]]
        weights[name] = packed(
            np.ascontiguousarray(values + np.float32(made.offset)), formats[name], spec.role
        )
    return part_of(program, weights, kv=kv, context=256, tokens=128, logits=128)


def _compare(report: Report, name: str, part: Part, ids: Array) -> None:
    """Against the reference, whose activations are f32.

    Inputs of linears are int8, f16 or bf16 here: a few percent in so small a model. And where a key or value
    lies near the middle between two codes of the cache, that decides for another code: less than half of what
    the cache's format costs by itself, which is the reference's distance from its own f16 cache.
    """
    half = len(ids) * 3 // 4
    with opened(part) as ours:
        got = [ours.forward(step(part, {0: (0, ids[:half])})).copy()]
        got += [ours.forward(step(part, {0: (i, ids[i : i + 1])})).copy() for i in range(half, len(ids))]
        free, _ = ours._driver.free_bytes()
        likeliest = ours.likeliest(step(part, {0: (len(ids) - 1, ids[-1:])})).copy()
        tokens, values = ours.top(step(part, {0: (len(ids) - 1, ids[-1:])}), 5)
        same = likeliest[0] == got[-1].argmax() == tokens[0, 0] and values[0, 0] == got[-1].max()
        chained = ours.chain(step(part, {0: (half, ids[half : half + 1])}), 4)
        single = [int(ids[half])]
        for i in range(4):
            single.append(int(ours.likeliest(step(part, {0: (half + i, np.array(single[-1:]))}))[0]))
        after, _ = ours._driver.free_bytes()
    ours_logits = np.concatenate(got)
    want = _reference(part, ids)
    plain = _reference(replace(part, kv=msgspec.structs.replace(part.kv, k="f16", v="f16")), ids)
    limit = 0.04 + 0.5 * _distance(plain, want)
    error = np.abs(ours_logits - want).max() / np.abs(want).max()
    relative = _distance(ours_logits, want)
    agree = float((ours_logits.argmax(1) == want.argmax(1)).mean())
    report.check(
        f"{name}: near the reference",
        bool(np.isfinite(ours_logits).all() and relative <= limit),
        f"relative error {relative:.4f}, limit {limit:.4f}, greatest {error:.4f}, same likeliest {agree:.3f}",
    )
    report.check(f"{name}: likeliest and top are those of the logits", bool(same))
    report.check(f"{name}: chain is its steps", chained[:, 0].tolist() == single[1:], f"{single[1:]}")
    report.check(f"{name}: steps take no memory", after == free, f"{free - after} bytes")


def _reference(part: Part, ids: Array) -> Array:
    executor = REFERENCE.load(part)
    logits: Array = executor.forward(step(part, {0: (0, ids)})).copy()
    executor.close()
    return logits


def _distance(a: Array, b: Array) -> float:
    """Relative to b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _exact(report: Report, fmt: str, kv: str) -> None:
    part = toy_part(fmt, kv)
    rng = np.random.default_rng(5)
    vocab, length = part.program.vocab_size, 19 if EMULATED else 43
    ids, other = (rng.integers(3, vocab, length) for _ in range(2))
    with opened(part) as ours:
        want = ours.forward(step(part, {0: (0, ids)})).copy()
        name = f"{fmt}, KV {kv}"

        def same(what: str, got: Array, part_of_it: slice = slice(None)) -> None:
            equal = got.tobytes() == want[part_of_it].tobytes()
            worst = float(np.abs(got - want[part_of_it]).max())
            report.check(f"{name}: {what}", equal, "" if equal else f"differs by {worst:.3g}")

        same("run again", ours.forward(step(part, {0: (0, ids)})))
        for size in (1, 3, 8, 9, 17):
            got = [
                ours.forward(step(part, {1: (i, ids[i : i + size])})).copy() for i in range(0, length, size)
            ]
            same(f"in chunks of {size}", np.concatenate(got))
        both = ours.forward(step(part, {0: (0, ids[: length // 2]), 1: (0, other[:9])})).copy()
        same("beside another sequence", both[: length // 2], slice(length // 2))
        both = ours.forward(step(part, {1: (9, other[9:12]), 0: (length // 2, ids[length // 2 :])})).copy()
        same("after another sequence", both[3:], slice(length // 2, None))
        tuned = ours.tune()
        same(f"tuned ({len(tuned.forms)} products)", ours.forward(step(part, {0: (0, ids)})))
        ours._launcher.overlap = False
        ours._graphs.clear()
        ours._launches.clear()
        same("launches that do not overlap", ours.forward(step(part, {0: (0, ids)})))
        ours._driver.graphs = False
        same("launched one by one, without graphs", ours.forward(step(part, {2: (0, ids)})))
        page = ours.read_page(0)
    with opened(part) as again:
        same("loaded again", again.forward(step(part, {0: (0, ids)})))
        report.check(f"{name}: page bytes", again.read_page(0).tobytes() == page.tobytes())
    # or the comparisons above would prove nothing
    changed = ids.copy()
    changed[0] = ids[0] % (vocab - 1) + 1
    with opened(part) as third:
        got = third.forward(step(part, {0: (0, changed)}))
        report.check(f"{name}: the comparison has power", got[-1:].tobytes() != want[-1:].tobytes())


@contextmanager
def opened(part: Part) -> Iterator[CudaExecutor]:
    executor = load(part)
    try:
        yield executor
    finally:
        executor.close()


def step(part: Part, runs: dict[int, tuple[int, Array]], *, last: bool = False) -> StepBatch:
    """sequence -> (first position, ids); each has its own pages. Logits of every token, or of the last."""
    width = -(-part.step.context // part.kv.page_tokens)
    rows = sorted(runs)
    tables = [np.arange(s * width, (s + 1) * width) for s in rows]
    counts = [len(ids) for _, ids in runs.values()]
    positions = [np.arange(first, first + len(ids)) for first, ids in runs.values()]
    wanted = np.arange(sum(counts))
    arrays = {
        "tokens": np.concatenate([ids for _, ids in runs.values()]),
        "positions": np.concatenate(positions),
        "sequence": np.repeat([rows.index(s) for s in runs], counts),
        "page_tables": np.stack(tables),
        "logit_rows": wanted[-1:] if last else wanted,
    }
    return StepBatch(**{name: np.ascontiguousarray(a, np.int32) for name, a in arrays.items()})
