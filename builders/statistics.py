"""What calibration knows of one linear's inputs: enough for every algorithm, and independent of weights.

With the second moment H = sum x x^T / count, the error of a rounded matrix Q on the calibration text is
count * tr((W - Q) H (W - Q)^T), so scales, clips and codes can all be searched without the text itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import Array

SAMPLE_ROWS = 256  # inputs that are kept as they are, for algorithms that round activations


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """Of the inputs x (n,) that a linear saw, over `count` tokens.

    hessian: f32 (n, n), the mean of x x^T. absmax, mean_abs: f32 (n,), of every channel. rows: f16 or f32
    (at most SAMPLE_ROWS, n), some of the inputs. drift: where x are inputs of a model that is quantized up to
    here, f32 (n, n), the mean of (f - x) x^T with f the same token's input in the f32 model; else None.
    """

    count: int
    hessian: Array
    absmax: Array
    mean_abs: Array
    rows: Array
    drift: Array | None = None

    @property
    def importance(self) -> Array:
        """Mean square of every channel, f64 (n,): the diagonal of the second moment."""
        found: Array = np.diagonal(self.hessian).astype(np.float64)
        return found

    def scaled(self, scale: Array) -> InputStatistics:
        """The statistics of x / scale, scale (n,) positive."""
        inverse = (1.0 / np.asarray(scale, np.float64)).astype(np.float32)
        return InputStatistics(
            self.count,
            self.hessian * inverse[:, None] * inverse,
            self.absmax * inverse,
            self.mean_abs * inverse,
            self.rows * inverse,
            None if self.drift is None else self.drift * inverse[:, None] * inverse,
        )


def output_error(error: Array, inputs: InputStatistics) -> float:
    """Mean over tokens of the squared output error of weights off by `error` (rows, n): tr(E H E^T)."""
    return max(float(np.einsum("ij,ij->", error @ inputs.hessian, error, dtype=np.float64)), 0.0)
