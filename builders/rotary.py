"""Rotary frequency tables, computed at build time in f64 and stored as f32.

RoPE: Su et al. 2021 (arXiv 2104.09864). linear: position interpolation, Chen et al. 2023 (2306.15595).
yarn: Peng et al. 2023 (2309.00071). longrope: Ding et al. 2024 (2402.13753). llama3: the frequency-dependent
scaling published with Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from builders.model_config import ModelConfig
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadConfig, Unsupported, nearest


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """inv_freq f32 (n,): radians a position for each rotated pair; cos and sin are multiplied by `scale`.

    `reach`: positions for which the table is right, where that is less than the model's longest context.
    """

    inv_freq: Array
    scale: float = 1.0
    reach: int | None = None


def read_rotary(
    config: ModelConfig,
    head_dim: int,
    max_positions: int,
    context: int,
    *,
    theta: float = 10000.0,
    original: int | None = None,
    partial: bool = False,
    yarn_is_longrope: bool = False,
) -> Rotary:
    """The one table of a model from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    `theta` and `original` (positions of pretraining) hold when the config names none; `partial`: the family
    may rotate a part of each head.
    `context` (tokens planned for) picks longrope's table: see `_longrope`.
    """
    base = config.positive("rope_theta", theta)
    section = config.section("rope_scaling") or config.section("rope_parameters")
    config.ignore("rope_parameters")
    if section is None:
        section = ModelConfig({}, f"{config.path}: rope_parameters")
    fraction = config.positive("partial_rotary_factor", 1.0)
    if config.read_or_null(int, "original_max_position_embeddings", original) is not None:
        original = config.size("original_max_position_embeddings", original)
    return rotary_from(
        section, head_dim, max_positions, context,
        theta=base, fraction=fraction, original=original, partial=partial, yarn_is_longrope=yarn_is_longrope,
    )  # fmt: skip


def rotary_from(
    section: ModelConfig,
    head_dim: int,
    max_positions: int,
    context: int,
    *,
    theta: float,
    fraction: float = 1.0,
    original: int | None = None,
    partial: bool = False,
    yarn_is_longrope: bool = False,
) -> Rotary:
    """The table that one rope dictionary describes. Raises BadConfig, or Unsupported for another type."""
    kind = section.read(str, "rope_type", section.read(str, "type", "default"))
    section.ignore("type")
    if kind == "su" or (kind == "yarn" and yarn_is_longrope):
        kind = "longrope"  # names that Phi-3 used before longrope had one
    if kind not in _TYPES:
        raise Unsupported(f"{section.path}: rope type {kind!r} is not supported; {nearest(kind, _TYPES)}")
    theta = section.positive("rope_theta", theta)
    if theta <= 1.0:
        raise BadConfig(f"{section.path}: rope_theta is {theta}, expected more than 1")
    fraction = section.positive("partial_rotary_factor", fraction)
    if fraction > 1.0 or (fraction < 1.0 and not partial):
        raise Unsupported(
            f"{section.path}: partial_rotary_factor {fraction} has no meaning in this architecture"
        )
    width = int(head_dim * fraction)
    if width % 2 or width == 0:
        raise Unsupported(
            f"{section.path}: {width} of {head_dim} values of a head rotate; expected an even count"
        )
    # The key beside the dictionary wins over the one inside it, as in the models' own code
    inside = section.size("original_max_position_embeddings", max_positions)
    original = original or inside
    if original < 2:
        raise BadConfig(
            f"{section.path}: original_max_position_embeddings is {original}, expected at least 2"
        )
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    plain = theta**-exponents
    rotary = _TYPES[kind](section, plain, theta, _Lengths(max_positions, original, context))
    if not (np.isfinite(rotary.inv_freq).all() and 0.0 < rotary.scale < math.inf):
        raise BadConfig(f"{section.path}: these values give no usable rotary table; check factor and mscale")
    section.finish()
    return rotary


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Positions that a rope dictionary refers to, in tokens."""

    longest: int
    original: int
    context: int


def _table(inv_freq: Array, scale: float = 1.0) -> Rotary:
    with np.errstate(over="ignore"):  # the caller refuses an infinite table
        return Rotary(inv_freq.astype(np.float32), scale)


def _default(section: ModelConfig, plain: Array, theta: float, lengths: _Lengths) -> Rotary:
    return _table(plain)


def _linear(section: ModelConfig, plain: Array, theta: float, lengths: _Lengths) -> Rotary:
    return _table(plain / section.positive("factor"))


def _llama3(section: ModelConfig, plain: Array, theta: float, lengths: _Lengths) -> Rotary:
    factor = section.positive("factor")
    low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
    if low >= high:
        raise BadConfig(f"{section.path}: low_freq_factor {low} must be below high_freq_factor {high}")
    turns = lengths.original * plain / (2 * math.pi)  # full turns within the original context
    # Many turns: kept. Few: divided by factor. Between: mixed.
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return _table((1.0 - keep) * plain / factor + keep * plain)


def _yarn(section: ModelConfig, plain: Array, theta: float, lengths: _Lengths) -> Rotary:
    factor = section.positive_or_null("factor") or lengths.longest / lengths.original
    fast = section.positive_or_null("beta_fast") or 32.0
    slow = section.positive_or_null("beta_slow") or 1.0
    mscale, mscale_all = (section.read_or_null(float, key, None) for key in ("mscale", "mscale_all_dim"))
    if min(mscale or 0.0, mscale_all or 0.0) < 0.0:
        raise BadConfig(f"{section.path}: mscale and mscale_all_dim must not be negative")
    scale = section.positive_or_null("attention_factor")
    if scale is None:
        scale = _mscale(factor, 1.0)
        if mscale and mscale_all:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    width = 2 * len(plain)

    def pair_with(turns: float) -> float:
        # index of the pair that makes so many turns within the original context
        return width * math.log(lengths.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(fast), pair_with(slow)
    if section.read(bool, "truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    interpolate = np.clip((np.arange(len(plain)) - first) / (last - first), 0.0, 1.0)
    return _table(interpolate * plain / factor + (1.0 - interpolate) * plain, scale)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(section: ModelConfig, plain: Array, theta: float, lengths: _Lengths) -> Rotary:
    """Two tables; the planned context picks one for the engine's whole life.

    Hugging Face switches at the first token beyond the original context, which would make every cached key
    wrong; so an engine planned beyond it uses the long table from its first token (vLLM does the same), and
    an engine planned within it never needs the long one.
    """
    short = section.numbers("short_factor", len(plain))
    long = section.numbers("long_factor", len(plain))
    factor = section.positive_or_null("factor") or lengths.longest / lengths.original
    scale = section.positive_or_null("attention_factor")
    if scale is None:
        scale = math.sqrt(1.0 + math.log(factor) / math.log(lengths.original)) if factor > 1.0 else 1.0
    if lengths.context > lengths.original:
        return _table(plain / np.array(long), scale)
    return replace(_table(plain / np.array(short), scale), reach=lengths.original)


_TYPES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
