"""Profile: a device as the planner and the loader see it, read strictly from one YAML file.

A new device is a new file in `profiles/`; its name, aliases and the marks by which `auto` knows it are in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

import edge_runtime
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.strict_yaml import read_yaml
from edge_runtime.errors import BadConfig, nearest

Precision = Literal[
    "f32",
    "f16",
    "bf16",
    "int8",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "nf4",
    "tcq",
    "fp8",
    "nvfp4",
    "mxfp4",
]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Rest = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # of a time, after all that is explained otherwise
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]  # sums of a few stay far below 2**63
SomeBytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}$")]
Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]

SUFFIXES = (".yaml", ".yml")
_SIZE = re.compile(r"([0-9]{1,9})\s*(KiB|MiB|GiB)")
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_FIRST_CAPABILITY = {"fp8": (8, 9), "nvfp4": (10, 0)}  # older tensor cores lack the type
_DERIVED = {"mode_name", "memory_source", "file"}  # set by the loader or the probe, never read from a file


class Compute(msgspec.Struct, frozen=True, kw_only=True):
    """Dense rates in 1e12 operations per second (a multiply-add is two), by the type products are taken in.

    int4 weights multiplied with int8 activations run at the `int8` rate; `int4` is for int4 times int4.
    On a CPU `fp16` is the rate of f32 products, in which it computes all floats.
    """

    int8: Positive
    fp16: Positive
    int4: Positive | None = None
    fp8: Positive | None = None
    nvfp4: Positive | None = None


class PowerMode(msgspec.Struct, frozen=True, kw_only=True):
    """bandwidth_gbps in 1e9 bytes/s; gpu_mhz: cap of the GPU clock; tpcs: TPCs powered, of 2 SM each."""

    mode_name: str
    bandwidth_gbps: Positive
    compute: Compute
    gpu_mhz: Count | None = None
    tpcs: Count | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """total: what the OS (unified) or the driver (discrete) shows; reserve: kept for the rest of the robot;
    context: what the driver takes for itself when a context is made."""

    total_bytes: SomeBytes
    reserve_bytes: Bytes
    context_bytes: Bytes
    unified: bool


class CudaLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Newest CUDA, and its PTX ISA, that device code may be made with so that the device loads it."""

    driver: Version
    ptx: Version


class FormatSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Products with one weight format: bytes (1e9/s) of stored weights read at one token, streamed from
    memory and from the last cache, and operations (1e9/s, a multiply-add is two) of a chunk of a prompt.

    output_ns: what a row of weights costs one token beyond its columns, on one thread; chunk_output_ns: each
    token of a chunk.
    """

    gbps: Positive
    cached_gbps: Positive
    gops: Positive
    output_ns: Rest
    chunk_output_ns: Rest


class QueryTime(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of one query head over one key: for each value of a head, and for the score itself, in ns."""

    value_ns: Rest
    score_ns: Rest


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-bench --calibrate` measured on the device, in the terms of engine/roofline.py.

    threads: of the backend while it was measured. request_us: a request beyond its steps. step_us: a step
    beyond the backend's work, where weights push the host's code out of a core's own cache; small_step_us:
    where they fit in core_cache_bytes at a byte each, and so do not. token_us: each of its tokens beyond
    that. stage_us: beginning and end of a stage of the thread pool, or a kernel launch; unit_us: each further
    token of a stage that goes token by token. value_ns: a value of an op between products, odd_head_ns: what
    rotating or appending a head that is not whole vectors of 16 values adds, both on one thread. logit_ns: a
    logit in sampling. query: a token alone, chunk_query: one of a prompt's. kv_ns: reading a value of a key
    and one of a value in that cache format, row_ns: the row of both, once for a block of tokens; odd_kv_ns:
    in place of kv_ns where heads are not whole vectors. cache_bytes: weights of this size or less stay in the
    last cache; stream_bytes: of this size or more, none do.
    """

    threads: Count
    request_us: Rest
    step_us: Rest
    small_step_us: Rest
    token_us: Rest
    stage_us: Rest
    unit_us: Rest
    value_ns: Rest
    odd_head_ns: Rest
    logit_ns: Rest
    query: QueryTime
    chunk_query: QueryTime
    row_ns: Rest
    odd_kv_ns: Rest
    kv_ns: dict[str, Rest]
    cache_bytes: Bytes
    stream_bytes: Bytes
    core_cache_bytes: Bytes
    formats: dict[str, FormatSpeed]

    def speed(self, fmt: str) -> FormatSpeed | None:
        """The format's figures; None for one that was not measured, to which the peak's shares apply."""
        return self.formats.get(fmt)

    def output_ns(self, fmt: str, tokens: int) -> float:
        """A row of outputs, for each token of a step of so many; an unmeasured format is like the slowest."""
        known = self.formats.get(fmt)
        speeds = self.formats.values() if known is None else (known,)
        return max((s.output_ns if tokens == 1 else s.chunk_output_ns for s in speeds), default=0.0)

    def key_ns(self, k: str, v: str) -> float:
        """Of a K and V in these cache formats; an unmeasured one counts as the slowest."""
        slowest = max(self.kv_ns.values(), default=0.0)
        return (self.kv_ns.get(k, slowest) + self.kv_ns.get(v, slowest)) / 2


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the peak, and microseconds a kernel launch; `edge-bench --calibrate` adds its figures.

    formats: shares of `bandwidth` that formats reach whose codes take longer to decode than to fetch.
    """

    bandwidth: Share
    compute: Share
    launch_overhead_us: Positive
    formats: dict[str, Share] = {}
    measured: Measured | None = None


class Detect(msgspec.Struct, frozen=True, kw_only=True):
    """How `auto` knows the device: SoC and module ids of the device tree, or the driver's GPU names."""

    soc: Text | None = None
    modules: tuple[Text, ...] = ()
    gpu_names: tuple[Text, ...] = ()  # without the leading "NVIDIA "


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A device. Read the figures of the power mode in use through `mode`."""

    name: Word
    title: Text
    aliases: tuple[Word, ...] = ()
    backend: Literal["cuda", "cpu"]
    packing: Literal["m16", "n16k4"]
    compute_capability: Version | None = None
    cuda: CudaLimit | None = None
    memory: Memory
    precisions: tuple[Precision, ...]
    default_mode: Text
    power_modes: dict[str, PowerMode]
    efficiency: Efficiency
    detect: Detect = Detect()
    memory_source: str = "profile"  # whose figure memory.total_bytes is
    file: str = ""

    def mode(self, name: str | None = None) -> PowerMode:
        """The named power mode, or the default one. Raises BadConfig that names the nearest valid mode."""
        wanted = self.default_mode if name is None else name
        if wanted not in self.power_modes:
            raise BadConfig(
                f"profile {self.name!r} has no power mode {_brief(wanted)}: "
                f"{nearest(wanted, self.power_modes)} (modes: {', '.join(self.power_modes)})"
            )
        return self.power_modes[wanted]

    def memory_available(self) -> int:
        """Bytes a plan may use: total less reserve. The driver's context is the plan's to add."""
        return self.memory.total_bytes - self.memory.reserve_bytes

    def calibrated(self, measured: Measured) -> Profile:
        """The device with these measured costs."""
        efficiency = msgspec.structs.replace(self.efficiency, measured=measured)
        return msgspec.structs.replace(self, efficiency=efficiency)

    def supports(self, precision: str) -> bool:
        """Whether weights of this precision class may be planned for the device."""
        return precision in self.precisions

    @property
    def sm(self) -> int | None:
        """Compute capability as compilers write it: 87 for "8.7", 110 for "11.0"; None without a GPU."""
        return None if self.compute_capability is None else int(self.compute_capability.replace(".", ""))

    def as_mapping(self) -> dict[str, Any]:
        """What a profile file of this device says; `load_profile` reads it back once dumped as YAML."""

        def clean(value: object) -> object:
            if isinstance(value, dict):
                return {k: clean(v) for k, v in value.items() if k not in _DERIVED and v is not None}
            return list(value) if isinstance(value, tuple) else value

        plain = clean(msgspec.to_builtins(self))
        return plain if isinstance(plain, dict) else {}


def load_profile(name_or_path: str | Path, directory: Path | None = None) -> Profile:
    """The profile of that name or alias, of that YAML file, or of this machine for `auto`.

    A string with a slash or ending in .yaml/.yml is a path. `directory` replaces the shipped profiles.
    Raises BadConfig; for a wrong name it names the nearest one.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(SUFFIXES):
        return read_profile(Path(text))
    if text == "auto":
        from edge_runtime.engine.probe import probe_machine  # here: the probe starts from shipped profiles

        return probe_machine().profile
    files = _files(directory)
    if text in files:
        return _read_shipped(files[text])
    profiles = list_profiles(directory)
    for profile in profiles:
        if text in profile.aliases:
            return profile
    names = [*(p.name for p in profiles), *(a for p in profiles for a in p.aliases), "auto"]
    raise BadConfig(
        f"no profile named {_brief(text)}: {nearest(text, names)} "
        f"(profiles: {', '.join(names)}; or a path to a .yaml file)"
    )


def list_profiles(directory: Path | None = None) -> list[Profile]:
    """All shipped profiles by name. Raises BadConfig when a file is bad or two claim one name or alias."""
    profiles = [_read_shipped(path) for _, path in sorted(_files(directory).items())]
    owner = {p.name: p for p in profiles} | {"auto": None}
    for profile in profiles:
        for alias in profile.aliases:
            if alias in owner:
                other = owner[alias]
                raise BadConfig(
                    f"{profile.file}: aliases: {alias!r} is already taken by "
                    f"{other.file if other else 'the built-in name auto'}; give one of them another alias"
                )
            owner[alias] = profile
    return profiles


def read_profile(path: Path) -> Profile:
    """Read one profile file. Raises BadConfig naming file, key, what is wrong and the nearest valid key."""
    raw = _parse(path)
    profile = _struct(Profile, raw, "", str(path), {"file": str(path)})
    _check(profile)
    return profile


def capability_of(text: str) -> tuple[int, int]:
    """(8, 7) for "8.7", to compare by."""
    major, minor = text.split(".")
    return int(major), int(minor)


def _files(directory: Path | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in [directory] if directory is not None else list(_directories()):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    if not found:
        raise BadConfig(f"no profiles in {directory or 'the installed package'}; reinstall edge_runtime")
    return found


def _directories() -> Iterator[Path]:
    """`profiles` at the root of a source checkout, else `_profiles` of an installed wheel.

    An editable install has both; the checkout's are the ones that somebody edits.
    """
    packages = [Path(p) for p in edge_runtime.__path__]
    checkouts = [p.parent / "profiles" for p in packages]
    checkouts = [c for c in checkouts if (c / "cpu.yaml").is_file()]  # else some other project's folder
    yield from checkouts or (p / "_profiles" for p in packages if (p / "_profiles").is_dir())


def _read_shipped(path: Path) -> Profile:
    profile = read_profile(path)
    if profile.name != path.stem:
        raise BadConfig(f"{path}: name: {profile.name!r} must be the file's name, {path.stem!r}")
    return profile


def _check(p: Profile) -> None:
    """Rules between keys."""

    def fail(where: str, why: str) -> None:
        raise BadConfig(f"{p.file}: {where}: {why}")

    if not p.power_modes:
        fail("power_modes", "at least one power mode is needed")
    if p.default_mode not in p.power_modes:
        closest = nearest(p.default_mode, p.power_modes)
        fail("default_mode", f"no power mode {_brief(p.default_mode)}: {closest}")
    if p.memory.reserve_bytes + p.memory.context_bytes >= p.memory.total_bytes:
        fail("memory", "reserve_bytes + context_bytes leave nothing of total_bytes")
    if len(set(p.precisions)) != len(p.precisions) or not p.precisions:
        fail("precisions", "each precision once, and at least one")
    if p.backend == "cuda" and p.compute_capability is None:
        fail("compute_capability", 'missing key, needed with backend cuda (such as "8.7")')
    if p.backend == "cuda" and p.cuda is None:
        fail("cuda", "missing key, needed with backend cuda (driver and ptx, such as 12.6 and 8.5)")
    if p.backend == "cpu" and (p.compute_capability is not None or p.cuda is not None):
        fail("backend", "compute_capability and cuda have no meaning with backend cpu")
    for precision, first in _FIRST_CAPABILITY.items():
        if precision not in p.precisions or p.compute_capability is None:
            continue
        if capability_of(p.compute_capability) < first:
            least = ".".join(map(str, first))
            fail("precisions", f"{precision} needs compute capability {least}, not {p.compute_capability}")
        for name, mode in p.power_modes.items():
            if getattr(mode.compute, precision) is None:
                fail(f"power_modes.{name}.compute", f"missing key {precision!r}, which precisions lists")


def _parse(path: Path) -> object:
    try:
        if not path.is_file():
            if path.exists():
                raise BadConfig(f"{path}: not a regular file; a profile is a YAML file")
            closest = nearest(path.stem, _files(None))
            raise BadConfig(f"{path}: no such file; a shipped profile is given by its name alone, {closest}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadConfig(f"{str(path)!r}: cannot be read: {error}") from error
    return read_yaml(path, "profile")


_S = TypeVar("_S", bound=msgspec.Struct)


def _struct(kind: type[_S], raw: object, where: str, file: str, given: Mapping[str, object]) -> _S:
    dot = f"{where}." if where else ""
    items = _mapping(raw, where or "the file", file)
    fields = {f.name: f for f in msgspec.structs.fields(kind) if f.name not in _DERIVED}
    # nobody writes these by hand: where they do not fit, another version measured them
    again = "; measure again with edge-bench --calibrate" if kind in (Measured, FormatSpeed) else ""
    for key in items:
        if key not in fields:
            raise BadConfig(f"{file}: {dot}{key}: unknown key; {nearest(key, fields)}{again}")
    for name, field in fields.items():
        if field.required and name not in items:
            raise BadConfig(f"{file}: {dot}{name}: missing key{again}")
    values = {key: _value(fields[key].type, value, dot + key, file) for key, value in items.items()}
    return kind(**values, **given)


def _value(kind: Any, value: object, where: str, file: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    origin = get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _struct(kind, value, where, file, {})
    if origin is dict:
        return _named(get_args(kind)[1], value, where, file)
    if origin is tuple:
        if not isinstance(value, list):
            raise BadConfig(f"{file}: {where}: expected a list, got {_brief(value)}")
        return tuple(_value(get_args(kind)[0], item, f"{where}[{i}]", file) for i, item in enumerate(value))
    if origin is Literal and isinstance(value, str) and value not in get_args(kind):
        raise BadConfig(f"{file}: {where}: {_brief(value)} is not valid; {nearest(value, get_args(kind))}")
    if where.endswith("_bytes") and isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            expected = "expected bytes or a size such as 7619 MiB or 8 GiB"
            raise BadConfig(f"{file}: {where}: {expected}, got {_brief(value)}")
        value = int(match[1]) * _UNITS[match[2]]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadConfig(f"{file}: {where}: expected a finite number, got {value}")
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, OverflowError) as error:
        quote = '; put it in quotes, such as "8.7"' if kind is Version and isinstance(value, float) else ""
        reason = str(error)[:1].lower() + str(error)[1:]
        raise BadConfig(f"{file}: {where}: {reason} (it is {_brief(value)}){quote}") from error


def _named(kind: Any, value: object, where: str, file: str) -> dict[str, Any]:
    """A mapping of a name to a struct or a number; what the name stands for is the key's own rule."""
    items = _mapping(value, where, file)
    if kind is PowerMode:
        return {n: _struct(PowerMode, v, f"{where}.{n}", file, {"mode_name": n}) for n, v in items.items()}
    known = K_FORMATS if kind is Rest else FORMATS
    for name in items:
        if name not in known:
            raise BadConfig(f"{file}: {where}.{name}: unknown format; {nearest(name, known)}")
    return {n: _value(kind, v, f"{where}.{n}", file) for n, v in items.items()}


def _mapping(raw: object, where: str, file: str) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise BadConfig(f"{file}: {where}: expected keys and values, got {_brief(raw)}")
    for key in raw:
        if not isinstance(key, str):
            raise BadConfig(f"{file}: {where}: key {_brief(key)} is not text; put it in quotes")
    return raw


def _brief(value: object) -> str:
    """Short text of a value, for messages: never more than a line, whatever a file holds."""
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if value is None:
        return "nothing"
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
