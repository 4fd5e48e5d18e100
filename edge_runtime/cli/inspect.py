"""edge-inspect: what an engine file holds, as tables or as one JSON object. It proves the file on the way."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_runtime.cli.device_code_text import device_code_text
from edge_runtime.cli.output import Answer, Parser, profiles_answer, run_command, size, table
from edge_runtime.cli.quality_text import quality_text, report_text
from edge_runtime.engine import packing
from edge_runtime.engine.file import Engine, read_engine
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import AdapterEntry, Manifest, PartEntry
from edge_runtime.engine.memory import stored_adapter_nbytes
from edge_runtime.engine.plan import MemoryPlan
from edge_runtime.errors import BadConfig

EXAMPLES = (
    "edge-inspect model.edge",
    "edge-inspect model.edge --quality --json",
    "edge-inspect model.edge --tensors",
    "edge-inspect --profiles",
)
_SIZES = """stored: all tensors, with padding; matrices: without padding and vectors;
bits/weight: of matrices, scales included, as edge-build --bits counts them"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of edge-inspect; returns the exit code."""
    return run_command(make_parser(), run, argv)


def make_parser() -> Parser:
    parser = Parser("edge-inspect", "Show what an engine file holds, and prove that it is whole.", EXAMPLES)
    parser.add_argument("file", nargs="?", help="engine file (.edge)")
    parser.add_argument("--quality", action="store_true", help="show only the quality report")
    parser.add_argument("--tensors", action="store_true", help="also list every tensor")
    parser.add_argument("--no-verify", action="store_true", help="do not check the digests of the data")
    parser.add_argument("--profiles", action="store_true", help="list the devices and stop")
    return parser


def run(args: argparse.Namespace) -> Answer:
    """Read the file and describe it. Raises BadEngineFile when it is not a whole engine."""
    if args.profiles:
        return profiles_answer()
    if args.file is None:
        raise BadConfig("which engine file? (see edge-inspect --help)")
    with read_engine(args.file, verify=not args.no_verify) as engine:
        data = describe(engine, verified=not args.no_verify, tensors=args.tensors)
        manifest = engine.manifest
    if args.quality:
        return Answer({"name": manifest.name, "quality": data["quality"]}, report_text(manifest.quality))
    sections = [
        _head_text(data),
        _parts_text(data),
        *([_adapters_text(data)] if data["adapters"] else []),
        *(_plan_text(name, part) for name, part in manifest.parts.items()),
        quality_text(manifest.quality),
        _provenance_text(manifest),
        _contents_text(manifest),
        *device_code_text(manifest),
    ]
    if args.tensors:
        sections.append(_tensors_text(data))
    return Answer(data, "\n\n".join(sections))


def describe(engine: Engine, *, verified: bool, tensors: bool = False) -> dict[str, Any]:
    """The object that --json prints."""
    manifest = engine.manifest
    data: dict[str, Any] = {
        "name": manifest.name,
        "schema": manifest.schema,
        "file_bytes": engine.file_nbytes,
        "verified": verified,
        "fingerprint": msgspec.to_builtins(manifest.fingerprint),
        "parts": {name: _part(part) for name, part in manifest.parts.items()},
        "adapters": {
            name: _adapter(adapter, manifest.parts[adapter.part])
            for name, adapter in manifest.adapters.items()
        },
        "vocabulary": msgspec.to_builtins(manifest.vocabulary),
        "blobs": dict(manifest.blobs),
        "device_code": msgspec.to_builtins(manifest.device_code),
        "quality": msgspec.to_builtins(manifest.quality),
        "provenance": msgspec.to_builtins(manifest.provenance),
        "known_answer": msgspec.to_builtins(manifest.known_answer),
    }
    if tensors:
        data["tensors"] = [
            {"part": name, **row} for name, part in manifest.parts.items() for row in _tensors(part)
        ]
    return data


def _part(part: PartEntry) -> dict[str, Any]:
    rows = _tensors(part)
    nbytes, params = sum(r["bytes"] for r in rows), sum(r["params"] for r in rows)
    plan = part.plan
    return {
        "ops": len(part.program.ops),
        "layers": len(part.program.cache),
        "tensors": len(rows),
        "params": params,
        "bytes": nbytes,
        "stored_bits_per_weight": round(8 * nbytes / params, 4),
        "matrices": _matrices(rows),
        "formats": dict(Counter(r["format"] for r in rows).most_common()),
        "plan": {
            "profile": plan.profile,
            "power_mode": plan.power_mode,
            "step": msgspec.to_builtins(plan.step),
            "kv": msgspec.to_builtins(plan.kv),
            "memory": {
                **msgspec.to_builtins(plan.memory),
                "need": plan.memory.need,
                "have": plan.memory.have,
            },
            "predicted": msgspec.to_builtins(plan.predicted),
        },
    }


