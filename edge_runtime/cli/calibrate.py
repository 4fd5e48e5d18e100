"""`edge-bench --calibrate`: how fast the cpu backend is on this machine, as a profile that plans are made by.

What is simple is measured first, and what is left of each later measurement is what it adds: stages, then
values, then products of every format that the backend has kernels for, then attention for every cache format,
then steps and requests of a whole session. The model that the figures are for is engine/roofline.py's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import yaml

from edge_runtime.backends.protocol import Executor, Part, StepBatch
from edge_runtime.cli import synthetic
from edge_runtime.cli.measure import run
from edge_runtime.cli.workload import RandomTokens
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS, kv_pair
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.probe import measure_bandwidth
from edge_runtime.engine.profile import FormatSpeed, Measured, Profile, QueryTime
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import (
    Step,
    family,
    timer,
    unbroken_stages,
    values_per_token,
    weights_read,
)
from edge_runtime.errors import BackendUnavailable, BadConfig, Unsupported
from edge_runtime.serving.device import get_backend
from edge_runtime.serving.open import open_engine
from edge_runtime.serving.session import Session

CHUNK = 128  # tokens of a step of a prompt, as plans have it
_WIDTH = 1024  # of the square matrices that products are timed with
_CACHED = 6 << 20  # bytes of weights that the last cache keeps, beyond what the cores' own do
_LEAST_STREAM = 96 << 20  # bytes of weights that no cache keeps
_VOCABULARIES = (512, 32768)
_DECODER = {"width": 256, "hidden": 768, "layers": 6}  # 4 MB of weights leave the cores' caches to no one
_PROMPT = 16  # tokens of a request for the overheads of a session
DECODE = 16  # tokens written to time a step: few, so that a busy machine lets some runs be
Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timer:
    """Seconds of forward passes: the fastest, once it was met three times within 3%, or after `limit_s`."""

    threads: int
    limit_s: float = 1.0
    clock: Callable[[], float] = perf_counter

    def load(self, program: Program, fmt: str, k: str = "int8", v: str = "int8") -> tuple[Executor, KvPlan]:
        step = StepShape(context=program.max_context, sequences=1, tokens=CHUNK, logits=1)
        kv = synthetic.cache_of(program, k, v, step)
        weights = synthetic.weights_of(program, synthetic.plans_of(program, fmt))
        backend = get_backend("cpu")
        return backend.load(Part(program, weights, kv, step), threads=self.threads), kv

    def seconds(
        self, executor: Executor, kv: KvPlan, tokens: int, before: int = 0, *, patient: bool = False
    ) -> float:
        """One step of `tokens` tokens after `before`."""
        batch = StepBatch(
            tokens=np.arange(tokens, dtype=np.int32) % synthetic.VOCAB,
            positions=np.arange(before, before + tokens, dtype=np.int32),
            sequence=np.zeros(tokens, np.int32),
            page_tables=np.arange(max(1, kv.pages), dtype=np.int32)[None, :] if kv.pages else _NO_PAGES,
            logit_rows=np.array([tokens - 1], np.int32),
        )
        executor.forward(batch)  # warms up, and checks the batch
        return self.fastest(lambda: executor.forward(batch), patient=patient)

    def fastest(self, work: Callable[[], object], *, patient: bool = False) -> float:
        """The least seconds of something done again and again; `patient`: until the limit in any case,
        for what other programs slow down evenly."""
        taken: list[float] = []
        start = perf_counter()
        while len(taken) < _ALIKE or perf_counter() - start < self.limit_s:
            began = self.clock()
            work()
            taken = sorted([*taken, self.clock() - began])
            if not patient and len(taken) >= 2 * _ALIKE and taken[_ALIKE - 1] <= _NEAR * taken[0]:
                break
        return taken[0]


_ALIKE, _NEAR = 3, 1.03  # so many times within this factor, and a time is believed
_NO_PAGES = np.full((1, 1), -1, np.int32)


def calibrate(
    base: Profile,
    threads: int,
    watch: Watch,
    formats: Sequence[str] = (),
    limit_s: float = 1.0,
    clock: Callable[[], float] = perf_counter,
) -> Profile:
    """The profile with what was measured here. `formats`: those to time [all that the backend runs];
    `limit_s`: for each measurement, on a machine that is not quiet; `clock`: what counts as time.

    Raises Unsupported for a profile of another backend, BackendUnavailable without the native library.
    """
    if base.backend != "cpu":
        raise Unsupported(
            f"--calibrate measures the cpu backend; profile {base.name!r} is for {base.backend}; use "
            "--profile cpu or auto"
        )
    ready = get_backend("cpu").available()
    if not ready.ok:
        raise BackendUnavailable(ready.why)
    timing = Timer(threads, limit_s, clock)
    watch("reading memory")
    bandwidth = measure_bandwidth(threads, limit_s=max(0.2, limit_s))
    watch("stages and values")
    value = _value(timing)
    stage, output = _stage(timing, value)
    cache = last_cache()
    names = list(formats) or runnable()
    speeds = {}
    for i, name in enumerate(names, 1):
        watch(f"products {i}/{len(names)}: {name}")
        speeds[name] = _products(timing, name, stage, value, output, cache)
    watch("attention")
    attending = _attention(timing, stage)
    measured = Measured(
        threads=threads,
        request_us=0.0,
        step_us=0.0,
        token_us=0.0,
        stage_us=1e6 * stage,
        value_ns=1e9 * value,
        output_ns=1e9 * output,
        logit_ns=0.0,
        query=attending.alone,
        chunk_query=attending.chunk,
        row_ns=attending.row,
        odd_kv_ns=attending.odd,
        kv_ns=attending.keys,
        cache_bytes=cache // 2,
        formats=speeds,
    )
    measured = _whole(_with(base, bandwidth, measured), measured, timing)
    profile = _with(base, bandwidth, measured)
    watch("steps and requests")
    return _with(base, bandwidth, _session(profile, measured, timing))


def runnable() -> list[str]:
    """Formats that the cpu backend has kernels for."""
    program = synthetic.products(64, 1)
    backend = get_backend("cpu")
    names = {}
    for fmt in FORMATS:
        chosen = {n: t.format for n, t in synthetic.plans_of(program, fmt).items()}
        names[fmt] = backend.supports(program, chosen).ok
    return [fmt for fmt, ok in names.items() if ok]


def last_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that core 0 sees; 0 where the system does not say."""
    sizes = [0]
    for entry in sorted(root.glob("index*/size")):
        text = entry.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1:] in "KM":
            sizes.append(int(text[:-1]) << (10 if text.endswith("K") else 20))
    return max(sizes)


