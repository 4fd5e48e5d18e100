"""GPTQ (Frantar et al. 2022, "Accurate Post-Training Quantization for Generative Pre-trained Transformers").

Columns are rounded one after another, and the error of each is made up for by those still to come, so that
tr(E H E^T) stays small, with E = W - Q and H the second moment of the inputs. Written as in QuIP (Chee et al.
2023, theorem 6), which gives the same codes without inverting H: with H = M D M^T, M unit upper triangular,

    q_j = nearest level to w_j + sum_{i<j} e_i M_ij,    tr(E H E^T) = sum_j D_j |target_j - q_j|^2.

Grids are fixed before any column is rounded ("static groups"), so columns may go in any order: those of the
greatest mean square go first ("act-order"), and every Format with scales can be used. Damping adds 1% of
the mean diagonal to H. The paper stops here; builders/descent.py then improves codes and scales together.
Where the inputs were those of a model already quantized up to here, the weights are first moved so that the
outputs meet those of the f32 model (see `InputStatistics.drift`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from builders.coder import Coder, coder_of
from builders.descent import improve
from builders.grids import affine, grid_for, levels_of, range_of
from builders.quantize import AlgorithmOptions, int8_outlier
from builders.rounding import BlockRounding, ColumnGrid, by_columns
from builders.statistics import InputStatistics
from builders.torch_device import Workers, repeatable
from edge_runtime.engine.formats import Array, Format
from edge_runtime.errors import NumericError

ROW_WISE = False  # H is factored once for all rows; rows are worked on in chunks here
CALIBRATED = True
DAMPING = 0.01  # of the mean diagonal, the paper's
BLOCK = 128  # columns whose feedback to later ones is applied together, the paper's
_CHUNK = 3 << 20  # values of the rows that one worker works on together
_RUNS = 2  # of a trellis format, in one piece
_EXACT = 1024  # columns up to which all is done in f64, which then costs little


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols). Raises ValueOutOfRange.

    Without inputs, or in a format without scales: the observer's grid and the nearest level.
    """
    coder = coder_of(fmt, options.observer or "mse", options.rows)
    if coder is None:
        return int8_outlier.quantize(weights, fmt, inputs, options)
    if inputs is None:
        return coder.quantize(weights)
    with repeatable(options.device) as workers:
        hessian = Hessian.of(inputs, options.device)
        weights = hessian.target(weights, inputs)
        grid = coder.grid_for(weights, inputs.importance)
        values, grid = round_rows(weights, coder, grid, hessian, workers, refine=coder.refines)
    return coder.encode(values, grid)


