"""What a manifest must satisfy before a byte of data is believed: every size follows, every bound holds.

One function, used by the writer before it writes a header and by the reader before it looks at a plane.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import numpy as np

from edge_runtime.engine import kv as kv_cache
from edge_runtime.engine import packing
from edge_runtime.engine.adapter import MAX_RANK
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.header import padded
from edge_runtime.engine.manifest import (
    DRAFT,
    LANGUAGE,
    MAX_HEADS,
    MEDUSA,
    SCHEMA,
    AdapterEntry,
    DeviceCodeEntry,
    KernelEntry,
    Manifest,
    PartEntry,
    loaded_nbytes,
    medusa_parts,
)
from edge_runtime.engine.memory import adapter_nbytes, adapter_planes
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import MAX_DIM
from edge_runtime.errors import BadEngineFile, EdgeError, nearest

BLOB = "blob"  # blobs are tensors `blob/<name>`, so no part may have that name
ADAPTER = "adapter."  # and adapters are `adapter.<name>/<tensor>.<side>#w`
MAX_BYTES = 1 << 44  # of any size named in a manifest: far above any device, far below 2**63
MAX_STEP = 1 << 16  # tokens, sequences or rows of logits of one step
MAX_BLOBS = 256
MAX_DEVICE_CODE = 16  # blobs of it
MAX_KERNELS = 4096
MAX_ADAPTERS = 64
MAX_SCALE = 1e30  # of an adapter: far above any that was trained, and f32 holds it
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
    _check_companions(manifest.parts)
    if len(manifest.blobs) > MAX_BLOBS:
        raise BadEngineFile(f"{len(manifest.blobs)} blobs, expected at most {MAX_BLOBS}")
    for name, nbytes in manifest.blobs.items():
        _bounded(nbytes, f"length of blob {name!r}", least=1)
        sizes[f"{BLOB}/{name}"] = nbytes
    _check_device_code(manifest)
    sizes.update(_check_adapters(manifest))
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


def adapter_plane(adapter: str, tensor: str, side: str) -> str:
    """Name of a plane of an adapter; side is a or b."""
    return plane_name(f"{ADAPTER}{adapter}", f"{tensor}.{side}", "w")


def _check_part(name: str, part: PartEntry) -> dict[str, int]:
    """Sizes of the part's planes."""
    program, plan = part.program, part.plan
    if name == BLOB:
        raise BadEngineFile(f"no part may be named {BLOB!r}")
    if name.startswith(ADAPTER):
        raise BadEngineFile(f"no part's name may begin with {ADAPTER!r}")
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
    _check_origins(part)
    _check_plan(part, plan, sum(padded(n) for n in sizes.values()))
    return sizes


def _check_origins(part: PartEntry) -> None:
    tensors = part.program.tensors
    for tensor, origin in part.origins.items():
        if tensor not in tensors:
            raise BadEngineFile(f"an origin names tensor {tensor!r}; {_hint(tensor, tensors)}")
        spec = tensors[tensor]
        if spec.role not in ("matrix", "head"):
            raise BadEngineFile(
                f"tensor {tensor!r} has an origin and the role {spec.role}, expected a matrix"
            )
        if not _WORD.fullmatch(origin.key):
            raise BadEngineFile(f"the origin of {tensor!r} is {origin.key[:80]!r}, which is no tensor's name")
        if not 0 <= origin.row <= MAX_DIM - spec.rows:
            raise BadEngineFile(
                f"the origin of {tensor!r} is row {origin.row}, expected 0 to {MAX_DIM - spec.rows}"
            )


def _check_adapters(manifest: Manifest) -> dict[str, int]:
    """Sizes of the adapters' planes; each part's memory plan must say what they take when loaded."""
    if len(manifest.adapters) > MAX_ADAPTERS:
        raise BadEngineFile(f"{len(manifest.adapters)} adapters, expected at most {MAX_ADAPTERS}")
    sizes: dict[str, int] = {}
    totals = dict.fromkeys(manifest.parts, 0)
    for name, adapter in manifest.adapters.items():
        if adapter.part not in manifest.parts:
            hint = _hint(adapter.part, manifest.parts)
            raise BadEngineFile(f"adapter {name!r}: no part {adapter.part!r}; {hint}")
        try:
            found = _check_adapter(name, adapter, manifest)
        except BadEngineFile as error:
            raise BadEngineFile(f"adapter {name!r}: {error}") from error
        sizes |= found
        part = manifest.parts[adapter.part]
        ranks = {tensor: target.rank for tensor, target in adapter.targets.items()}
        backend = manifest.fingerprint.backend
        totals[adapter.part] += adapter_nbytes(part.program, part.plan.step, ranks, backend=backend)
    for name, total in totals.items():
        said = manifest.parts[name].plan.memory.adapters
        if said != total:
            raise BadEngineFile(f"part {name!r}: the plan says {said} bytes of adapters, they take {total}")
    return sizes


def _check_adapter(name: str, adapter: AdapterEntry, manifest: Manifest) -> dict[str, int]:
    tensors = manifest.parts[adapter.part].program.tensors
    if not adapter.targets:
        raise BadEngineFile("it has no targets; at least one tensor is needed")
    sizes: dict[str, int] = {}
    for tensor, target in adapter.targets.items():
        if tensor not in tensors:
            raise BadEngineFile(f"no tensor {tensor!r}; {_hint(tensor, tensors)}")
        spec = tensors[tensor]
        if spec.role not in ("matrix", "head"):
            raise BadEngineFile(f"tensor {tensor!r} has the role {spec.role}, expected matrix or head")
        if not 1 <= target.rank <= MAX_RANK:
            raise BadEngineFile(f"rank of {tensor!r} is {target.rank}, expected 1 to {MAX_RANK}")
        if not abs(target.scale) <= MAX_SCALE:
            raise BadEngineFile(f"scale of {tensor!r} is {target.scale}, expected at most {MAX_SCALE:g}")
        for side, nbytes in adapter_planes(target.rank, spec.rows, spec.cols).items():
            plane = adapter_plane(name, tensor, side)
            if plane not in manifest.planes:  # looked up now, so that a forged list costs no memory here
                raise BadEngineFile(f"plane {plane!r} has no digest; the engine is incomplete")
            sizes[plane] = nbytes
    return sizes


