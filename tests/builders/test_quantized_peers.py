"""Imports against the methods' own libraries: they quantize and pack, we read, and both give the same values.

Where a library dequantizes to f16, our exact f32 value rounded to f16 must be its number, bit for bit. The
project needs none of them: each test skips where its library is absent.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quantized_folders import (
    Tensors,
    affine_grid,
    awq_config,
    awq_writer,
    bnb_config,
    compressed_config,
    gptq_config,
    write_quantized,
)

from builders.sources import open_source

torch = pytest.importorskip("torch", reason="needs torch")
Array = np.ndarray
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


class Library:
    """A writer that lets a library store each module, and keeps what the library says the values are."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.values: dict[str, Array] = {}

    def __call__(self, module: str, weight: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        tensors, values = self.store(torch.from_numpy(weight), rng)
        self.values[f"{module}.weight"] = values
        return {f"{module}.{k}": v for k, v in tensors.items()}, values.astype(np.float32)


def save_torch(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    whole = {k: v if isinstance(v, torch.Tensor) else torch.from_numpy(v) for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in whole.items()}, str(path))


def compare(folder: Path, library: Library, *, count: int = 7) -> None:
    """Every value is the library's, in the library's type."""
    with open_source(folder) as source:
        assert len(source.matrices) == len(library.values) == count
        for key, want in library.values.items():
            got = source.tensor(key).astype(want.dtype)
            # A product that is 0 may have either sign
            np.testing.assert_array_equal(got + want.dtype.type(0), want + want.dtype.type(0))


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False), (8, True)])
def test_gptqmodel(tmp_path: Path, bits: int, symmetric: bool, act_order: bool, v2: bool) -> None:
    """Packed and dequantized by GPTQModel; zero points of 0 included, for which its v1 borrows."""
    # Its own requirements would bring another torch
    how = (
        "needs gptqmodel: pip install --no-deps gptqmodel; "
        "pip install -c constraints.txt accelerate threadpoolctl logbar pypcre device-smi tokenicer defuser"
    )
    name = "gptqmodel.nn_modules.qlinear.torch"
    linears = pytest.importorskip(name, reason=how, exc_type=ImportError)
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    group = 64

    def store(weight: Any, rng: np.random.Generator) -> tuple[Tensors, Array]:
        rows, cols = weight.shape
        if not symmetric:
            weight[:8] = weight[:8].abs()  # their zero point is 0
        order = rng.permutation(cols) if act_order else np.arange(cols)
        g_idx = np.empty(cols, np.int64)
        g_idx[order] = np.arange(cols) // group
        _, scale, zero = affine_grid(weight.numpy()[:, order], group, bits, symmetric)
        made = linears.TorchLinear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=act_order,
            in_features=cols,
            out_features=rows,
        )
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = weight
        wide = torch.from_numpy(scale.astype(np.float32)), torch.from_numpy(zero.astype(np.float32))
        made.pack_original(linear, *wide, torch.from_numpy(g_idx.astype(np.int32)))
        if not v2:
            convert_gptq_v2_to_v1_format_module(made, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        names = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {n: getattr(made, n).clone().numpy() for n in names}
        if not v2:
            convert_gptq_v1_to_v2_format_module(made, bits=bits, pack_dtype=torch.int32)
        made.post_init()
        return tensors, made.dequantize_weight().T.contiguous().numpy()

    config = gptq_config(bits, group, sym=symmetric, desc_act=act_order)
    config["checkpoint_format"] = "gptq_v2" if v2 else "gptq"
    library = Library(store)
    write_quantized(tmp_path / "m", config, library, **WIDE)
    compare(tmp_path / "m", library)


def test_autoawq(tmp_path: Path) -> None:
    """Dequantized by AutoAWQ's own function (its package needs much that is not here: one file is loaded)."""
    found = importlib.util.find_spec("awq")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs autoawq: pip install --no-deps autoawq")
    path = Path(next(iter(found.submodule_search_locations))) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing_utils", path)
    assert spec is not None and spec.loader is not None
    packing = importlib.util.module_from_spec(spec)
    sys.modules["awq_packing_utils"] = packing
    spec.loader.exec_module(packing)
    written = awq_writer(64)

    def store(weight: Any, rng: np.random.Generator) -> tuple[Tensors, Array]:
        tensors, _ = written("m", weight.numpy(), rng)
        tensors = {k.removeprefix("m."): v for k, v in tensors.items()}
        parts = (torch.from_numpy(tensors[n]) for n in ("qweight", "qzeros", "scales"))
        return tensors, packing.dequantize_gemm(*parts, 4, 64).T.contiguous().numpy()

    library = Library(store)
    write_quantized(tmp_path / "m", awq_config(64), library, **WIDE)
    compare(tmp_path / "m", library)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double", [False, True], ids=["absmax", "double"])
def test_bitsandbytes_nf4(tmp_path: Path, block: int, double: bool) -> None:
    bnb = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: pip install bitsandbytes"
    )

    def store(weight: Any, rng: np.random.Generator) -> tuple[Tensors, Array]:
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return tensors, bnb.dequantize_4bit(packed, state).numpy()

    library = Library(store)
    write_quantized(tmp_path / "m", bnb_config(4), library, save=save_torch, **WIDE)
    compare(tmp_path / "m", library)
    with open_source(tmp_path / "m") as source:
        formats = {matrix.home().format for matrix in source.matrices.values()}
        assert formats == {"nf4_g64_dq" if double and block == 64 else "nf4_g64_f32"}
        for key, matrix in source.matrices.items():  # and so do the planes
            assert matrix.home().error == 0.0, key


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    """The library rounds twice (by SCB, then by 1/127), we once: within 2^-22 of it, and nearly all equal in
    f16."""
    bnb = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: pip install bitsandbytes"
    )

    def store(weight: Any, rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes, most, _ = bnb.int8_vectorwise_quant(weight.half())
        tensors = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, bnb.int8_vectorwise_dequant(codes, most).numpy()

    library = Library(store)
    write_quantized(tmp_path / "m", bnb_config(8), library, save=save_torch, **WIDE)
    with open_source(tmp_path / "m") as source:
        for key, want in library.values.items():
            got = source.tensor(key)
            np.testing.assert_allclose(got, want, rtol=2.0**-22, atol=0)
            assert (got.astype(np.float16) == want.astype(np.float16)).mean() > 0.998


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
    "int4-group-asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 128}),
    "int3-group": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 64}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_tensors(tmp_path: Path, name: str, dtype: str) -> None:
    """Compressed and decompressed by the library, scales and results in the model's type."""
    pytest.importorskip(
        "compressed_tensors", reason="needs compressed-tensors: pip install compressed-tensors"
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights = SCHEMES[name]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    kind = getattr(torch, dtype)
    results = set()  # the library's own choice, bf16 for NVFP4 and MXFP4

    def store(weight: Any, rng: np.random.Generator) -> tuple[Tensors, Array]:
        weight = weight.to(kind)
        rows, cols = weight.shape
        strategy = weights["strategy"]
        shared = None
        if strategy == "tensor":
            cut = weight.reshape(1, -1)
        elif strategy == "channel":
            cut = weight
        elif strategy == "block":
            cut = weight.reshape(rows // 128, 128, cols // 128, 128).transpose(1, 2).flatten(2)
        else:
            cut = weight.reshape(rows, -1, weights["group_size"])
        low, high = cut.amin(-1), cut.amax(-1)
        if strategy == "tensor_group":
            shared = (448 * 6 / weight.abs().max()).float().reshape(1)
        scale, zero = calculate_qparams(low, high, args, global_scale=shared)
        if strategy in ("tensor", "channel"):
            scale, zero = (
                t.reshape(1) if strategy == "tensor" else t.reshape(rows, 1) for t in (scale, zero)
            )
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if shared is not None:
            state["weight_global_scale"] = shared
        stored = compressor.compress(dict(state), scheme)
        back = compressor.decompress(dict(stored), scheme)["weight"]
        results.add(back.dtype)
        return stored, back.float().numpy()

    config = compressed_config(form, weights["num_bits"], **weights)
    library = Library(store)
    write_quantized(tmp_path / "m", config, library, save=save_torch, **WIDE)
    with open_source(tmp_path / "m") as source:
        assert len(source.matrices) == 7
        (result,) = results
        for key, want in library.values.items():
            got = torch.from_numpy(source.tensor(key)).to(result).float().numpy()
            np.testing.assert_array_equal(got + np.float32(0), want + np.float32(0))
