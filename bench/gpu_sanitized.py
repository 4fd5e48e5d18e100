"""A little of every kernel for compute-sanitizer: tests of tests/cuda called as functions, on the GPU.

Run by gpu_tests.py, which sets the environment; by hand: EDGE_KERNELS_ON=gpu EDGE_DEVICE_BUFFERS=apart
PYTHONPATH=.:bench:tests/cuda:tests/gpu python bench/gpu_sanitized.py
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback

CALLS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    *[
        ("test_linear_kernels", "test_products_are_those_of_the_decoded_weights", (name, (33, 70)))
        for name in ("int4_g64", "int4_g32_zp", "int8_row", "nf4_g64", "f16", "fp8_e4m3_row")
    ],
    *[("test_linear_kernels", "test_every_kernel_gives_a_token_the_same_bits", (n,)) for n in
      ("int4_g64", "f16")],
    ("test_linear_kernels", "test_embedding_rows_are_the_codec_s", ("int8_row",)),
    *[("test_attention_kernels", "test_pairs_of_formats", (*pair, 16)) for pair in
      (("f16", "f16"), ("int8", "int4"), ("int4", "int4"), ("fp8", "fp8"))],
    *[("test_kv_kernels", "test_rows_are_stored_as_the_codecs_would", (*pair, 64)) for pair in
      (("int8", "fp8"), ("f16", "int4"))],
    ("test_kv_kernels", "test_moves", ("int4", "int8", 64)),
    ("test_kv_kernels", "test_angles_are_exact_to_f32", (32, 1.0)),
    ("test_row_kernels", "test_add", (288,)),
    ("test_row_kernels", "test_gather", (288,)),
    ("test_row_kernels", "test_norm", (0, 288, 288, 256)),
    ("test_row_kernels", "test_activation", ("silu", 1, 288)),
    ("test_prepare_kernels", "test_plain_rows", ("int64", 288)),
    ("test_prepare_kernels", "test_norm_rows", ("rms", "half", 288)),
    ("test_prepare_kernels", "test_activated_rows", ("silu_up", 288)),
    ("test_sample_kernels", "test_the_likeliest", (9000, 40)),
    ("test_sample_kernels", "test_advance", (False,)),
)  # fmt: skip


def main() -> int:
    failed = 0
    for module, name, args in CALLS:
        began = time.perf_counter()
        try:
            getattr(importlib.import_module(module), name)(*args)
            print(f"{module}.{name}{args}: {time.perf_counter() - began:.1f} s", flush=True)
        except Exception:
            failed += 1
            print(f"{module}.{name}{args} failed", flush=True)
            traceback.print_exc(limit=4)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
