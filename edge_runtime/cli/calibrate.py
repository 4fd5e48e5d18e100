"""`edge-bench --calibrate`: how fast the cpu backend is on this machine, as a profile that plans are made by.

What is simple is measured first, and what is left of each later measurement is what it adds: values, then
stages, then products of every format that the backend has kernels for, then attention for every cache format,
then whole decoders, then steps and requests of a session. The model that the figures are for is
engine/roofline.py's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import yaml

from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.cli import synthetic
from edge_runtime.cli.measure import run
from edge_runtime.cli.timer import CHUNK, Timer, step_of
from edge_runtime.cli.workload import RandomTokens
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS, kv_pair
from edge_runtime.engine.packing import PANEL, cpu_packing, packed_nbytes
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.probe import measure_bandwidth
from edge_runtime.engine.profile import FormatSpeed, Measured, Profile, QueryTime
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import (
    Step,
    family,
    odd_heads,
    timer,
    unbroken_stages,
    values_per_token,
    weights_read,
)
from edge_runtime.errors import BackendUnavailable, BadConfig, Unsupported
from edge_runtime.serving.device import get_backend
from edge_runtime.serving.open import open_engine
from edge_runtime.serving.session import Session

_WIDTH = 1024  # columns of the matrices that rates are timed with
_SHORT = 64  # columns where what a row costs beside them shows
_CHUNK_ROWS = 4096  # of the matrices that chunks are timed with
_CACHED = 6 << 20  # bytes of weights that the last cache keeps, beyond what the cores' own do
_OWN_CACHES = 4  # times the cores' own, where that is more: of fewer bytes they would keep a part
_LEAST_STREAM = 96 << 20  # bytes of weights that no cache keeps
_VOCABULARIES = (512, 32768)
_DECODER = {"width": 256, "hidden": 768, "layers": 6}  # 4 MB of weights leave the cores' caches to no one
_SMALL_DECODER = {"width": 64, "hidden": 192, "layers": 6}  # 0.3 MB leave them to the host
_CHAINED = (40, 200)  # small products in a row that stages are timed with
_PROMPT = 16  # tokens of a request for the overheads of a session
DECODE = 16  # tokens written to time a step: few, so that a busy machine lets some runs be
Watch = Callable[[str], None]


_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


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
    watch("values and stages")
    value, odd = _value(timing), _odd_head(timing)
    stage = _stage(timing, value)
    last, own = last_cache(), core_cache()
    kept = max(_CACHED, min(last // 2, _OWN_CACHES * threads * own))
    names = list(formats) or runnable()
    speeds = {}
    for i, name in enumerate(names, 1):
        watch(f"products {i}/{len(names)}: {name}")
        speeds[name] = _products(timing, name, stage, value, max(_LEAST_STREAM, 3 * last), kept)
    watch("caches")
    resident, streamed = _caches(timing, names[0], stage, kept, max(_LEAST_STREAM, 3 * last))
    watch("attention")
    attending = _attention(timing, stage)
    measured = Measured(
        threads=threads,
        request_us=0.0,
        step_us=0.0,
        small_step_us=0.0,
        token_us=0.0,
        stage_us=1e6 * stage,
        unit_us=0.0,
        value_ns=1e9 * value,
        odd_head_ns=1e9 * odd,
        logit_ns=0.0,
        query=attending.alone,
        chunk_query=attending.chunk,
        row_ns=attending.row,
        odd_kv_ns=attending.odd,
        kv_ns=attending.keys,
        cache_bytes=resident,
        stream_bytes=streamed,
        core_cache_bytes=own,
        formats=speeds,
    )
    measured = _whole(_with(base, bandwidth, measured), measured, timing)
    watch("steps and requests")
    return _with(base, bandwidth, _session(measured, timing))


def runnable() -> list[str]:
    """Formats that the cpu backend has kernels for."""
    program = synthetic.products(64, 1)
    backend = get_backend("cpu")
    names = {}
    for fmt in FORMATS:
        chosen = {n: t.format for n, t in synthetic.plans_of(program, fmt).items()}
        names[fmt] = backend.supports(program, chosen).ok
    return [fmt for fmt, ok in names.items() if ok]


def last_cache(root: Path = _CACHES) -> int:
    """Bytes of the largest cache that core 0 sees; 0 where the system does not say."""
    return max(_cache_sizes(root).values(), default=0)


def core_cache(root: Path = _CACHES) -> int:
    """Bytes of the second cache of core 0, the last that is a core's own; 0 where the system does not say."""
    return _cache_sizes(root).get(2, 0)