def _check_companions(parts: Mapping[str, PartEntry]) -> None:
    """The draft and the Medusa heads go with the language part: same vocabulary, same sequences and pages."""
    heads = medusa_parts(parts)
    if heads != [f"{MEDUSA}{k + 1}" for k in range(len(heads))] or len(heads) > MAX_HEADS:
        raise BadEngineFile(
            f"the Medusa heads are {', '.join(heads[:4])}…, expected {MEDUSA}1, {MEDUSA}2 and so on "
            f"to at most {MEDUSA}{MAX_HEADS}"
        )
    names = [name for name in (DRAFT, *heads) if name in parts]
    if names and LANGUAGE not in parts:
        raise BadEngineFile(f"part {names[0]!r} needs a part {LANGUAGE!r}, which the engine lacks")
    need = 0
    for name in names:
        try:
            _check_companion(name, parts[name], parts[LANGUAGE])
        except BadEngineFile as error:
            raise BadEngineFile(f"part {name!r}: {error}") from error
        need += parts[name].plan.memory.need
    if LANGUAGE in parts and (said := parts[LANGUAGE].plan.memory.draft) != need:
        raise BadEngineFile(f"the memory plan says {said} bytes of draft, the parts beside it take {need}")


def _check_companion(name: str, part: PartEntry, target: PartEntry) -> None:
    program, kv, step = part.program, part.plan.kv, part.plan.step
    pairs = [
        ("vocab_size", program.vocab_size, target.program.vocab_size),
        ("step.context", step.context, target.plan.step.context),
        ("step.sequences", step.sequences, target.plan.step.sequences),
    ]
    if name == DRAFT:
        pairs += [
            ("kv.pages", kv.pages, target.plan.kv.pages),
            ("kv.page_tokens", kv.page_tokens, target.plan.kv.page_tokens),
        ]
    elif program.input_width is None or program.cache:
        raise BadEngineFile("a Medusa head begins with an input op and has no KV cache")
    else:
        pairs.append(("the input's width", program.input_width, target.program.hidden_width))
    for what, value, wanted in pairs:
        if value != wanted:
            raise BadEngineFile(f"{what} is {value}, the language part has {wanted}")


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
    cache = kv_cache.cache_nbytes(program, kv, step)  # checks page_tokens and the formats' names
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


def _check_device_code(manifest: Manifest) -> None:
    """Each entry is one of the blobs, of its size, and the plan has room for the one that a device loads."""
    entries = manifest.device_code
    if entries and manifest.fingerprint.backend != "cuda":
        raise BadEngineFile(f"device code in an engine for backend {manifest.fingerprint.backend!r}")
    if len(entries) > MAX_DEVICE_CODE:
        raise BadEngineFile(f"{len(entries)} blobs of device code, expected at most {MAX_DEVICE_CODE}")
    blobs = [entry.blob for entry in entries]
    for entry in entries:
        try:
            if blobs.count(entry.blob) > 1:
                raise BadEngineFile("it is named twice")
            if entry.blob not in manifest.blobs:
                raise BadEngineFile(f"there is no such blob; {_hint(entry.blob, manifest.blobs)}")
            if manifest.blobs[entry.blob] != entry.nbytes:
                raise BadEngineFile(
                    f"it is said to have {entry.nbytes} bytes, the blob has {manifest.blobs[entry.blob]}"
                )
            _check_kernels(entry)
        except BadEngineFile as error:
            raise BadEngineFile(f"device code {entry.blob!r}: {error}") from error
    total = loaded_nbytes(entries)
    room = sum(part.plan.memory.device_code for part in manifest.parts.values())
    if total > room:
        raise BadEngineFile(f"the plan says {room} bytes of device code, it takes {total}")


def _check_kernels(entry: DeviceCodeEntry) -> None:
    _bounded(entry.sm, "sm", least=10, most=999)
    if not 1 <= len(entry.kernels) <= MAX_KERNELS:
        raise BadEngineFile(f"{len(entry.kernels)} kernels, expected 1 to {MAX_KERNELS}")
    for symbol, kernel in entry.kernels.items():
        for field in KernelEntry.__struct_fields__:
            value = getattr(kernel, field)
            if value is not None:
                _bounded(value, f"{field} of {symbol}", least=int(field == "threads"), most=1 << 20)
        compiled = (kernel.registers, kernel.stack_bytes, kernel.spill_stores, kernel.spill_loads)
        if any((value is None) != (entry.kind == "ptx") for value in compiled):
            raise BadEngineFile(f"{symbol}: registers, stack and spills are of cubins, and of all of them")


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
        if manifest.quality.task is not None:
            _bounded(manifest.quality.task.cases, "quality.task.cases", least=1)


def _bounded(value: int, what: str, least: int = 0, most: int = MAX_BYTES) -> None:
    if not least <= value <= most:
        raise BadEngineFile(f"{what} is {value}, expected {least} to {most}")


def _hint(word: str, valid: Collection[str]) -> str:
    """`nearest`, where a forged name cannot make it slow."""
    if len(word) > 200 or len(valid) > 1000:
        return f"expected one of {len(valid)} names"
    return nearest(word, valid)
