"""Fleet files: which models, for which devices, in which variants; strict YAML.

    output: engines                       # folder [the file's name without .yaml]
    models:
      - planner/model                     # a folder, or a mapping with options of its own:
      - {path: big/model, name: big, options: {draft: small/model}}
    profiles: [orin-nano-8gb, thor-t5000]
    options: {kv: int8, task: cases.jsonl, max-kl: 0.05}         # for all
    variants:                             # each for every model and profile [one, without a name]
      int4: {weights: int4_g64}
      int8: {weights: int8_row}

Options are those of edge-build without the dashes: a value, true for a switch, a list for one that may be
repeated. A variant's stand above a model's, and those above the file's. Relative paths begin at the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.budgets import parse_bytes, parse_formats
from builders.corpus import BUILTIN, SELF
from builders.observers import get_observer
from builders.pack import engine_name
from builders.planner import AUTO, KEEP
from builders.quantize import get_algorithm
from builders.sources import model_name
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.profile import SUFFIXES, load_profile
from edge_runtime.engine.strict_yaml import read_yaml
from edge_runtime.errors import BadConfig, EdgeError, nearest

MAX_CELLS = 1000
_KEYS = ("output", "models", "profiles", "options", "variants")
_MODEL_KEYS = ("path", "name", "options")
_OWN = ("help", "json", "profile", "profiles", "output", "force", "dry-run", "matrix", "jobs", "ray")
# Where edge-build keeps a calibration, and the options on which its content depends
CALIBRATION_FOLDER = "calibration-folder"
_CALIBRATION = ("calibration", "samples", "sample-tokens", "seed", "device", "rotate", "context", "draft")
_READ = ("draft", "medusa", "eval", "task", "prefix", "sensitivity-file", "calibration")  # files and folders
Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine to build: `words` are edge-build's command line but for --force.

    calibration: a folder that cells of one model and calibration share, so one at a time may use it.
    """

    name: str
    model: str
    profile: str
    variant: str
    words: tuple[str, ...]
    target: Path
    calibration: Path | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a fleet file asks for; `output` is the folder of the engines and of the results."""

    name: str
    output: Path
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    path: Path
    name: str
    options: Options


def _prove_weights(text: str) -> None:
    if text not in (AUTO, KEEP):
        get_format(text)


# Option -> proof of its value, which raises BadConfig naming the nearest that is valid
_PROOFS: dict[str, Callable[[str], object]] = {
    "weights": _prove_weights,
    "head-weights": _prove_weights,
    "draft-weights": _prove_weights,
    "formats": parse_formats,
    "kv": lambda text: text == AUTO or kv_pair(text),
    "draft-kv": kv_pair,
    "algorithm": get_algorithm,
    "observer": get_observer,
    "max-memory": lambda text: parse_bytes("the value", text),
    "calibration-memory": lambda text: parse_bytes("the value", text),
}


def read_fleet(path: Path, make_parser: Callable[[], argparse.ArgumentParser]) -> Fleet:
    """Every cell of a fleet file. Proved before any is built: options by edge-build's own parser; names of
    profiles, formats and algorithms; that there are the files to read.

    Raises BadConfig naming the key that is wrong and the nearest valid one.
    """
    parser = make_parser()
    data = _mapping(read_yaml(path, "fleet file"), path.name)
    _known(data, _KEYS, path.name)
    for key in ("models", "profiles"):
        if not isinstance(data.get(key), list) or not data[key]:
            raise BadConfig(f"{path.name}: {key}: expected a list with at least one entry")
    here = path.resolve().parent
    output = here / _text(data.get("output", path.stem), f"{path.name}: output")
    known = _options(parser)
    models = [_model(m, f"{path.name}: models[{i}]", known, here) for i, m in enumerate(data["models"])]
    profiles = [_profile(p, f"{path.name}: profiles[{i}]", here) for i, p in enumerate(data["profiles"])]
    common = _checked(data.get("options", {}), f"{path.name}: options", known, here)
    variants = {"": Options()}
    if "variants" in data:
        given = _mapping(data["variants"], f"{path.name}: variants")
        variants = {n: _checked(v, f"{path.name}: variants.{n}", known, here) for n, v in given.items()}
    count = len(models) * len(profiles) * len(variants)
    if not 0 < count <= MAX_CELLS:
        raise BadConfig(f"{path.name}: {count} engines, expected 1 to {MAX_CELLS}")
    cells: dict[str, Cell] = {}
    for model in models:
        for profile in profiles:
            for variant, options in variants.items():
                chosen = common | model.options | options
                try:
                    cell = _cell(model, profile, variant, chosen, output, parser)
                except BadConfig as error:
                    raise BadConfig(f"{path.name}: {error}") from None
                if cell.name in cells:
                    raise BadConfig(
                        f"{path.name}: two engines are named {cell.name!r}; give the models names"
                    )
                cells[cell.name] = cell
    return Fleet(path.stem, output, tuple(cells.values()))


def _cell(
    model: _Model,
    profile: str,
    variant: str,
    options: Options,
    output: Path,
    parser: argparse.ArgumentParser,
) -> Cell:
    device = Path(profile).stem if profile.endswith(SUFFIXES) else profile
    name = engine_name("-".join(word for word in (model.name, device, variant) if word))
    folder = None
    if CALIBRATION_FOLDER not in options and _calibrates(options):
        folder = _calibration(model, options, output)
        options = options | {CALIBRATION_FOLDER: str(folder)}
    target = output / f"{name}.edge"
    words = [str(model.path), "--profile", profile, "-o", str(target)]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{option}"] if one is True else [f"--{option}={one}"]
    from builders.cli import build_options  # the command line knows fleets, so not at load

    try:
        asked = build_options(parser.parse_args(words))
        asked.limits.check(measured=asked.measure, task=asked.task is not None)
        if profile != AUTO and "power-mode" in options:
            load_profile(profile).mode(options["power-mode"])
    except BadConfig as error:
        raise BadConfig(f"{name}: {error}") from None
    return Cell(name, model.name, device, variant, tuple(words), target, folder)


def _calibrates(options: Options) -> bool:
    """Whether a build with these options needs statistics. Raises BadConfig for an unknown algorithm."""
    asked = "calibration" in options or "sensitivity" in options
    return asked or ("algorithm" in options and get_algorithm(options["algorithm"]).CALIBRATED)


def _calibration(model: _Model, options: Options, output: Path) -> Path:
    """The same folder for every cell whose statistics are the same, and another once a file is changed."""
    chosen = {k: options[k] for k in _CALIBRATION if k in options}
    read = [model.path, *(Path(chosen[k]) for k in ("calibration", "draft") if k in chosen)]
    stamps = {str(path): _stamps(path) for path in read}
    sha = hashlib.sha256(json.dumps([stamps, chosen], sort_keys=True).encode())
    return output / "calibrations" / f"{engine_name(model.name)}-{sha.hexdigest()[:12]}"


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the files of a folder, or of a file: to read them all would take long."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]


def _model(value: Any, where: str, known: Mapping[str, argparse.Action], here: Path) -> _Model:
    if isinstance(value, str):
        value = {"path": value}
    fields = _mapping(value, where)
    _known(fields, _MODEL_KEYS, where)
    if "path" not in fields:
        raise BadConfig(f"{where}: path: missing key")
    path = _there(here / _text(fields["path"], f"{where}: path"), f"{where}: path")
    name = _text(fields.get("name", model_name(path)), f"{where}: name")
    return _Model(
        path, engine_name(name), _checked(fields.get("options", {}), f"{where}: options", known, here)
    )


def _profile(value: Any, where: str, here: Path) -> str:
    text = _text(value, where)
    if text == AUTO:  # the machine that builds, which may be another
        return text
    found = str(here / text) if text.endswith(SUFFIXES) else text
    _prove(load_profile, found, where)
    return found


def _checked(value: Any, where: str, known: Mapping[str, argparse.Action], here: Path) -> Options:
    """Options in the words of edge-build; false switches and empty lists left out, paths made whole."""
    found = Options()
    for key, given in _mapping(value, where).items():
        if key not in known:
            raise BadConfig(f"{where}: {key}: unknown key; {nearest(key, known)}")
        action = known[key]
        where_key = f"{where}.{key}"
        if action.nargs == 0 or (action.nargs == "?" and isinstance(given, bool)):
            if not isinstance(given, bool):
                raise BadConfig(f"{where_key}: expected true or false")
            if given:
                found[key] = True
        elif isinstance(action.default, list):
            if not isinstance(given, list):
                raise BadConfig(f"{where_key}: expected a list")
            found[key] = [_named_path(_text(one, where_key), where_key, here) for one in given]
        else:
            text = _text(given, where_key)
            path = action.type is Path or (key == "calibration" and text not in (SELF, BUILTIN))
            found[key] = str(here / text) if path else text
            if path and key in _READ:
                _there(here / text, where_key)
            if key in _PROOFS:
                _prove(_PROOFS[key], text, where_key)
    return found


def _prove(proof: Callable[[str], object], text: str, where: str) -> None:
    try:
        proof(text)
    except EdgeError as error:
        raise BadConfig(f"{where}: {error}") from None


def _there(path: Path, where: str) -> Path:
    if not path.exists():
        raise BadConfig(f"{where}: {path} does not exist")
    return path


def _named_path(text: str, where: str, here: Path) -> str:
    """NAME=FOLDER with the folder made whole."""
    name, equals, folder = text.partition("=")
    return f"{name}={_there(here / folder, where)}" if equals else text


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options that a fleet file may give, by name without dashes."""
    found = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and option[2:] not in _OWN:
                found[option[2:]] = action
    return found


def _known(data: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in keys:
            raise BadConfig(f"{where}: {key}: unknown key; {nearest(key, keys)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadConfig(f"{where}: expected keys and values")
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise BadConfig(f"{where}: expected text or a number")
    return str(value)