def _cache_sizes(root: Path) -> dict[int, int]:
    """Bytes of the largest cache of each level."""
    sizes: dict[int, int] = {}
    for entry in sorted(root.glob("index*/size")):
        text = entry.read_text(encoding="ascii").strip()
        level = int((entry.parent / "level").read_text(encoding="ascii"))
        if text[:-1].isdigit() and text[-1:] in "KM":
            size = int(text[:-1]) << (10 if text.endswith("K") else 20)
            sizes[level] = max(size, sizes.get(level, 0))
    return sizes


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
    seconds = clock.program(program, "int8_row", CHUNK)
    return seconds / (values_per_token(program) * -(-CHUNK // clock.threads))


def _odd_head(clock: Timer) -> float:
    """Seconds that a head which is not whole vectors adds to its rotation or its append, on one thread."""
    whole, odd = (synthetic.turning(256, head_dim, 8) for head_dim in (32, 8))
    more = clock.program(odd, "int8_row", CHUNK) - clock.program(whole, "int8_row", CHUNK)
    return max(0.0, more) / (odd_heads(odd) * -(-CHUNK // clock.threads))


def _stage(clock: Timer, value: float) -> float:
    """Seconds of a stage: what is left of a small product after its values and rows."""
    row = _row(clock, "int8_row", _SHORT, _CHUNK_ROWS, 1)
    few, many = (synthetic.products(_SHORT, count) for count in _CHAINED)
    seconds = [_usual_step(program, clock, 1) for program in (few, many)]
    values = value * (values_per_token(many) - values_per_token(few))
    products = row * _SHORT * (_CHAINED[1] - _CHAINED[0])
    more = seconds[1] - seconds[0] - values - products
    return max(0.0, more / (unbroken_stages(many) - unbroken_stages(few)))


def _products(clock: Timer, fmt: str, stage: float, value: float, stream: int, kept: int) -> FormatSpeed:
    """Rates and costs of a row of one format; `stream` bytes of weights come from memory, `kept` from the
    last cache."""
    each = _row_bytes(fmt, _WIDTH)

    def line(wide_rows: int, short_rows: int, tokens: int) -> tuple[float, float]:
        """Seconds of a column of a row and, on one thread, of a row beside its columns; each token's."""
        wide = _row(clock, fmt, _WIDTH, wide_rows, tokens)
        short = _row(clock, fmt, _SHORT, short_rows, tokens)
        column = max(wide - short, 0.1 * wide) / (_WIDTH - _SHORT)
        return column, max(0.0, short - _SHORT * column) * clock.threads

    column, output = line(kept // each, kept // _row_bytes(fmt, _SHORT), 1)
    operations, chunk_output = line(_CHUNK_ROWS, _CHUNK_ROWS, CHUNK)
    program = synthetic.products(_WIDTH, max(2, stream // (each * _WIDTH)))
    seconds = clock.program(program, fmt, 1, patient=True)  # memory is shared with others
    outputs = output / clock.threads * sum(s.rows for s in program.tensors.values() if s.role == "matrix")
    inputs = value * values_per_token(program) if family(fmt)[0] != "float" else 0.0
    beside = stage * unbroken_stages(program) + inputs + outputs
    nbytes = weights_read(program, synthetic.plans_of(program, fmt))
    return FormatSpeed(
        gbps=nbytes / 1e9 / max(seconds - beside, 0.1 * seconds),
        cached_gbps=each / _WIDTH / 1e9 / column,
        gops=2.0 / 1e9 / operations,
        output_ns=1e9 * output,
        chunk_output_ns=1e9 * chunk_output,
    )


def _caches(clock: Timer, fmt: str, stage: float, kept: int, stream: int) -> tuple[int, int]:
    """Bytes of weights up to which the last cache keeps all of them, and from which on none.

    What a system calls its last cache may be shared with others: the time of a byte says what stays.
    """
    sizes = [kept]
    while sizes[-1] < stream:
        sizes.append(min(2 * sizes[-1], stream))
    times = []
    for size in sizes:
        program = synthetic.products(_WIDTH, max(2, size // (_row_bytes(fmt, _WIDTH) * _WIDTH)))
        nbytes = weights_read(program, synthetic.plans_of(program, fmt))
        seconds = clock.program(program, fmt, 1, patient=True)
        times.append(max(seconds - stage * unbroken_stages(program), 0.1 * seconds) / nbytes)
    return cache_ends(sizes, times)


def cache_ends(sizes: Sequence[int], times: Sequence[float]) -> tuple[int, int]:
    """Of ascending sizes and seconds of a byte: the sizes where a tenth and nine tenths of the time between
    the first and the last are reached."""
    first, last = times[0], max(times)

    def reaches(share: float) -> int:
        wanted = first + share * (last - first)
        at = next(i for i, t in enumerate(times) if t >= wanted)
        if at == 0:
            return sizes[0]
        part = (wanted - times[at - 1]) / (times[at] - times[at - 1])
        return int(sizes[at - 1] * float(sizes[at] / sizes[at - 1]) ** part)

    return reaches(0.1), reaches(0.9)


def _row(clock: Timer, fmt: str, cols: int, rows: int, tokens: int) -> float:
    """Seconds of a row of one matrix, for each token: what `rows` take longer than a panel of them."""
    few, many = (clock.program(synthetic.product(n, cols), fmt, tokens) for n in (PANEL, rows))
    return max(many - few, 0.1 * many) / ((rows - PANEL) * tokens)


def _row_bytes(fmt: str, cols: int) -> int:
    """Bytes of a row as the cpu backend stores it."""
    return packed_nbytes(fmt, cpu_packing(fmt), PANEL, cols) // PANEL


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
    """The value's time again, and a unit's: what is left of a chunk through two whole decoders, one of few
    values a stage and one of many."""
    if "int8_row" not in measured.formats:
        return measured
    turns = -(-CHUNK // clock.threads)
    values: list[float] = []
    units: list[float] = []
    left: list[float] = []
    for shape in (_SMALL_DECODER, _DECODER):
        program = synthetic.decoder(512, **shape)
        executor, kv = clock.load(program, "int8_row")
        seconds = clock.seconds(executor, kv, CHUNK)
        executor.close()
        known = timer(program, synthetic.plans_of(program, "int8_row"), kv, profile, profile.mode())
        values.append(1e-9 * turns * values_per_token(program))
        units.append(1e-6 * (CHUNK - 1) * (unbroken_stages(program) // 2))
        left.append(seconds - known([Step(CHUNK, 0, True)]) + values[-1] * measured.value_ns)
    unit = (left[0] * values[1] - left[1] * values[0]) / (units[0] * values[1] - units[1] * values[0])
    unit = min(max(0.0, unit), max(0.0, left[0]) / units[0])
    value = max(0.0, left[1] - unit * units[1]) / values[1]
    return msgspec.structs.replace(measured, value_ns=value, unit_us=unit)


def _session(measured: Measured, clock: Timer) -> Measured:
    """What steps, tokens and requests of a session take beyond the backend's work.

    Logits from two vocabularies of a tiny model; the rest from one whose weights leave the caches to no one,
    and steps also from one whose weights do not.
    """
    few, many = _VOCABULARIES
    tiny = [_beyond_step(synthetic.decoder(vocab), clock) for vocab in _VOCABULARIES]
    logit = max(0.0, (tiny[1] - tiny[0]) / (many - few))
    large = synthetic.decoder(few, **_DECODER)
    small, step = (_beyond_step(p, clock) for p in (synthetic.decoder(few, **_SMALL_DECODER), large))
    token, request = _beyond_request(large, clock, step)
    return msgspec.structs.replace(
        measured,
        step_us=1e6 * max(0.0, step - few * logit - token),
        small_step_us=1e6 * max(0.0, small - few * logit - token),
        token_us=1e6 * token,
        logit_ns=1e9 * logit,
        request_us=1e6 * request,
    )


def _beyond_step(program: Program, clock: Timer) -> float:
    """Seconds of a decoding step, less what the backend takes for it."""
    with _served(program, clock) as session:
        _, *behind = _requests(session, _PROMPT, _PROMPT)
        short, long = (statistics.median(times) for times in clock.each(behind, patient=True))
    return max(0.0, (long - short) / DECODE - _usual_step(program, clock, 1, _PROMPT + DECODE // 2))


def _beyond_request(program: Program, clock: Timer, step: float) -> tuple[float, float]:
    """Seconds of a further token of a prompt, and of a request, less what the backend and the host, `step`,
    take for steps."""
    with _served(program, clock) as session:
        first, longer = (clock.usual(_requests(session, n, _PROMPT)[0]) for n in (_PROMPT, CHUNK))
    short, long = (_usual_step(program, clock, tokens) for tokens in (_PROMPT, CHUNK))
    token = max(0.0, (longer - first - (long - short)) / (CHUNK - _PROMPT))
    return token, max(0.0, first - short - step - (_PROMPT - 1) * token)


@contextmanager
def _served(program: Program, clock: Timer) -> Iterator[Session]:
    """A session on an engine of that program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.edge"
        synthetic.write_engine(path, program, "int8_row")
        with open_engine(str(path), backend="cpu", threads=clock.threads, verify=False) as session:
            yield session


def _usual_step(program: Program, clock: Timer, tokens: int, before: int = 0) -> float:
    """Seconds that the backend takes for a step as it goes."""
    executor, kv = clock.load(program, "int8_row")
    seconds = clock.usual(step_of(executor, kv, tokens, before))
    executor.close()
    return seconds


def session_seconds(session: Session, clock: Timer, prompt: int, depth: int) -> tuple[float, float]:
    """A request for one token after `prompt` tokens that no cache knows; a decoding step behind `depth`."""
    first, shortest, longest = session_times(session, clock, prompt, depth)
    return first, (longest - shortest) / DECODE


def session_times(session: Session, clock: Timer, prompt: int, depth: int) -> tuple[float, float, float]:
    """That request; then requests for one token and for DECODE more behind `depth`, whose difference decoding
    is."""
    first, *behind = _requests(session, prompt, depth)
    shortest, longest = (times[0] for times in clock.each(behind))
    return clock.fastest(first), shortest, longest


def _requests(
    session: Session, prompt: int, depth: int
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """What session_times measures, to be done again and again."""
    draw = RandomTokens(session)
    run(session, draw(min(8, depth)), 2)  # warm
    known = draw(depth)  # after its first run it is cached, and what is left to time is decoding
    run(session, known, 1)
    return (
        lambda: run(session, draw(prompt), 1),
        lambda: run(session, known, 1),
        lambda: run(session, known, 1 + DECODE),
    )


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
