"""The cuda backend: kernels compiled at build time, launched through a small driver seam."""

from edge_runtime.backends.cuda.backend import BACKEND

__all__ = ["BACKEND"]
