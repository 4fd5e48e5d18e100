"""open_engine: an engine file becomes a Session, after proof that it is whole, fits and suits the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import msgspec

from edge_runtime.backends.protocol import Backend, DeviceCode, Part
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.file import Engine, EnginePart, read_engine
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.manifest import LANGUAGE, Origin
from edge_runtime.engine.memory import adapter_nbytes, check_fits, memory_plan
from edge_runtime.engine.packing import packed_nbytes
from edge_runtime.engine.peft import read_peft
from edge_runtime.engine.plan import KvPlan, MemoryPlan, StepShape
from edge_runtime.engine.probe import Machine
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, BadEngineFile, BadPrefixFile, BadRequest
from edge_runtime.serving.adapters import ReadAdapter
from edge_runtime.serving.chat import ChatTemplate
from edge_runtime.serving.device import AUTO, check_supports, choose_backend
from edge_runtime.serving.grammar import GrammarCompiler
from edge_runtime.serving.guessing import Guessing, choose_guessing
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.prefix_file import SUFFIX
from edge_runtime.serving.session import Session
from edge_runtime.serving.tokenizer import Tokenizer

MAX_THREADS = 256
MAX_WAITING = 64


def open_engine(
    path: str | os.PathLike[str],
    *,
    backend: str = AUTO,
    threads: int = 0,
    kv: str | None = None,
    context: int | None = None,
    parallel: int | None = None,
    speculate: str = AUTO,
    draft_length: int | None = None,
    gated: bool = True,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter] | None = None,
    prefix: str | os.PathLike[str] | None = None,
    verify: bool = True,
    part: str = LANGUAGE,
    memory_limit: int | None = None,
    max_waiting: int = MAX_WAITING,
    machine: Machine | None = None,
    clock: Clock = perf_counter,
) -> Session:
    """Load an engine and serve it.

    backend: auto (what the engine is planned for, refused on another device), cpu, reference, ...
    threads: 0 = all cores of this process. kv: other cache formats than planned, "int8" or "K,V" such as
    "f16,int8". context, parallel: fewer tokens, fewer sequences at once than planned. speculate: off, draft,
    lookup, medusa, or auto (what the engine has parts for); draft_length: tokens guessed at once at most;
    gated: False speculates even where it loses. adapters: name -> PEFT folder, beside those that the engine
    carries. prefix: a saved prefix; None takes the file ENGINE.prefix beside the engine, if there is one.
    verify: check the digest of every plane. memory_limit: bytes it may take, rather than what the machine has
    free. max_waiting: requests in line beyond those that run. machine: a probed machine, instead of probing
    this one. clock: seconds, monotonic.

    Raises BadEngineFile, DeviceMismatch, BackendUnavailable, Unsupported, BadConfig, BadCheckpoint (an
    adapter's folder), BadPrefixFile (a prefix that was asked for); DoesNotFit before anything is allocated.
    """
    options = _Options(
        backend=backend,
        threads=threads,
        kv=kv,
        context=context,
        parallel=parallel,
        speculate=speculate,
        draft_length=draft_length,
        gated=gated,
        adapters=dict(adapters or {}),
        part=part,
        memory_limit=memory_limit,
        max_waiting=max_waiting,
        machine=machine,
        clock=clock,
    )
    engine = read_engine(path, verify=False)
    try:
        session = _open(engine, options, verify)
    except BaseException:
        engine.close()
        raise
    try:
        _load_prefix(session, Path(path), prefix)
    except BaseException:
        session.close()
        raise
    return session


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    backend: str
    threads: int
    kv: str | None
    context: int | None
    parallel: int | None
    speculate: str
    draft_length: int | None
    gated: bool
    adapters: dict[str, str | os.PathLike[str] | Adapter] = field(default_factory=dict)
    part: str
    memory_limit: int | None
    max_waiting: int
    machine: Machine | None
    clock: Clock


@dataclass(frozen=True, slots=True)
class _Sizes:
    kv: KvPlan
    step: StepShape
    threads: int


def _open(engine: Engine, options: _Options, verify: bool) -> Session:
    backend, notices = choose_backend(engine.manifest.fingerprint, options.backend, options.machine)
    try:
        return _load(engine, options, verify, backend, notices)
    except BaseException:
        backend.release()
        raise


def _load(engine: Engine, options: _Options, verify: bool, backend: Backend, notices: list[str]) -> Session:
    """What the header says is settled first: device, kernels, sizes and memory, then the planes are read."""
    manifest = engine.manifest
    part = engine.part(options.part)
    check_supports(backend, part.program, part.plan.tensors)
    code = DeviceCode(manifest.device_code, engine.blob, engine.path)
    backend.check_code(code)
    sizes = _sizes(part, options)
    adapters = _adapters(engine, part, options)
    repacked = _repacked(part, backend)
    if repacked:
        notices.append(
            f"{len(repacked)} of {len(part.weights)} tensors lie in another packing and are repacked at load"
        )
    if (sizes.kv.k, sizes.kv.v) != (part.plan.kv.k, part.plan.kv.v):
        notices.append(
            f"KV cache in {sizes.kv.k},{sizes.kv.v} rather than the planned {part.plan.kv.k},{part.plan.kv.v}"
        )
    speculate = options.speculate if options.part == LANGUAGE else "off"
    guessing = choose_guessing(engine, backend, speculate, options.draft_length, sizes.kv, sizes.step)
    have, source = _have(options.memory_limit, backend)
    ranks = [{tensor: update.rank for tensor, update in a.items()} for a in adapters.values()]
    beside = sum(sum(_repacked(other, backend).values()) for other, _, _ in guessing.parts)
    sizes, memory = _fit(part, sizes, guessing, backend, sum(repacked.values()), beside, ranks, have)
    check_fits(memory, have, source)
    if verify:
        engine.verify()
    tokenizer_json = bytes(engine.blob("tokenizer.json"))
    tokenizer = Tokenizer(tokenizer_json, manifest.vocabulary)
    if manifest.vocabulary.size != part.program.vocab_size:
        raise BadEngineFile(
            f"the vocabulary has {manifest.vocabulary.size} tokens, the program {part.program.vocab_size}"
        )
    template = (
        ChatTemplate(bytes(engine.blob("chat_template"))) if "chat_template" in manifest.blobs else None
    )
    grammars = GrammarCompiler(tokenizer_json, manifest.vocabulary)
    executor = backend.load(
        Part(part.program, part.weights, sizes.kv, sizes.step, code), threads=sizes.threads
    )
    proposer = guessing.load(backend, code, sizes.threads, sizes.kv.page_tokens, options.clock)

    def close() -> None:
        grammars.close()
        if template is not None:
            template.close()
        engine.close()

    session = Session(
        manifest=manifest,
        executor=executor,
        tokenizer=tokenizer,
        chat_template=template,
        plan=part.plan,
        step=sizes.step,
        kv=sizes.kv,
        memory=memory,
        mapped_bytes=memory.weights - sum(repacked.values()) + guessing.weights_nbytes,
        backend=backend.name,
        proposer=proposer,
        gated=options.gated,
        grammars=grammars,
        part=options.part,
        read_adapter=_reader(part.origins, part.program),
        notices=notices,
        max_waiting=options.max_waiting,
        clock=options.clock,
        on_close=close,
    )
    for name, adapter in adapters.items():
        session.load_adapter(name, adapter)
    return session


def _reader(origins: Mapping[str, Origin], program: Program) -> ReadAdapter:
    """Reads PEFT folders; holds no weights, which would keep a closed engine's file open."""
    return lambda folder: read_peft(Path(folder), origins, program)


def _adapters(engine: Engine, part: EnginePart, options: _Options) -> dict[str, Adapter]:
    """Those that the engine carries for this part, and those that were asked for, which come instead."""
    carried = {
        name: engine.adapter(name)
        for name, entry in engine.manifest.adapters.items()
        if entry.part == options.part and name not in options.adapters
    }
    given = {
        name: read_peft(Path(a), part.origins, part.program) if isinstance(a, str | os.PathLike) else a
        for name, a in options.adapters.items()
    }
    return {**carried, **given}


def _load_prefix(session: Session, engine: Path, prefix: str | os.PathLike[str] | None) -> None:
    """The prefix asked for, or the one beside the engine; what lies there for others is only worth a word."""
    if prefix is not None:
        session.load_prefix(prefix)
        return
    beside = engine.with_suffix(SUFFIX)
    if beside.is_file():
        try:
            session.load_prefix(beside)
        except (BadPrefixFile, BadRequest) as error:  # damaged, another engine's, or too long for this cache
            session.add_notice(f"the saved prefix beside the engine is not used: {error}")


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
    sequences = step.sequences if options.parallel is None else options.parallel
    if not 1 <= sequences <= step.sequences:
        raise BadConfig(
            f"parallel {sequences}: the engine is planned for 1 to {step.sequences} sequences at once; "
            "build it with more --sequences"
        )
    if options.kv is not None:
        k, v = kv_pair(options.kv)
        kv = msgspec.structs.replace(kv, k=k, v=v)
    pages = min(kv.pages, sequences * -(-context // kv.page_tokens))
    logits = -(-step.logits * sequences // step.sequences)
    return _Sizes(
        kv=msgspec.structs.replace(kv, pages=pages),
        step=msgspec.structs.replace(step, context=context, sequences=sequences, logits=logits),
        threads=options.threads or _cores(),
    )


def _repacked(part: EnginePart, backend: Backend) -> dict[str, int]:
    """Bytes of each matrix that a backend must bring into its own packing; none on the reference."""
    if backend.name == "reference":
        return {}
    return {
        name: packed_nbytes(t.format, backend.packing[t.format], t.rows, t.cols)
        for name, t in part.weights.items()
        if part.program.tensors[name].role != "vector" and t.packing != backend.packing[t.format]
    }


def _have(limit: int | None, backend: Backend) -> tuple[int, str]:
    if limit is None:
        return backend.memory()
    if limit < 1:
        raise BadConfig(f"memory_limit is {limit}, expected bytes above 0")
    return limit, "the memory limit"


def _fit(
    part: EnginePart,
    sizes: _Sizes,
    guessing: Guessing,
    backend: Backend,
    repacked: int,
    beside: int,
    ranks: list[dict[str, int]],
    have: int,
) -> tuple[_Sizes, MemoryPlan]:
    """The sizes with rows of logits for guesses, and their memory by the planner's own function; repacked
    weights, the part's and those beside it, count twice.
    """
    rows = min(sizes.step.tokens, sizes.step.sequences * guessing.rows)
    step = msgspec.structs.replace(sizes.step, logits=max(sizes.step.logits, rows))
    plan = memory_plan(
        part.program,
        part.plan.tensors,
        sizes.kv,
        step,
        threads=sizes.threads,
        total=have,
        reserve=0,
        context=0,
        draft=guessing.nbytes(backend.name, sizes.threads) + beside,
        adapters=sum(adapter_nbytes(part.program, step, r, backend=backend.name) for r in ranks),
        backend=backend.name,
    )
    memory = msgspec.structs.replace(plan, weights=plan.weights + repacked)
    return _Sizes(sizes.kv, step, sizes.threads), memory


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)