def round_rows(
    weights: Array,
    coder: Coder,
    grid: dict[str, Array],
    hessian: Hessian,
    workers: Workers,
    *,
    refine: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """(values f32 (rows, cols), the grid they lie on); without `refine`, exactly the paper's."""
    (rows, cols), fmt = weights.shape, coder.fmt
    values = np.empty_like(weights)
    assert fmt.affine is not None  # formats with scales have it
    scale, shift = (np.broadcast_to(a, (rows, a.shape[1])) for a in fmt.affine(grid))
    # Rows that share a scale cannot each have a better one
    whole = any(p.whole and not p.derived for p in fmt.planes)
    step = -(-rows // -(-rows * cols // _CHUNK))  # pieces of one size, so that no worker waits for long
    if fmt.run > 1:
        step = min(-(-step // fmt.run), _RUNS) * fmt.run  # whole runs, and few: searching them takes long
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def work(part: slice) -> dict[str, Array]:
        w = torch.from_numpy(np.ascontiguousarray(weights[part].T)).to(hessian.matrix)
        a, b = (by_columns(x[part], w.shape[1], w) for x in (scale, shift))
        chosen = ColumnGrid(a, b, fmt.span(cols), coder.nearest(part, w))
        q, surprise = feedback(w, hessian.mixing, chosen, hessian.order)
        refit = None if whole or not refine else _Refit(fmt)
        if refine:
            gradient = hessian.gradient(surprise)
            del surprise
            q, chosen = improve(w, q, gradient, hessian.matrix, chosen, hessian.order, refit)
        values[part] = q.T.cpu().numpy()
        return grid if refit is None else refit.planes(chosen)

    made = list(workers.map(work, parts))
    if refine and not whole:
        grid = {name: np.concatenate([planes[name] for planes in made]) for name in made[0]}
    return values, grid


def feedback(w: Tensor, mixing: Tensor, grid: ColumnGrid, order: Tensor) -> tuple[Tensor, Tensor]:
    """Values q on the grid for w (cols, rows), rounded in `order`, and M^T (w - q), columns in that order.

    mixing is M, in that order. The second result is by how much each target was missed: target - q.
    """
    q, error, surprise = (torch.empty_like(w) for _ in range(3))  # the last two in order
    rounded, columns = BlockRounding(grid), order.tolist()
    for start in range(0, len(columns), BLOCK):
        at, block = order[start : start + BLOCK], slice(start, start + BLOCK)
        mine = w[at]
        reached = mixing[:start, block].T @ error[:start]
        near = mixing[block, block]
        q[at], error[block] = rounded(columns[block], mine + reached, mine, near)
        torch.addmm(reached, near.T, error[block], out=surprise[block])
    return q, surprise


@dataclass(frozen=True, slots=True, eq=False)
class Hessian:
    """The damped second moment of a linear's inputs, and what rounding with feedback needs of it.

    matrix H (n, n); order (n,): columns as they are rounded; in that order: mixing M (n, n), pivots D (n,).
    """

    matrix: Tensor
    order: Tensor
    mixing: Tensor
    pivots: Tensor

    @staticmethod
    def of(inputs: InputStatistics, device: str, *, act_order: bool = True) -> Hessian:
        """Raises NumericError when the moment is not positive even when damped: statistics are damaged."""
        exact = len(inputs.hessian) <= _EXACT and device == "cpu"
        matrix = _damped(inputs.hessian, torch.float64 if exact else torch.float32, device)
        if act_order:
            order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        else:
            order = torch.arange(len(matrix), device=device)
        return Hessian(matrix, order, *_mixing(matrix, order))

    def gradient(self, surprise: Tensor) -> Tensor:
        """H E (n, rows), columns as in H, of M^T E as `feedback` returns it, which is overwritten.

        As M D (M^T E): M is triangular, so that this costs half of the product with H.
        """
        surprise.mul_(self.pivots[:, None])
        result = torch.empty_like(surprise)
        for start in range(0, len(surprise), BLOCK):
            block = slice(start, start + BLOCK)
            result[self.order[block]] = self.mixing[block, start:] @ surprise[start:]
        return result

    def target(self, weights: Array, inputs: InputStatistics) -> Array:
        """The weights W' for which W' x is nearest to what the f32 model's linear gave, W x of its own x.

        W' = W + W D (H + damping)^-1 with D = E[(x_f32 - x) x^T]: GPTAQ's (Li et al. 2025) asymmetric error,
        solved at once. Where inputs did not drift: W.
        """
        if inputs.drift is None:
            return weights
        drift = torch.from_numpy(np.asarray(inputs.drift)).to(self.matrix)
        move = torch.cholesky_solve(drift.T, torch.linalg.cholesky(self.matrix))  # (H + damping)^-1 D^T
        moved = torch.from_numpy(weights).to(self.matrix) @ move.T
        result: Array = (weights + moved.float().cpu().numpy()).astype(np.float32)
        return result


def _damped(hessian: Array, dtype: torch.dtype, device: str) -> Tensor:
    """H + DAMPING * mean(diag H) * I. An input that never fired counts as an average one, by itself."""
    h = torch.from_numpy(np.asarray(hessian)).to(device=device, dtype=dtype, copy=True)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0.0:
        return torch.eye(len(h), dtype=dtype, device=device)
    dead = diagonal == 0
    diagonal += DAMPING * mean
    diagonal[dead] = mean
    return h


def _mixing(h: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """M and D with H = M D M^T in that order, M unit upper triangular: the Cholesky factor read from its end.

    At most three matrices of H's size exist at once, H being one.
    """
    backward = order.flip(0)
    root, failed = torch.linalg.cholesky_ex(h[backward][:, backward])
    if failed:
        root, failed = torch.linalg.cholesky_ex(h.double()[backward][:, backward])
        if failed:
            raise NumericError(
                "the second moment of a linear's inputs is not positive definite even when damped; the "
                "calibration is damaged: delete its folder and calibrate again"
            )
    mixing = root.to(h.dtype).flip(0, 1)
    del root
    ends = mixing.diagonal().clone()
    return mixing.div_(ends), ends.square_()


class _Refit:
    """Scales as the format holds them, rows by rows."""

    def __init__(self, fmt: Format) -> None:
        self._fmt = fmt

    def __call__(self, grid: ColumnGrid, factor: Tensor) -> ColumnGrid:
        made = affine(self._fmt, self.planes(grid.scaled(factor)))
        scale, shift = (by_columns(a, grid.scale.shape[1], grid.scale) for a in made)
        return replace(grid, scale=scale, shift=shift)

    def planes(self, grid: ColumnGrid) -> dict[str, Array]:
        scale, shift = (a.T.float().cpu().numpy() for a in (grid.scale, grid.shift))
        return grid_for(self._fmt, *range_of(scale, shift, levels_of(self._fmt)))
