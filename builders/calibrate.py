"""Phase 2 of a build: what every linear of the f32 model reads, over a text, one segment in memory at a time.

Layer-wise calibration as in GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 4): rows of all tokens are
kept between segments, a segment's weights are loaded, its linears' inputs are added up, and it is forgotten.
Inputs are those of the exact model. A run that was interrupted goes on with its first unfinished segment and
leaves the same bytes, whatever the number of cores: on one kind of processor, one release of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from builders.calibration import Calibration, groups_of
from builders.calibration_folder import SCHEMA, CalibrationFolder, Identity
from builders.corpus import Corpus
from builders.kept_rows import RowsReader, RowsWriter
from builders.moments import Moments, sample_tokens
from builders.segment_runner import SegmentRunner, batches
from builders.segments import Segment, cut
from builders.serial_weights import SerialWeights
from builders.torch_device import Workers, repeatable, resolve_device
from builders.vocabulary_blocks import joined
from builders.watcher import Watcher
from builders.weights import Model, Weights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Linear
from edge_runtime.errors import Unsupported, ValueOutOfRange


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """seed: which inputs are kept as samples. device: auto, cpu or cuda. memory: bytes of rows that may lie
    in memory; more are read from disk. cores: 0 for as many as torch would use."""

    seed: int = 1
    device: str = "auto"
    memory: int = 256 << 20
    cores: int = 0


def calibrate(
    weights: Model,
    corpus: Corpus,
    folder: Path,
    *,
    digests: Mapping[str, str],
    made: str = "",
    options: CalibrationOptions = CalibrationOptions(),
    watcher: Watcher | None = None,
) -> Calibration:
    """Calibrate the model of `weights` on the windows into `folder`, or go on with what is there.

    `digests` are of the checkpoint's files, `made` says what was done to its weights since (a rotation); a
    folder of anything else is refused. The folder is held until the result is closed. Raises BadConfig,
    BuildError, Unsupported, and ValueOutOfRange when an activation is not finite.
    """
    program = weights.program
    if program.input_width is not None:
        raise Unsupported("a program that begins with rows (Medusa heads) cannot be calibrated on a text")
    device = resolve_device(options.device)
    segments = cut(program)
    identity = Identity(
        **known_before(weights, digests, made, options),
        text=corpus.name,
        text_sha256=corpus.sha256,
        samples=corpus.windows.shape[0],
        length=corpus.windows.shape[1],
    )
    held = CalibrationFolder(folder, identity)
    try:
        with repeatable(device, options.cores) as workers:
            safe = SerialWeights(weights)
            work = _Work(safe, segments, corpus.windows, held, options, device, workers)
            sha256 = _run(work, watcher or Watcher())
    except BaseException:
        held.close()
        raise
    return Calibration(held, program, segments, sha256)


def known_before(
    weights: Model, digests: Mapping[str, str], made: str, options: CalibrationOptions
) -> dict[str, Any]:
    """What of a calibration's Identity does not depend on its text, by field."""
    return {
        "schema": SCHEMA,
        "model_sha256": dict(digests),
        "program_sha256": hashlib.sha256(msgspec.json.encode(joined(weights.program))).hexdigest(),
        "weights": made,
        "seed": options.seed,
        "device": resolve_device(options.device).partition(":")[0],
        "torch": str(torch.__version__),
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """What a run is about, handed from one segment to the next."""

    weights: Weights
    segments: list[Segment]
    windows: Array
    folder: CalibrationFolder
    options: CalibrationOptions
    device: str
    workers: Workers


def _run(work: _Work, watcher: Watcher) -> str:
    """All segments that have no statistics yet; the digest of all."""
    count = len(work.segments)
    done = work.folder.finished(count)
    watcher.phase("calibrate", count)
    held: Array | None = None  # rows after the segment before, when they are in memory
    for i in range(count):
        if i >= done:
            held = _segment(work, i, held)
        watcher.step(f"segment {i + 1} of {count}")
    return work.folder.finish(count)


def _segment(work: _Work, i: int, held: Array | None) -> Array | None:
    """Calibrate segment i and save it; its rows, if they fit in memory."""
    program, (samples, length) = work.weights.program, work.windows.shape
    runner = SegmentRunner(work.weights, work.segments, i, work.device)
    groups = groups_of(program, work.segments, i)
    sample = sample_tokens(work.windows.size, work.options.seed)
    moments = [Moments(program.tensors[group[0]].cols, sample, work.device) for group in groups]
    last = i == len(work.segments) - 1
    with ExitStack() as stack:
        before = writer = None
        if i > 0:
            reads = sum(program.buffers[name] for name in work.segments[i].reads)
            before = RowsReader(work.folder.rows(i - 1), (samples, length, reads), held)
            stack.callback(before.close)
        if not last:
            file = stack.enter_context(work.folder.replacing(work.folder.rows(i)))
            writer = RowsWriter(file, (samples, length, runner.width), work.options.memory)

        def run(span: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
            """Rows after the segment, and the inputs of each group, of a batch."""
            seen: dict[str, Tensor] = {}

            def hook(op: Linear, x: Tensor) -> Tensor:
                seen[op.weight] = x
                return x

            rows = None if before is None else before.read(*span)
            out = runner.run(work.windows[slice(*span)], rows, hook)
            if last:
                seen[groups[-1][0]] = out
            return out, [seen[group[0]] for group in groups]

        for out, inputs in work.workers.map(run, batches(program, samples, length, work.device)):
            if not bool(torch.isfinite(out).all()):
                raise ValueOutOfRange(
                    f"segment {i + 1} of the f32 model gives NaN or Inf on the calibration text; "
                    "the checkpoint is damaged or cannot be run in f32"
                )
            for moment, x in zip(moments, inputs, strict=True):
                moment.add(x.flatten(0, 1), work.workers)
            if writer is not None:
                writer.add(out.cpu().numpy())
    arrays = {f"{g}.{key}": a for g, m in enumerate(moments) for key, a in m.packed().items()}
    work.folder.save(i, arrays)
    return None if writer is None else writer.held
