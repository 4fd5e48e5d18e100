"""What a manifest must satisfy before a byte of data is believed: every size follows, every bound holds.

One function, used by the writer before it writes a header and by the reader before it looks at a plane.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import numpy as np

from edge_runtime.engine import kv as kv_cache
from edge_runtime.engine import packing
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.header import padded
from edge_runtime.engine.manifest import SCHEMA, Manifest, PartEntry
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import MAX_DIM
from edge_runtime.errors import BadEngineFile, EdgeError, nearest

BLOB = "blob"  # blobs are tensors `blob/<name>`, so no part may have that name
MAX_BYTES = 1 << 44  # of any size named in a manifest: far above any device, far below 2**63
MAX_STEP = 1 << 16  # tokens, sequences or rows of logits of one step
MAX_BLOBS = 256
MAX_BUFFERS = 2048  # laying out buffers takes quadratic time
_WORD = re.compile(r"[A-Za-z0-9._/:-]{1,200}")


def check_manifest(manifest: Manifest) -> dict[str, int]:
    """True size in bytes of every plane and blob, in file order. Raises BadEngineFile naming the fault."""
    if manifest.schema != SCHEMA:
        raise BadEngineFile(f"schema {manifest.schema} is not known; this version reads schema {SCHEMA}")
    abi = f"{abi_hash():016x}"
    if manifest.fingerprint.abi != abi:
        raise BadEngineFile(
            f"made with format table {manifest.fingerprint.abi}, this runtime has {abi}; build it again"
        )
    if not manifest.parts:
        raise BadEngineFile("the engine has no parts; at least one is needed")
    sizes: dict[str, int] = {}
    for name, part in manifest.parts.items():
        try:
            sizes.update(_check_part(name, part))
        except EdgeError as error:
            raise BadEngineFile(f"part {name!r}: {error}") from error
    if len(manifest.blobs) > MAX_BLOBS:
        raise BadEngineFile(f"{len(manifest.blobs)} blobs, expected at most {MAX_BLOBS}")
    for name, nbytes in manifest.blobs.items():
        _bounded(nbytes, f"length of blob {name!r}", least=1)
        sizes[f"{BLOB}/{name}"] = nbytes
    _check_ids(manifest)
    _check_quality(manifest)
    for name in sizes:
        if name not in manifest.planes:
            raise BadEngineFile(f"plane {name!r} has no digest; the engine is incomplete")
    for name in manifest.planes:
        if name not in sizes:
            raise BadEngineFile(f"plane {name!r} belongs to nothing; {_hint(name, sizes)}")
    return {name: sizes[name] for name in manifest.planes}


def plane_name(part: str, tensor: str, plane: str) -> str:
    """Name of a plane in the file."""
    return f"{part}/{tensor}#{plane}"


def _check_part(name: str, part: PartEntry) -> dict[str, int]:
    """Sizes of the part's planes."""
    program, plan = part.program, part.plan
    if name == BLOB:
        raise BadEngineFile(f"no part may be named {BLOB!r}")
    if len(program.buffers) > MAX_BUFFERS:
        raise BadEngineFile(f"{len(program.buffers)} buffers, expected at most {MAX_BUFFERS}")
    for word in (*program.tensors, *program.buffers):
        if not _WORD.fullmatch(word):
            raise BadEngineFile(
                f"{word[:80]!r} is no name of a tensor or buffer (letters, digits, . _ / : -)"
            )
    program.check()
    for tensor in plan.tensors:
        if tensor not in program.tensors:
            raise BadEngineFile(f"the plan names tensor {tensor!r}; {_hint(tensor, program.tensors)}")
    sizes: dict[str, int] = {}
    for tensor, spec in program.tensors.items():
        if tensor not in plan.tensors:
            raise BadEngineFile(f"the plan has no format for tensor {tensor!r}")
        chosen = plan.tensors[tensor]
        if spec.role == "vector" and (spec.rows, chosen.format, chosen.packing) != (1, "f32", "rows"):
            raise BadEngineFile(
                f"vector {tensor!r} is {spec.rows} rows of {chosen.format} {chosen.packing}, "
                "expected 1 row of f32 rows"
            )
        items = packing.plane_items(chosen.format, chosen.packing, spec.rows, spec.cols)
        for plane, (count, dtype) in items.items():
            nbytes = count * np.dtype(dtype).itemsize
            _bounded(nbytes, f"size of {tensor}#{plane}", least=1)
            sizes[plane_name(name, tensor, plane)] = nbytes
    _check_plan(part, plan, sum(padded(n) for n in sizes.values()))
    return sizes


