"""`edge-bench --tune`: the fastest kernels of an engine's products on this GPU, kept beside the engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.cuda.tuning import Form, Tuning, tuning_path, write_tuning
from edge_runtime.backends.protocol import DeviceCode, Part
from edge_runtime.cli.output import Answer, progress, table
from edge_runtime.engine.file import read_engine
from edge_runtime.errors import BadConfig, Unsupported
from edge_runtime.serving.device import choose_backend


def tune_answer(args: argparse.Namespace) -> Answer:
    """Measure the products of every part of an engine; what is chosen changes no number.

    Raises Unsupported for an engine of another backend, BuildError where the file cannot be written, and
    what opening raises.
    """
    if args.engine is None:
        raise BadConfig("--tune: which engine file? (see edge-bench --help)")
    figures: dict[str, dict[str, float]] = {}  # product -> form -> microseconds
    forms: dict[str, Form] = {}
    tuning: Tuning | None = None

    def watch(product: str, form: str, took: float) -> None:
        figures.setdefault(product, {})[form] = took
        progress(f"{product} by {form}: {took:.1f} µs")

    with read_engine(args.engine) as engine:
        backend, _ = choose_backend(engine.manifest.fingerprint, args.backend)
        code = DeviceCode(engine.manifest.device_code, engine.blob, engine.path)
        backend.check_code(code)
        for name in engine.manifest.parts:
            part = engine.part(name)
            loaded = Part(part.program, part.weights, part.plan.kv, part.plan.step, code)
            executor = backend.load(loaded)
            try:
                if not isinstance(executor, CudaExecutor):
                    raise Unsupported(f"--tune is for engines on a GPU, not for the {backend.name} backend")
                tuning = executor.tune(watch)
                forms |= tuning.forms
            finally:
                executor.close()
    assert tuning is not None  # an engine has at least one part
    path = tuning_path(Path(args.engine))
    write_tuning(path, Tuning(device=tuning.device, code=tuning.code, forms=forms))
    rows = [
        (product, form, f"{took:.1f}", "chosen" if forms[product] == form else "")
        for product, times in figures.items()
        for form, took in times.items()
    ]
    found = table(rows, ("product", "kernel", "µs", ""), (2,))
    text = f"{found}\n\nwritten to {path}, which opens with the engine"
    return Answer({"file": str(path), "device": tuning.device, "products": figures, "chosen": forms}, text)
