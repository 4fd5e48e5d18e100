"""One cell of a fleet, built by edge-build's own code in a process of its own; its outcome as one row."""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from builders import pack
from builders.limits import figures
from builders.parts import open_contents
from builders.pipeline import Options, digests
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.manifest import LANGUAGE, Manifest
from edge_runtime.errors import EdgeError, QualityLimit

BUILT, UNCHANGED, FAILED = "built", "unchanged", "failed"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a cell. Figures are None where there is no engine, or it was not measured.

    bytes: of the file. need, have: bytes of the device's memory. ppl_increase: percent. seconds: the cell's.
    """

    name: str
    model: str
    profile: str
    variant: str
    status: str
    exit_code: int = 0
    error: str | None = None
    engine: str | None = None
    weights: str | None = None
    bytes: int | None = None
    need: int | None = None
    have: int | None = None
    tokens_per_s: float | None = None
    ppl_increase: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    bits_per_weight: float | None = None
    accuracy: float | None = None
    broken: tuple[str, ...] = ()
    seconds: float = 0.0


def build_cell(words: Sequence[str], force: bool, log: str) -> dict[str, Any]:
    """Build, or find that the engine is what a build would make; the fields of a Row beyond its names.

    What the build says goes into the file `log`. Nothing is raised: a failure is an outcome like others.
    """
    from builders.cli import make_parser, run  # the command line knows fleets, so not at load

    began = monotonic()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as out, redirect_stderr(out), redirect_stdout(out):
        try:
            args = make_parser().parse_args([*words, "--force"] if force else list(words))
            target = Path(args.output)
            status = UNCHANGED
            if force or args.prefix is not None or not _unchanged(args):
                print(run(args).text)
                status = BUILT
            with read_engine(target, verify=False) as engine:
                found = {
                    "status": status,
                    "engine": target.name,
                    **_figures(engine.manifest, engine.file_nbytes),
                }
        except EdgeError as error:
            print(f"error: {error}", file=sys.stderr)
            found = failed(f"{type(error).__name__}: {error}", error.exit_code)
            found |= error.figures if isinstance(error, QualityLimit) else {}
        except Exception as error:  # a fault of ours is this cell's, and no reason to stop the others
            traceback.print_exc()
            found = failed(f"{type(error).__name__}: {error} (see {log})")
    return {**found, "seconds": round(monotonic() - began, 3)}


def failed(why: str, exit_code: int = 1) -> dict[str, Any]:
    """The outcome of a cell that has no engine."""
    return {"status": FAILED, "exit_code": exit_code, "error": why}


def _unchanged(args: Any) -> bool:
    """Whether the target is an engine of the same recipe, files and tools, with no limit broken."""
    from builders.cli import build_options

    options: Options = build_options(args)
    if not options.output.exists():
        return False
    try:
        with read_engine(options.output) as engine:
            manifest = engine.manifest
    except EdgeError:
        return False  # damaged, or no engine at all: the build says what is to be said
    made = manifest.provenance
    if made.recipe != options.recipe or made.tools != pack.tools():
        return False
    if manifest.quality is not None and manifest.quality.broken:
        return False
    with open_contents(options.model, options.extras, options.request.context) as contents:
        return made.source_sha256 == digests(contents, options)


def _figures(manifest: Manifest, nbytes: int) -> dict[str, Any]:
    part, quality = manifest.parts[LANGUAGE], manifest.quality
    memory = part.plan.memory
    roles = {n: spec.role for n, spec in part.program.tensors.items()}
    formats = Counter(t.format for n, t in part.plan.tensors.items() if roles[n] == "matrix")
    found: dict[str, Any] = {
        "weights": " ".join(name for name, _ in formats.most_common()),
        "bytes": nbytes,
        "need": memory.need,
        "have": memory.have,
        "tokens_per_s": part.plan.predicted.decode_tokens_per_s,
    }
    if quality is not None:
        found |= figures(quality) | {"broken": quality.broken}
    return found
