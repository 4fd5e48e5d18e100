"""Which formats may be planned for a device: those of its precisions that its backend has kernels for."""

from __future__ import annotations

from collections.abc import Iterable

from edge_runtime.engine.device_code import CACHES, has_kernels
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.profile import Profile


def precision(format_name: str) -> str:
    """The precision class that a profile lists: f32, f16, bf16, int2 to int6, int8, nf4, tcq, fp8, mxfp4 and
    nvfp4.

    A k-quant's is that of its codes: q4_k is int4. Trellis codes of all widths are decoded alike: tcq.
    """
    get_format(format_name)
    first, _, rest = format_name.partition("_")
    if first.startswith("tcq"):
        return "tcq"
    return f"int{first[1:]}" if rest == "k" else first


def runs(profile: Profile, format_name: str) -> bool:
    """Whether matrices of a format may be planned for the device."""
    kernels = profile.backend != "cuda" or has_kernels(format_name)
    return kernels and profile.supports(precision(format_name))


def caches(profile: Profile) -> tuple[str, ...]:
    """Names of KV formats that the device's backend has kernels for."""
    return CACHES if profile.backend == "cuda" else tuple(K_FORMATS)


def running_pairs(profile: Profile, pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Those of K and V formats that the device's backend has kernels for, in order."""
    known = caches(profile)
    return tuple((k, v) for k, v in pairs if k in known and v in known)
