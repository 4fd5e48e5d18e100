"""ctypes mirror of kernels/cuda/edge_cuda.h; the emulator's tests prove that both have the same sizes."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from edge_runtime.engine.device_code import SLICE as SLICE
from edge_runtime.engine.device_memory import COUNTS as COUNTS
from edge_runtime.engine.launches import MATRICES as MATRICES

# enum edge_cuda_status
NOT_FINITE, OUT_OF_RANGE = 1, 2

# enum edge_cuda_count
TOKENS, SEQUENCES, LOGITS, TABLE_STRIDE, CHAIN_STEP = range(5)

SLICES_MAX = 128  # EDGE_SLICES_MAX


class Step(Structure):
    """EdgeStep"""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "counts",
            "tokens",
            "positions",
            "sequence",
            "places",
            "parents",
            "bends",
            "page_tables",
            "logit_rows",
            "status",
        )
    ]


class Inputs(Structure):
    """EdgeInputs"""

    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("chunks", c_int32),
        ("groups", c_int32),
    ]


class Matrix(Structure):
    """EdgeMatrix"""

    _fields_ = [
        ("codes", c_void_p),
        ("high", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("second", c_void_p),
        ("super_min", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("add", c_void_p),
        ("add_scale", c_float),
        ("scale_all", c_float),
        ("rows", c_int32),
        ("first_panel", c_int32),
        ("stride", c_int32),
        ("unused", c_int32),
    ]


class Linear(Structure):
    """EdgeLinear"""

    _fields_ = [
        ("step", Step),
        ("inputs", Inputs),
        ("matrix", Matrix * MATRICES),
        ("count", c_int32),
        ("units", c_int32),
        ("row_count", c_int32),
    ]


class Adapter(Structure):
    """EdgeAdapter"""

    _fields_ = [("u", c_void_p), ("stride", c_int64), ("unused", c_int64 * 2)]


class Update(Structure):
    """EdgeUpdate"""

    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("scale", c_float),
        ("rank", c_int32),
        ("offset", c_int32),
        ("unused", c_int32),
    ]


class Updated(Structure):
    """EdgeUpdated"""

    _fields_ = [
        ("out", c_void_p),
        ("scale", c_float),
        ("op", c_int32),
        ("rows", c_int32),
        ("first_panel", c_int32),
        ("stride", c_int32),
        ("unused", c_int32),
    ]


class LowRank(Structure):
    """EdgeLowRank"""

    _fields_ = [
        ("step", Step),
        ("adapters", c_void_p),
        ("x", c_void_p),
        ("matrix", Updated * MATRICES),
        ("count", c_int32),
        ("panels", c_int32),
        ("cols", c_int32),
        ("row_count", c_int32),
    ]


class Embed(Structure):
    """EdgeEmbed"""

    _fields_ = [
        ("step", Step),
        ("matrix", Matrix),
        ("out", c_void_p),
        ("cols", c_int32),
        ("units", c_int32),
        ("scale", c_float),
        ("first", c_int32),
    ]


class Prepare(Structure):
    """EdgePrepare"""

    _fields_ = [
        ("step", Step),
        ("inputs", Inputs),
        ("x", c_void_p),
        ("y", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("width", c_int32),
        ("eps", c_float),
        ("rows", c_int32),
    ]


class Row(Structure):
    """EdgeRow"""

    _fields_ = [
        ("step", Step),
        ("x", c_void_p),
        ("y", c_void_p),
        ("out", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("x_width", c_int32),
        ("out_width", c_int32),
        ("group", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("unused", c_int32),
    ]


class Angles(Structure):
    """EdgeAngles"""

    _fields_ = [
        ("step", Step),
        ("inv_freq", c_void_p),
        ("angles", c_void_p),
        ("freqs", c_int32),
        ("scale", c_float),
    ]


class Kv(Structure):
    """EdgeKv"""

    _fields_ = [("codes", c_void_p), ("scale", c_void_p), ("zero", c_void_p)]


class Append(Structure):
    """EdgeRopeAppend"""

    _fields_ = [
        ("step", Step),
        ("k", Kv),
        ("v", Kv),
        ("q", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("angles", c_void_p),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("freqs", c_int32),
        ("page_tokens", c_int32),
    ]


class Move(Structure):
    """EdgeMove"""

    _fields_ = [
        ("k", Kv),
        ("v", Kv),
        ("pages", c_void_p),
        ("sources", c_void_p),
        ("targets", c_void_p),
        ("count", c_int32),
        ("kv_heads", c_int32),
        ("page_tokens", c_int32),
        ("unused", c_int32),
    ]


class Attend(Structure):
    """EdgeAttention"""

    _fields_ = [
        ("step", Step),
        ("k", Kv),
        ("v", Kv),
        ("q", c_void_p),
        ("out", c_void_p),
        ("partial", c_void_p),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("page_tokens", c_int32),
        ("chunks", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class Sample(Structure):
    """EdgeSample"""

    _fields_ = [
        ("step", Step),
        ("logits", c_void_p),
        ("tokens", c_void_p),
        ("top", c_void_p),
        ("top_ids", c_void_p),
        ("keys", c_void_p),
        ("history", c_void_p),
        ("vocab", c_int32),
        ("k", c_int32),
        ("slices", c_int32),
        ("softcap", c_float),
    ]
