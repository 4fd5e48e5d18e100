"""`edge-bench --calibrate`: how fast the cpu backend is on this machine, as a profile that plans are made by.

Products of every format that the backend has kernels for, attention over every cache format, whole decoders
and sessions are timed in rounds, one after the other, and of each the fastest counts (of what comes from
memory the middle one): what else the machine does for a while then slows down everything in one round, not
one thing in all. Then the costs of the speed model (engine/roofline.py) are those that fit all of it at once
(fit.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import msgspec
import yaml

from edge_runtime.cli import synthetic
from edge_runtime.cli.experiment import BASE, Experiment, Served, experiments, streamed
from edge_runtime.cli.fit import Setting, fit
from edge_runtime.cli.timer import Timer
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.probe import measure_bandwidth
from edge_runtime.engine.profile import Measured, Profile
from edge_runtime.engine.roofline import Step, weights_read
from edge_runtime.errors import BackendUnavailable, BadConfig, Unsupported
from edge_runtime.serving.device import get_backend

ROUNDS = 3
_CACHED = 6 << 20  # bytes of weights that the last cache keeps, beyond what the cores' own do
_OWN_CACHES = 4  # times the cores' own, where that is more: of fewer bytes they would keep a part
_LEAST_STREAM = 128 << 20  # bytes of weights that no cache keeps
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
Watch = Callable[[int, int, str], None]  # steps done, of so many, and what is next


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The profile; and of everything timed, the model's seconds as a share of those measured, less 1."""

    profile: Profile
    errors: dict[str, float]


def calibrate(
    base: Profile,
    threads: int,
    watch: Watch,
    formats: Sequence[str] = (),
    limit_s: float = 1.0,
    clock: Callable[[], float] = perf_counter,
) -> Calibrated:
    """What ROUNDS rounds have measured; `limit_s` is for those of one thing together. See Calibration."""
    calibration = Calibration(base, threads, formats, limit_s / ROUNDS, clock)
    for number in range(ROUNDS):
        calibration.round(partial(_in_round, watch, number))
    return calibration.result()


def _in_round(watch: Watch, number: int, done: int, total: int, what: str) -> None:
    watch(number * total + done, ROUNDS * total, what)


class Calibration:
    """Everything that is timed, and what each took so far.

    formats: those to time [all that the backend runs], and int8_row, which all else is timed with. limit_s:
    for each measurement of a round, on a machine that is not quiet. clock: what counts as time. Raises
    Unsupported for a profile of another backend, BackendUnavailable without the native library.
    """

    def __init__(
        self,
        base: Profile,
        threads: int,
        formats: Sequence[str] = (),
        limit_s: float = 0.3,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        if base.backend != "cpu":
            raise Unsupported(
                f"--calibrate measures the cpu backend; profile {base.name!r} is for {base.backend}; use "
                "--profile cpu or auto"
            )
        ready = get_backend("cpu").available()
        if not ready.ok:
            raise BackendUnavailable(ready.why)
        self._base, self._clock = base, Timer(threads, limit_s, clock)
        self._formats = list(dict.fromkeys([*(formats or runnable()), BASE]))
        self._own, last = core_cache(), last_cache()
        self._kept = max(_CACHED, min(last // 2, _OWN_CACHES * threads * self._own))
        self._stream = max(_LEAST_STREAM, 3 * last)
        self._cached = _ladder(self._kept, self._stream)
        self._known = experiments(self._formats, self._kept, self._stream)
        self._taken: dict[str, list[list[float]]] = {}  # of each experiment, what each round took
        self._bandwidth = 0.0

    def round(self, watch: Watch) -> None:
        """Time everything once more."""
        every = [*self._cached, *self._known]
        watch(0, len(every), "reading memory")
        threads, limit_s = self._clock.threads, self._clock.limit_s
        self._bandwidth = max(self._bandwidth, measure_bandwidth(threads, limit_s=max(0.2, limit_s)))
        for i, experiment in enumerate(every):
            watch(i, len(every), experiment.name)
            self._taken.setdefault(experiment.name, []).append(experiment.run(self._clock))
        watch(len(every), len(every), "a round is done")

    def result(self) -> Calibrated:
        """The costs that fit what was timed."""
        sizes = [weights_read(e.program, synthetic.plans_of(e.program, e.fmt)) for e in self._cached]
        times = [self._seconds(e)[0] / size for e, size in zip(self._cached, sizes, strict=True)]
        resident, streamed_from = cache_ends(sizes, times)
        setting = Setting(self._clock.threads, resident, streamed_from, self._own, tuple(self._formats))
        seen = [one for e in self._known for one in e.seen(self._seconds(e))]
        found = fit(self._base, setting, seen)
        return Calibrated(_with(self._base, self._bandwidth, found.measured), found.errors)

    def _seconds(self, experiment: Experiment | Served) -> list[float]:
        """Of all rounds the fastest; of what comes from memory the middle one, for each round has lain
        elsewhere in it, and on some machines that makes a difference."""
        rounds = zip(*self._taken[experiment.name], strict=True)
        return [statistics.median(taken) if experiment.patient else min(taken) for taken in rounds]


def _ladder(kept: int, stream: int) -> list[Experiment]:
    """Products of ever more bytes, from what the last cache keeps to what none does.

    What a system calls its last cache may be shared with others: the time of a byte says what stays.
    """
    sizes = [kept]
    while sizes[-1] < stream:
        sizes.append(min(2 * sizes[-1], stream))
    return [
        Experiment(
            f"{size / 2**20:.0f} MiB of weights", streamed(BASE, size), BASE, Step(1, 0, True), patient=True
        )
        for size in sizes
    ]


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
