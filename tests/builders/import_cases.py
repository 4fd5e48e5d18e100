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

from edge_runtime.engine.formats.nf4_double import DYNAMIC


def saver(config: dict[str, Any]) -> Any:
    """What writes the weights: the library, or our own writer where they are FP8, which numpy has not."""
    fp8 = config["quant_method"] == "fp8" or config.get("format") == "float-quantized"
    return save_fp8 if fp8 else save_file


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}

CASES: dict[str, tuple[Writer, dict[str, Any], set[str]]] = {
    "gptq": (gptq_writer(), gptq_config(), {"int4_g32"}),
    "gptq-v2-asym": (
        gptq_writer(symmetric=False, v2=True),
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        {"int4_g32_zp"},
    ),
    "gptq-wide-group": (gptq_writer(group=64), gptq_config(group=64), {"int4_g64"}),
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
    "gptq-2bit": (gptq_writer(2), gptq_config(2), {"int2_g32"}),
    "gptq-2bit-asym": (
        gptq_writer(2, symmetric=False, v2=True),
        gptq_config(2, checkpoint_format="gptq_v2"),
        {"int2_g32_zp"},
    ),
    "gptq-3bit": (gptq_writer(3), gptq_config(3), {"int3_g32"}),
    "gptq-3bit-asym": (gptq_writer(3, symmetric=False), gptq_config(3, sym=False), {"int3_g32_zp"}),
    "gptq-act-order": (gptq_writer(act_order=True), gptq_config(desc_act=True), {"int4_g32"}),
    "ct-act-order": (
        compressed_writer(group=32, act_order=True),
        compressed_config("pack-quantized", 4, strategy="group", group_size=32, actorder="group"),
        {"int4_g32"},
    ),
    "bnb-nf4": (nf4_writer(), bnb_config(4), {"nf4_g64_f32"}),
    "bnb-nf4-double": (nf4_writer(double=True, quant_map=DYNAMIC), bnb_config(4), {"nf4_g64_dq"}),
    "fp8-block": (
        fp8_writer("block", "weight_scale_inv", (32, 128)),
        {"quant_method": "fp8", "weight_block_size": [32, 128]},
        {"fp8_e4m3_g128"},
    ),
}
