"""f32 weights by blocks and single rows, from checkpoints of every architecture and from packed planes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from arch_cases import CASES, json_of
from hf_folders import byte_tokenizer, llama_config
from safetensors.numpy import save_file

from builders.archs import read_program
from builders.sources import open_source
from builders.weights import CheckpointWeights, EngineWeights, row_blocks
from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.packing import cpu_packing, pack
from edge_runtime.engine.plan import TensorPlan
from edge_runtime.engine.program import Program, TensorSpec