def profile_yaml(profile: Profile, machine: str, date: str) -> str:
    """The file that `load_profile` reads back."""
    rounded = _rounded(profile.as_mapping())
    text = yaml.safe_dump(rounded, sort_keys=False, allow_unicode=True, width=110)
    return f"# Measured by edge-bench --calibrate on {machine}, {date}.\n{text}"


def write_profile(profile: Profile, path: Path, machine: str, date: str) -> None:
    """Raises BadConfig where it cannot be written."""
    try:
        path.write_text(profile_yaml(profile, machine, date), encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"--output {str(path)!r:.80}: {error}") from error


def _value(clock: Timer) -> float:
    """Seconds of one value on one thread."""
    program = synthetic.values(4096, 24)
    executor, kv = clock.load(program, "int8_row")
    seconds = clock.seconds(executor, kv, CHUNK)
    executor.close()
    return seconds / (values_per_token(program) * -(-CHUNK // clock.threads))


def _stage(clock: Timer, value: float) -> tuple[float, float]:
    """Seconds of a stage and, on one thread, of an output of a product: what the same bytes of weights take
    longer in many small linears than in few, with one token and with a chunk."""
    times: list[list[float]] = []
    stages: list[int] = []
    outputs: list[int] = []
    for width in (_WIDTH // 4, _WIDTH):
        program = synthetic.products(width, _CACHED // width**2)
        executor, kv = clock.load(program, "int8_row")
        inputs = value * values_per_token(program)
        one = clock.seconds(executor, kv, 1) - inputs
        many = clock.seconds(executor, kv, CHUNK) - inputs * -(-CHUNK // clock.threads)
        times.append([one, many])
        stages.append(unbroken_stages(program))
        outputs.append(sum(s.rows for s in program.tensors.values() if s.role == "matrix"))
        executor.close()
    stage = max(0.0, (times[0][0] - times[1][0]) / (stages[0] - stages[1]))
    more = times[0][1] - times[1][1] - stage * (stages[0] - stages[1])
    return stage, max(0.0, more * clock.threads / (CHUNK * (outputs[0] - outputs[1])))


def _products(clock: Timer, fmt: str, stage: float, value: float, output: float, cache: int) -> FormatSpeed:
    """Rates of one format, from weights in memory and in the last cache."""
    one = synthetic.products(_WIDTH, 1)
    each = weights_read(one, synthetic.plans_of(one, fmt))
    rates = []
    gops = 0.0
    for size in (max(_LEAST_STREAM, 3 * cache), _CACHED):
        program = synthetic.products(_WIDTH, max(2, round(size / each)))
        matrices = [s for s in program.tensors.values() if s.role == "matrix"]
        nbytes = weights_read(program, synthetic.plans_of(program, fmt))
        executor, kv = clock.load(program, fmt)
        fixed = stage * unbroken_stages(program)
        inputs = value * values_per_token(program) if family(fmt)[0] != "float" else 0.0
        written = output * sum(s.rows for s in matrices) / clock.threads
        seconds = clock.seconds(executor, kv, 1, patient=size != _CACHED)  # memory is shared with others
        rates.append(nbytes / 1e9 / max(seconds - fixed - inputs - written, 0.1 * seconds))
        if size == _CACHED:
            seconds = clock.seconds(executor, kv, CHUNK)
            beside = fixed + inputs * -(-CHUNK // clock.threads) + written * CHUNK
            gops = 2.0 * CHUNK * sum(s.size for s in matrices) / 1e9 / max(seconds - beside, 0.1 * seconds)
        executor.close()
    return FormatSpeed(gbps=rates[0], cached_gbps=rates[1], gops=gops)


@dataclass(frozen=True, slots=True)
class Attending:
    """Times of a query alone and in a chunk; ns of a row of the cache, of its values by cache format, and of
    one where heads are not whole vectors. All as all threads together take them."""

    alone: QueryTime
    chunk: QueryTime
    row: float
    keys: dict[str, float]
    odd: float


def _attention(clock: Timer, stage: float) -> Attending:
    """See `Attending`."""
    layers, context = 4, 512
    before = context - CHUNK

    def cost(heads: int, head_dim: int, tokens: int, kv_name: str = "f16") -> float:
        """Nanoseconds for each key of one layer with 4 KV heads."""
        program = synthetic.attending(heads, 4, head_dim, layers, context)
        executor, kv = clock.load(program, "int8_row", *kv_pair(kv_name))
        for at in range(0, context, CHUNK):  # keys to read
            _fill(executor, kv, at)
        seconds = clock.seconds(executor, kv, tokens, before)
        executor.close()
        seen = before + (tokens + 1) / 2
        return 1e9 * max(0.0, seconds - stage * unbroken_stages(program)) / (layers * seen)

    def query(tokens: int) -> QueryTime:
        narrow, wide = ((cost(32, d, tokens) - cost(4, d, tokens)) / (28 * tokens) for d in (16, 64))
        value = max(0.0, (wide - narrow) / 48)
        return QueryTime(value_ns=value, score_ns=max(0.0, narrow - 16 * value))

    alone, chunk = query(1), query(CHUNK)

    def row(head_dim: int, kv_name: str) -> float:
        scores = 16 * (head_dim * alone.value_ns + alone.score_ns)
        return max(0.0, (cost(16, head_dim, 1, kv_name) - scores) / 4)

    wide, narrow = row(64, "int8"), row(16, "int8")
    fixed = max(0.0, narrow - (wide - narrow) / 3)  # what is left at no width at all
    keys = {name: max(0.0, (row(64, name) - fixed) / 64) for name in K_FORMATS}
    scores = 16 * (16 * alone.value_ns + alone.score_ns)  # 8 values are padded to 16
    odd = max(0.0, ((cost(16, 8, 1, "int8") - scores) / 4 - fixed) / 8)
    return Attending(alone, chunk, fixed, keys, odd)


def _fill(executor: Executor, kv: KvPlan, at: int) -> None:
    """Write the keys of one chunk of a sequence."""
    executor.forward(
        StepBatch(
            tokens=np.arange(CHUNK, dtype=np.int32) % synthetic.VOCAB,
            positions=np.arange(at, at + CHUNK, dtype=np.int32),
            sequence=np.zeros(CHUNK, np.int32),
            page_tables=np.arange(kv.pages, dtype=np.int32)[None, :],
            logit_rows=np.array([CHUNK - 1], np.int32),
        )
    )


def _whole(profile: Profile, measured: Measured, clock: Timer) -> Measured:
    """The value's time again, from a chunk through a whole decoder: its rotations, appended keys and
    activations are what the sums and norms alone are not."""
    if "int8_row" not in measured.formats:
        return measured
    program = synthetic.decoder(512, **_DECODER)
    executor, kv = clock.load(program, "int8_row")
    seconds = clock.seconds(executor, kv, CHUNK)
    executor.close()
    known = timer(program, synthetic.plans_of(program, "int8_row"), kv, profile, profile.mode())
    turns = -(-CHUNK // clock.threads)
    left = seconds - known([Step(CHUNK, 0, True)])
    more = 1e9 * left / (turns * values_per_token(program))
    return msgspec.structs.replace(measured, value_ns=max(0.0, measured.value_ns + more))


def _session(profile: Profile, measured: Measured, clock: Timer) -> Measured:
    """What steps, tokens and requests of a session take beyond the backend's work.

    Logits from two vocabularies of a tiny model; the rest from one whose weights leave the caches to no one.
    """
    few, many = _VOCABULARIES
    tiny = [_beyond(synthetic.decoder(vocab), profile, clock)[0] for vocab in _VOCABULARIES]
    logit = max(0.0, (tiny[1] - tiny[0]) / (many - few))
    step, token, request = _beyond(synthetic.decoder(few, **_DECODER), profile, clock)
    return msgspec.structs.replace(
        measured,
        step_us=1e6 * max(0.0, step - few * logit - token),
        token_us=1e6 * token,
        logit_ns=1e9 * logit,
        request_us=1e6 * request,
    )


def _beyond(program: Program, profile: Profile, clock: Timer) -> tuple[float, float, float]:
    """Seconds of a decoding step, of a further token of a prompt, and of a request, less what the backend
    takes for them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.edge"
        plan = synthetic.write_engine(path, program, "int8_row")
        with open_engine(str(path), backend="cpu", threads=clock.threads, verify=False) as session:
            first, step = session_seconds(session, clock, _PROMPT, _PROMPT)
            longer, _ = session_seconds(session, clock, CHUNK, _PROMPT)
    seconds = timer(program, plan.tensors, plan.kv, profile, profile.mode())
    short, long = seconds([Step(_PROMPT, 0, True)]), seconds([Step(CHUNK, 0, True)])
    beyond = max(0.0, step - seconds([Step(1, _PROMPT + DECODE // 2, True)]))
    token = max(0.0, (longer - first - (long - short)) / (CHUNK - _PROMPT))
    return beyond, token, max(0.0, first - short - beyond - (_PROMPT - 1) * token)


def session_seconds(session: Session, clock: Timer, prompt: int, depth: int) -> tuple[float, float]:
    """A request for one token after `prompt` tokens that no cache knows; a decoding step behind `depth`."""
    draw = RandomTokens(session)
    run(session, draw(min(8, depth)), 2)  # warm
    first = clock.fastest(lambda: run(session, draw(prompt), 1))
    known = draw(depth)  # after its first run it is cached, and what is left to time is decoding
    run(session, known, 1)
    shortest = clock.fastest(lambda: run(session, known, 1))
    longest = clock.fastest(lambda: run(session, known, 1 + DECODE))
    return first, (longest - shortest) / DECODE


def _with(base: Profile, bandwidth: float, measured: Measured) -> Profile:
    """The base profile with measured figures; shares of the peak are those of the fastest format."""
    mode = base.mode()
    fastest = max(s.gbps for s in measured.formats.values())
    gops = max(s.gops for s in measured.formats.values())
    efficiency = msgspec.structs.replace(
        base.efficiency,
        bandwidth=min(1.0, fastest / bandwidth),
        compute=min(1.0, gops / (1e3 * mode.compute.int8)),
        launch_overhead_us=max(0.01, measured.stage_us),
        measured=measured,
    )
    mode = msgspec.structs.replace(mode, bandwidth_gbps=bandwidth)
    return msgspec.structs.replace(
        base, efficiency=efficiency, power_modes={**base.power_modes, base.default_mode: mode}
    )


def _rounded(value: object) -> object:
    """Four digits of every float, which is more than a measurement has."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