def _check_plan(part: PartEntry, plan: Plan, weights: int) -> None:
    program, step, kv, memory = part.program, plan.step, plan.kv, plan.memory
    for what, value, most in (
        ("step.context", step.context, program.max_context),
        ("step.sequences", step.sequences, MAX_STEP),
        ("step.tokens", step.tokens, MAX_STEP),
        ("step.logits", step.logits, MAX_STEP),
    ):
        _bounded(value, what, least=1, most=most)
    _bounded(kv.pages, "kv.pages", least=1 if program.cache else 0, most=MAX_DIM)
    cache = kv_cache.cache_nbytes(program, kv)  # checks page_tokens and the formats' names
    if program.cache and kv.pages * kv.page_tokens < step.context:
        raise BadEngineFile(
            f"{kv.pages} pages of {kv.page_tokens} tokens cannot hold a context of {step.context}"
        )
    _bounded(cache, "size of the KV cache")
    _bounded(4 * step.tokens * sum(program.buffers.values()), "size of the buffers")
    _bounded(4 * step.logits * program.vocab_size, "size of the logits")
    for field in memory.__struct_fields__:
        _bounded(getattr(memory, field), f"memory.{field}")
    if (memory.weights, memory.kv) != (weights, cache):
        raise BadEngineFile(
            f"the memory plan says {memory.weights} bytes of weights and {memory.kv} of KV cache, "
            f"the program takes {weights} and {cache}"
        )
    for speed in (plan.predicted.decode_tokens_per_s, plan.predicted.first_token_ms):
        if not (math.isfinite(speed) and speed >= 0):
            raise BadEngineFile(f"prediction {speed} is not a positive number")
    _bounded(plan.predicted.prompt_tokens, "predicted.prompt_tokens")


def _check_ids(manifest: Manifest) -> None:
    """Token ids that the runtime will feed or compare must lie in the vocabulary."""
    size = max(p.program.vocab_size for p in manifest.parts.values())
    vocabulary, known = manifest.vocabulary, manifest.known_answer
    if not 1 <= vocabulary.size <= MAX_DIM:
        raise BadEngineFile(f"vocabulary.size is {vocabulary.size}, expected 1 to {MAX_DIM}")
    named = [("bos", vocabulary.bos), ("pad", vocabulary.pad), *(("eos", e) for e in vocabulary.eos)]
    ids = [(f"vocabulary.{what}", i) for what, i in named if i is not None]
    if known is not None:
        ids += [("known_answer", i) for i in (*known.prompt, *known.answer)]
        context = max(p.plan.step.context for p in manifest.parts.values())
        if not known.prompt or len(known.prompt) + len(known.answer) > context:
            raise BadEngineFile("the known answer has no prompt, or is longer than the context")
    for what, i in ids:
        if not 0 <= i < size:
            raise BadEngineFile(f"{what} has token id {i}, expected 0 to {size - 1}")


def _check_quality(manifest: Manifest) -> None:
    if manifest.quality is not None:
        _bounded(manifest.quality.tokens, "quality.tokens", least=1)
        _bounded(manifest.quality.bytes, "quality.bytes")


def _bounded(value: int, what: str, least: int = 0, most: int = MAX_BYTES) -> None:
    if not least <= value <= most:
        raise BadEngineFile(f"{what} is {value}, expected {least} to {most}")


def _hint(word: str, valid: Collection[str]) -> str:
    """`nearest`, where a forged name cannot make it slow."""
    if len(word) > 200 or len(valid) > 1000:
        return f"expected one of {len(valid)} names"
    return nearest(word, valid)
