"""The already quantized folders that tests make: how each is written, and the formats that hold it."""

from __future__ import annotations

from typing import Any

from quantized_folders import Writer, awq_config, awq_writer, gptq_config, gptq_writer

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
}
