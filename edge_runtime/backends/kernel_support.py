"""Whether a backend of kernels can run a program with given formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime.backends.protocol import Support
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.program import Program
from edge_runtime.errors import nearest


def kernel_support(
    backend: str, program: Program, formats: Mapping[str, str], has_kernel: Callable[[str], bool]
) -> Support:
    """The answer of `Backend.supports`: every tensor has a known format, every matrix one with a kernel."""
    for tensor, spec in program.tensors.items():
        if tensor not in formats:
            return Support(False, f"tensor {tensor!r} of the program has no format")
        name = formats[tensor]
        if name not in FORMATS:
            return Support(
                False, f"tensor {tensor!r} has the unknown format {name!r}; {nearest(name, FORMATS)}"
            )
        if spec.role != "vector" and not has_kernel(name):
            return Support(
                False, f"the {backend} backend has no kernel for format {name!r} (tensor {tensor!r})"
            )
    return Support(True)
