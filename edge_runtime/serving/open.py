"""open_engine: an engine file becomes a Session, after proof that it is whole, fits and suits the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec

from edge_runtime.backends.protocol import Backend, Part
from edge_runtime.engine.file import Engine, EnginePart, read_engine
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.memory import check_fits, memory_plan
from edge_runtime.engine.packing import packed_nbytes
from edge_runtime.engine.plan import KvPlan, MemoryPlan, StepShape
from edge_runtime.engine.probe import Machine, available_memory
from edge_runtime.errors import BadConfig, BadEngineFile
from edge_runtime.serving.chat import ChatTemplate
from edge_runtime.serving.device import AUTO, check_supports, choose_backend
from edge_runtime.serving.session import Session
from edge_runtime.serving.tokenizer import Tokenizer

MAX_THREADS = 256
MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class _Sizes:
    kv: KvPlan
    step: StepShape
    threads: int


def open_engine(
    path: str | os.PathLike[str],
    *,
    backend: str = AUTO,
    threads: int = 0,
    kv: str | None = None,
    context: int | None = None,
    verify: bool = True,
    part: str = "language",
    memory_limit: int | None = None,
    max_waiting: int = MAX_WAITING,
    machine: Machine | None = None,
) -> Session:
    """Load an engine and serve it.

    backend: auto (what the engine is planned for, refused on another device), cpu, reference, ...
    threads: 0 = all cores of this process. kv: other cache formats than planned, "int8" or "K,V" such as
    "f16,int8". context: fewer tokens than planned. verify: check the digest of every plane. memory_limit:
    bytes it may take, rather than what the machine has free. max_waiting: requests in line beyond those that
    run. machine: a probed machine, instead of probing this one.

    Raises BadEngineFile, DeviceMismatch, BackendUnavailable, Unsupported, BadConfig; DoesNotFit before
    anything is allocated.
    """
    engine = read_engine(path, verify=verify)
    try:
        return _open(
            engine, backend, _Options(threads, kv, context, part, memory_limit, max_waiting), machine
        )
    except BaseException:
        engine.close()
        raise


@dataclass(frozen=True, slots=True)
class _Options:
    threads: int
    kv: str | None
    context: int | None
    part: str
    memory_limit: int | None
    max_waiting: int


def _open(engine: Engine, backend_name: str, options: _Options, machine: Machine | None) -> Session:
    manifest = engine.manifest
    backend, notices = choose_backend(manifest.fingerprint, backend_name, machine)
    part = engine.part(options.part)
    check_supports(backend, part.program, part.plan.tensors)
    sizes = _sizes(part, options)
    repacked = _repacked(part, backend) if backend.name == "cpu" else {}
    if repacked:
        notices.append(
            f"{len(repacked)} of {len(part.weights)} tensors lie in another packing and are repacked at load"
        )
    if (sizes.kv.k, sizes.kv.v) != (part.plan.kv.k, part.plan.kv.v):
        notices.append(
            f"KV cache in {sizes.kv.k},{sizes.kv.v} rather than the planned {part.plan.kv.k},{part.plan.kv.v}"
        )
    have, source = _have(options.memory_limit)
    memory = _memory(part, sizes, sum(repacked.values()), have)
    check_fits(memory, have, source)
    tokenizer = Tokenizer(bytes(engine.blob("tokenizer.json")), manifest.vocabulary)
    if manifest.vocabulary.size != part.program.vocab_size:
        raise BadEngineFile(
            f"the vocabulary has {manifest.vocabulary.size} tokens, the program {part.program.vocab_size}"
        )
    template = (
        ChatTemplate(bytes(engine.blob("chat_template"))) if "chat_template" in manifest.blobs else None
    )
    executor = backend.load(Part(part.program, part.weights, sizes.kv, sizes.step), threads=sizes.threads)

    def close() -> None:
        if template is not None:
            template.close()
        engine.close()

    return Session(
        manifest=manifest,
        executor=executor,
        tokenizer=tokenizer,
        chat_template=template,
        plan=part.plan,
        step=sizes.step,
        kv=sizes.kv,
        memory=memory,
        mapped_bytes=memory.weights - sum(repacked.values()),
        backend=backend.name,
        notices=notices,
        max_waiting=options.max_waiting,
        on_close=close,
    )


def _sizes(part: EnginePart, options: _Options) -> _Sizes:
    """The plan's sizes with what was asked for otherwise. Raises BadConfig."""
    kv, step = part.plan.kv, part.plan.step
    if not 0 <= options.threads <= MAX_THREADS:
        raise BadConfig(f"threads is {options.threads}, expected 0 (all cores) to {MAX_THREADS}")
    if options.max_waiting < 1:
        raise BadConfig(f"max_waiting is {options.max_waiting}, expected at least 1")
    longest = min(step.context, part.program.max_context)
    context = longest if options.context is None else options.context
    if not 1 < context <= longest:
        raise BadConfig(
            f"context {context}: the engine is planned for 2 to {longest} tokens; "
            "build it with a longer --context"
        )
    if options.kv is not None:
        k, v = kv_pair(options.kv)
        kv = msgspec.structs.replace(kv, k=k, v=v)
    pages = min(kv.pages, step.sequences * -(-context // kv.page_tokens))
    return _Sizes(
        kv=msgspec.structs.replace(kv, pages=pages),
        step=msgspec.structs.replace(step, context=context),
        threads=options.threads or _cores(),
    )


def _repacked(part: EnginePart, backend: Backend) -> dict[str, int]:
    """Bytes of each matrix that the backend must bring into its own packing."""
    return {
        name: packed_nbytes(t.format, backend.packing[t.format], t.rows, t.cols)
        for name, t in part.weights.items()
        if part.program.tensors[name].role != "vector" and t.packing != backend.packing[t.format]
    }


def _have(limit: int | None) -> tuple[int, str]:
    if limit is None:
        return available_memory()
    if limit < 1:
        raise BadConfig(f"memory_limit is {limit}, expected bytes above 0")
    return limit, "the memory limit"


def _memory(part: EnginePart, sizes: _Sizes, repacked: int, have: int) -> MemoryPlan:
    """The plan's memory by the planner's own function, for the sizes in use; repacked weights count twice."""
    plan = memory_plan(
        part.program,
        part.plan.tensors,
        sizes.kv,
        sizes.step,
        threads=sizes.threads,
        total=have,
        reserve=0,
        context=0,
    )
    return msgspec.structs.replace(plan, weights=plan.weights + repacked)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)
