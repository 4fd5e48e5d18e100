"""ctypes mirror of kernels/include/edge_cpu.h; `edge_cpu_records()` proves that both have the same sizes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

VERSION = 9  # EDGE_CPU_VERSION

SCALE_PER = {None: 0, "group": 1, "row": 2, "tensor": 3}
SIMD = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "neon": 4}

# enum edge_op_kind
EMBED, NORM_RMS, NORM_LAYER, LINEAR, ROPE, KV_APPEND, ATTENTION = range(7)
SILU, GELU, GELU_TANH, RELU, ADD, LOGITS, INPUT = range(7, 14)
GATHER, ROUND_E4M3, ROUND_I8 = range(14, 17)

# enum edge_status
OK, NOT_FINITE, OUT_OF_RANGE = 0, 1, 2
BAD_TOKEN, BAD_POSITION, BAD_SEQUENCE, BAD_PAGE, BAD_LOGIT_ROW, TWICE, BAD_SIZE = range(3, 10)
BAD_PARENT, BAD_PLACE, BAD_SLOT, BAD_RUN, NOT_HELD = range(10, 15)


class Matrix(Structure):
    """edge_matrix"""

    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("encoding", c_int32),
        ("scale_per", c_int32),
        ("group", c_int32),
        ("high_bits", c_int32),
        ("high", c_void_p),
        ("min", c_void_p),
        ("super", c_void_p),
        ("super_min", c_void_p),
        ("second", c_void_p),
        ("offset", c_void_p),
        ("outlier", c_void_p),
        ("index", c_void_p),
        ("outliers", c_int32),
        ("scale_encoding", c_int32),
    ]


class Kv(Structure):
    """edge_kv"""

    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("encoding", c_int32),
        ("row_bytes", c_int32),
        ("row_scales", c_int32),
        ("group", c_int32),
        ("per_channel", c_int32),
        ("unused", c_int32),
    ]


class Cache(Structure):
    """edge_cache"""

    _fields_ = [("k", Kv), ("v", Kv), ("kv_heads", c_int32), ("head_dim", c_int32), ("open", c_void_p)]


class Op(Structure):
    """edge_op"""

    _fields_ = [
        ("kind", c_int32),
        ("layer", c_int32),
        ("x", c_void_p),
        ("y", c_void_p),
        ("out", c_void_p),
        ("vec", c_void_p),
        ("bias", c_void_p),
        ("weight", Matrix),
        ("x_width", c_int64),
        ("out_width", c_int64),
        ("group", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("freqs", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("softcap", c_float),
        ("angles", c_int32),
        ("first", c_int32),
        ("unused", c_int32),
    ]


class Scratch(Structure):
    """edge_scratch"""

    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("attention", c_void_p),
        ("angles", c_void_p),
        ("rows", c_void_p),
        ("logits", c_void_p),
        ("fresh", c_void_p),
        ("code_stride", c_int64),
        ("group_stride", c_int64),
        ("attention_stride", c_int64),
    ]


class ProgramRecord(Structure):
    """edge_program"""

    _fields_ = [
        ("ops", POINTER(Op)),
        ("cache", POINTER(Cache)),
        ("tables", POINTER(Op)),
        ("scratch", Scratch),
        ("op_count", c_int32),
        ("cache_count", c_int32),
        ("table_count", c_int32),
        ("vocab", c_int32),
        ("context", c_int32),
        ("page_tokens", c_int32),
        ("pages", c_int32),
        ("max_tokens", c_int32),
        ("max_sequences", c_int32),
        ("max_logits", c_int32),
        ("threads", c_int32),
        ("simd", c_int32),
    ]


class LowRank(Structure):
    """edge_low_rank"""

    _fields_ = [
        ("op", c_int32),
        ("rank", c_int32),
        ("offset", c_int32),
        ("scale", c_float),
        ("a", c_void_p),
        ("b", c_void_p),
    ]


class Adapter(Structure):
    """edge_adapter"""

    _fields_ = [
        ("items", POINTER(LowRank)),
        ("u", c_void_p),
        ("stride", c_int64),
        ("count", c_int32),
        ("unused", c_int32),
    ]


class Batch(Structure):
    """edge_batch"""

    _fields_ = [
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("sequence", c_void_p),
        ("page_tables", c_void_p),
        ("logit_rows", c_void_p),
        ("parents", c_void_p),
        ("places", c_void_p),
        ("slots", c_void_p),
        ("adapters", c_void_p),
        ("inputs", c_void_p),
        ("token_count", c_int32),
        ("sequence_count", c_int32),
        ("pages_per_sequence", c_int32),
        ("logit_count", c_int32),
        ("index", c_int32),
        ("value", c_int32),
    ]


RECORDS = VERSION << 32 | ctypes.sizeof(Op) << 16 | ctypes.sizeof(ProgramRecord)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their types. Raises AttributeError when one is missing."""
    signatures = {
        "edge_cpu_abi": (ctypes.c_uint64, []),
        "edge_cpu_records": (ctypes.c_uint64, []),
        "edge_cpu_features": (ctypes.c_uint32, []),
        "edge_cpu_attention_floats": (c_int64, [c_int32, c_int32]),
        "edge_cpu_create": (c_void_p, [POINTER(ProgramRecord)]),
        "edge_cpu_forward": (c_int32, [c_void_p, POINTER(Batch)]),
        "edge_cpu_chain": (c_int32, [c_void_p, POINTER(Batch), c_int32, c_void_p]),
        "edge_cpu_move": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int32]),
        "edge_cpu_set_adapter": (c_int32, [c_void_p, c_int32, POINTER(Adapter)]),
        "edge_cpu_destroy": (None, [c_void_p]),
        "edge_cpu_trellis_search": (
            c_int32,
            [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int32],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
