"""ctypes mirror of kernels/cuda/edge_cuda.h; the emulator's tests prove that both have the same sizes."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_void_p

VERSION = 1  # EDGE_CUDA_VERSION
MATRICES = 4  # EDGE_MATRICES

# enum edge_cuda_status
NOT_FINITE, OUT_OF_RANGE = 1, 2

# enum edge_cuda_count
TOKENS, SEQUENCES, LOGITS, TABLE_STRIDE = range(4)
COUNTS = 16


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
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("second", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("add", c_void_p),
        ("add_scale", c_float),
        ("scale_all", c_float),
        ("rows", c_int32),
        ("first_panel", c_int32),
    ]


class Linear(Structure):
    """EdgeLinear"""

    _fields_ = [
        ("step", Step),
        ("inputs", Inputs),
        ("matrix", Matrix * MATRICES),
        ("count", c_int32),
        ("panels", c_int32),
        ("cols", c_int32),
        ("units", c_int32),
        ("out_stride", c_int32),
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
        ("unused", c_int32),
    ]