def _matrices(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All but the vectors: bytes, and bits per weight of them, scales included, padding not, as edge-build's
    `--bits` counts them."""
    matrices = [r for r in rows if r["role"] != "vector"]
    params = sum(r["params"] for r in matrices)
    nbytes = sum(get_format(r["format"]).nbytes(r["rows"], r["cols"]) for r in matrices)
    return {"params": params, "bytes": nbytes, "bits_per_weight": round(8 * nbytes / max(1, params), 4)}


def _adapter(adapter: AdapterEntry, part: PartEntry) -> dict[str, Any]:
    ranks = {name: target.rank for name, target in adapter.targets.items()}
    return {
        "part": adapter.part,
        "tensors": len(ranks),
        "ranks": sorted(set(ranks.values())),
        "bytes": stored_adapter_nbytes(part.program, ranks),
        "targets": msgspec.to_builtins(adapter.targets),
    }


def _tensors(part: PartEntry) -> list[dict[str, Any]]:
    """One row a tensor, in the program's order; `bytes` as stored, padding included."""
    rows = []
    for name, spec in part.program.tensors.items():
        chosen = part.plan.tensors[name]
        rows.append(
            {
                "name": name,
                "role": spec.role,
                "rows": spec.rows,
                "cols": spec.cols,
                "params": spec.size,
                "format": chosen.format,
                "packing": chosen.packing,
                "bytes": packing.packed_nbytes(chosen.format, chosen.packing, spec.rows, spec.cols),
            }
        )
    return rows


def _head_text(data: dict[str, Any]) -> str:
    fingerprint = data["fingerprint"]
    state = "digests match" if data["verified"] else "digests of the data not checked"
    target = f"{fingerprint['profile']}, backend {fingerprint['backend']}"
    if fingerprint["compute_capability"]:
        target += f", compute capability {fingerprint['compute_capability']}"
    return table(
        [
            ("engine", data["name"]),
            ("file", f"{size(data['file_bytes'])}, schema {data['schema']}, {state}"),
            ("made for", target),
        ]
    )


def _parts_text(data: dict[str, Any]) -> str:
    rows = [
        (
            name,
            p["ops"],
            p["tensors"],
            f"{p['params']:,}",
            size(p["bytes"]),
            size(p["matrices"]["bytes"]),
            f"{p['matrices']['bits_per_weight']:.2f}",
            ", ".join(f"{fmt} x{n}" for fmt, n in p["formats"].items()),
        )
        for name, p in data["parts"].items()
    ]
    head = ("part", "ops", "tensors", "params", "stored", "matrices", "bits/weight", "formats")
    return f"{table(rows, head, right=(1, 2, 3, 4, 5, 6))}\n\n{_SIZES}"


def _adapters_text(data: dict[str, Any]) -> str:
    rows = [
        (name, a["part"], a["tensors"], ", ".join(map(str, a["ranks"])), size(a["bytes"]))
        for name, a in data["adapters"].items()
    ]
    return table(rows, ("adapter", "part", "tensors", "rank", "bytes"), right=(2, 4))


def _plan_text(name: str, part: PartEntry) -> str:
    plan, step, kv = part.plan, part.plan.step, part.plan.kv
    text = table(
        [
            ("profile", f"{plan.profile}, power mode {plan.power_mode}"),
            ("step", f"context {step.context}, {step.sequences} sequences, {step.tokens} tokens a step"),
            ("KV cache", f"K {kv.k}, V {kv.v}, {kv.pages} pages of {kv.page_tokens} tokens"),
            (
                "predicted",
                f"{plan.predicted.decode_tokens_per_s:.1f} tokens/s, first token "
                f"{plan.predicted.first_token_ms:.1f} ms for {plan.predicted.prompt_tokens} tokens",
            ),
            *memory_rows(plan.memory),
        ]
    )
    return f"plan of {name}\n{text}"


def memory_rows(memory: MemoryPlan) -> list[tuple[str, str]]:
    """Need against have for `table`, one row for each figure that is not zero."""
    rows = [
        (what, size(n))
        for what, n in (
            ("weights", memory.weights),
            ("KV cache", memory.kv),
            ("buffers", memory.buffers),
            ("draft", memory.draft),
            ("adapters", memory.adapters),
            ("device code", memory.device_code),
            ("device context", memory.context),
        )
        if n
    ]
    fits = "fits" if memory.need <= memory.have else "does not fit"
    have = f"{size(memory.have)} ({size(memory.total)} less a reserve of {size(memory.reserve)}): {fits}"
    return [*rows, ("need", size(memory.need)), ("have", have)]


def _provenance_text(manifest: Manifest) -> str:
    p = manifest.provenance
    rows = [
        ("source", f"{p.source} ({p.model_type})"),
        ("algorithm", p.algorithm),
        ("recipe", ", ".join(f"{k}={v}" for k, v in p.recipe.items())),
        ("tools", ", ".join(f"{k} {v}" for k, v in p.tools.items())),
        *((f"sha256 {name}", digest) for name, digest in p.source_sha256.items()),
    ]
    return "provenance\n" + table(rows)


def _contents_text(manifest: Manifest) -> str:
    known = manifest.known_answer
    answer = (
        "none"
        if known is None
        else f"{len(known.answer)} tokens after {len(known.prompt)}, by {known.backend}"
    )
    return table(
        [
            ("blobs", ", ".join(f"{name} ({size(n)})" for name, n in manifest.blobs.items()) or "none"),
            ("device code", ", ".join(entry.blob for entry in manifest.device_code) or "none"),
            ("known answer", answer),
        ]
    )


def _tensors_text(data: dict[str, Any]) -> str:
    rows = [
        (
            f"{t['part']}/{t['name']}",
            t["role"],
            f"{t['rows']}x{t['cols']}",
            t["format"],
            t["packing"],
            t["bytes"],
        )
        for t in data["tensors"]
    ]
    return table(rows, ("tensor", "role", "shape", "format", "packing", "bytes"), right=(2, 5))


if __name__ == "__main__":
    sys.exit(main())
