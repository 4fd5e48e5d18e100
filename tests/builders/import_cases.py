"""The already quantized folders that tests make: how each is written, and the formats that hold it."""

from __future__ import annotations

from typing import Any

from quantized_folders import (
    Writer,
    awq_config,
    awq_writer,
    bnb_config,
    compressed_config,
    compressed_writer,
    fp8_writer,
    gptq_config,
    gptq_writer,
    int8_writer,
    nf4_writer,
    save_fp8,
)
from safetensors.numpy import save_file


def saver(config: dict[str, Any]) -> Any:
    """What writes the weights: the library, or our own writer where they are FP8, which numpy has not."""
    fp8 = config["quant_method"] == "fp8" or config.get("format") == "float-quantized"
    return save_fp8 if fp8 else save_file


WIDE = {"hidden_size": 64, "intermediate_size": 128}

CASES: dict[str, tuple[Writer, dict[str, Any], set[str]]] = {
    "gptq": (gptq_writer(), gptq_config(), {"int4_g32"}),
    "gptq-v2-asym": (
        gptq_writer(symmetric=False, v2=True),
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        {"int4_g32_zp"},
    ),
    "gptq-wide-group": (gptq_writer(group=64), gptq_config(group=64), {"int4_g64", "int4_g128"}),
    "gptq-rows": (gptq_writer(group=-1), gptq_config(group=-1), {"int4_g128"}),
    "gptq-8bit": (gptq_writer(8), gptq_config(8), {"int8_g32"}),
    "gptq-8bit-rows": (gptq_writer(8, -1), gptq_config(8, -1), {"int8_row"}),
    "awq": (awq_writer(), awq_config(), {"int4_g32_zp"}),
    "awq-rows": (awq_writer(-1), awq_config(-1), {"int4_g128_zp"}),
    "bnb-int8": (int8_writer(), bnb_config(8), {"int8_row"}),
    "fp8-tensor": (fp8_writer("tensor"), {"quant_method": "fp8"}, {"fp8_e4m3_tensor"}),
    "fp8-row": (fp8_writer("row"), {"quant_method": "fp8"}, {"fp8_e4m3_row"}),
    "ct-int4-group": (
        compressed_writer(group=32),
        compressed_config("pack-quantized", 4, strategy="group", group_size=32),
        {"int4_g32"},
    ),
    "ct-int4-group-asym": (
        compressed_writer(group=32, symmetric=False),
        compressed_config("pack-quantized", 4, strategy="group", group_size=32, symmetric=False),
        {"int4_g32_zp"},
    ),
    "ct-int4-channel": (compressed_writer(), compressed_config("pack-quantized", 4), {"int4_g128"}),
    "ct-int8-channel-packed": (compressed_writer(8), compressed_config("pack-quantized", 8), {"int8_row"}),
    "ct-int8-channel": (
        compressed_writer(8, packed=False),
        compressed_config("int-quantized", 8),
        {"int8_row"},
    ),
    "ct-fp8": (fp8_writer("row"), compressed_config("float-quantized", 8, type="float"), {"fp8_e4m3_row"}),
}

# To be appended after the merge: nf4, fp8 blocks, act-order
LATER = {
    "bnb-nf4": (nf4_writer(), bnb_config(4), {"nf4_g64_f32"}),
}
