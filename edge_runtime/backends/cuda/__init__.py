"""The cuda backend: kernels compiled at build time, launched through a small driver seam."""
