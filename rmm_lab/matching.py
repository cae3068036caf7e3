"""Merges that look at activations: a linear layer is chosen by what it does to its inputs.

    RegMean         W = (sum_i W_i G_i) (sum_i G_i)^-1                             Jin et al. 2023, Eq. 2
    least squares   W = argmin sum_i w_i mean |W x - y_i|^2 + rho |W - W_0|^2       Nasery et al. 2024, Eq. 5

Both need no labels and no gradient. Both are closed forms of *Gram matrices*, which a model's inputs are
streamed into: ``G_i = X_i' X_i / n_i``, the mean over n_i rows x of what task i feeds the layer.
``engine.calibration`` collects them, layer by layer. Here are the formulas alone.

Shapes: N experts, D inputs of the layer (a bias is one more column of ones), O outputs, in that order. All is
computed in float64 and returned in the dtype of the weights or of the Gram matrices. Matrices that hold NaN
or infinity, or do not fit each other, raise InputError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmm_lab.errors import InputError

# Eigenvalues below this share of the largest say nothing: inputs have float32's digits, and Gram matrices
# the squares of their singular values.
OPEN = 1e-12


def regmean(grams: Tensor, weights: Tensor, *, alpha: float = 0.9) -> Tensor:
    """RegMean: the linear layer whose outputs are nearest to each expert's on its own inputs.

    ``W = (sum_i W_i G_i) (sum_i G_i)^-1``, the off-diagonal entries of every G_i scaled by alpha (Jin et al.
    2023, Eq. 2 and Sec. 3.3). An input that no task ever uses gets the plain average.

    grams: (N, D, D), divided by their numbers of rows, or larger tasks count for more; weights: (N, O, D);
    alpha in [0, 1]: 1 is the least-squares solution, 0 weighs each column by its inputs' mean square.
    Returns (O, D).
    """
    if weights.dim() != 3:
        raise InputError(
            f"weights: expected shape (N, O, D), found {tuple(weights.shape)}; see rmm_lab.matching"
        )
    check("grams", grams, (len(weights), weights.shape[-1], weights.shape[-1]))
    check("weights", weights, tuple(weights.shape))
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: expected a number in [0, 1], found {alpha}; correct it")
    g, w = grams.double(), weights.double()
    g = alpha * g + (1 - alpha) * torch.diag_embed(torch.diagonal(g, dim1=1, dim2=2))  # (N, D, D)
    average = w.mean(0)  # (O, D): what stays where all Gram matrices are 0
    moved = ((w - average) @ g).sum(0)  # (O, D)
    return (average + _solve(_raised(g.sum(0), 0.0, grams.dtype), moved.T).T).to(weights.dtype)


def least_squares(
    xx: Tensor, xy: Tensor, *, weights: Tensor, ridge: float, anchor: Tensor | None = None
) -> Tensor:
    """The linear layer that is nearest to each expert's own outputs, on what the merged model feeds it.

    ``W = (sum_i w_i X_i'X_i + rho I)^-1 (sum_i w_i X_i'Y_i + rho W_0)`` with ``rho = ridge`` times the mean
    diagonal of the first sum: the refit of PLeaS (Nasery et al. 2024, Eq. 5) for experts of one base, with a
    weight for each task and a ridge towards an anchor. A ridge of 0 gives the solution nearest to the
    anchor, also where the inputs leave W open; infinity gives the anchor.

    xx: (N, D, D) and xy: (N, D, O), divided by their numbers of rows; weights: (N,), at least 0, not all 0;
    only their ratios count; ridge: at least 0; anchor: (O, D), None for 0. Returns (O, D).
    """
    a, b = sums(xx, xy, weights)  # (D, D), (D, O)
    if not ridge >= 0:
        raise InputError(f"ridge: expected a number of 0 or more, found {ridge}; correct it")
    if anchor is not None:
        check("anchor", anchor, (b.shape[1], b.shape[0]))
    start = b.new_zeros(b.shape) if anchor is None else anchor.double().T  # (D, O)
    dtype = xy.dtype if anchor is None else anchor.dtype
    return towards(a, b, start, ridge, xx.dtype).T.to(dtype)


def sums(xx: Tensor, xy: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both sums over tasks with weights that add up to 1: (D, D), (D, O) in float64."""
    n, d = len(xx), xx.shape[-1]
    check("xx", xx, (n, d, d))
    check("xy", xy, (n, d, xy.shape[-1]))
    a, b = (torch.zeros(m.shape[1:], dtype=torch.float64) for m in (xx, xy))
    for i, share in enumerate(shares(weights, n)):
        a.add_(xx[i], alpha=share)
        b.add_(xy[i], alpha=share)
    return a, b


def shares(weights: Tensor, n: int) -> list[float]:
    """N weights (N,) of tasks, scaled so that they add up to 1; InputError for those that cannot."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    if w.shape != (n,) or not bool((w >= 0).all() and 0 < w.sum() < torch.inf):
        raise InputError(
            f"weights: expected {n} numbers of 0 or more, not all 0, found {w.tolist()}; correct them"
        )
    return (w / w.sum()).tolist()


def towards(
    a: Tensor, b: Tensor, start: Tensor, ridge: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``start + (a + rho I)^-1 (b - a start)``: (D, D), (D, O), (D, O) -> (D, O).

    dtype: in which ``a`` was summed up.
    """
    if ridge == float("inf"):
        return start
    return start + step(a, b - a @ start, ridge, dtype)


def step(a: Tensor, lack: Tensor, ridge: float, dtype: torch.dtype) -> Tensor:
    """``(a + rho I)^-1 lack`` of ``towards``, for a finite ridge: (D, D), (D, O) -> (D, O)."""
    rho = ridge * float(a.diagonal().mean())
    size = float(a.norm())
    # Rounding leaves no eigenvalue far below 0, so that rho is the least of a + rho I.
    clear = rho > (4 * _noise(dtype) + 2 * OPEN) * size
    return _solve(_raised(a, rho, dtype), lack, clear)


def _noise(dtype: torch.dtype) -> float:
    """Rounding errors of sums in less than float64, as a share of their norm."""
    return 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps


def _raised(a: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """``a + rho I``, with a rho above the rounding errors of sums in less than float64."""
    raised = a.clone()
    raised.diagonal().add_(max(rho, _noise(dtype) * float(a.norm())))
    return raised


def _solve(a: Tensor, b: Tensor, clear: bool = False) -> Tensor:
    """The smallest x of ``a x = b``; a: (D, D) symmetric, positive semidefinite; b: (D, O) -> (D, O).

    clear: whether no eigenvalue is known to be near 0, so that none is looked for.
    """
    factor, failed = torch.linalg.cholesky_ex(a)
    if clear and not failed:
        return torch.cholesky_solve(b, factor)
    if not failed:
        # The smallest eigenvalue by inverse iteration; the factor's diagonal may hide it.
        v = torch.randn(len(a), 1, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            v = torch.cholesky_solve(v / v.norm(), factor)
        if 1 / v.norm() > OPEN * a.norm():
            return torch.cholesky_solve(b, factor)
    values, vectors = torch.linalg.eigh(a)  # (D,), (D, D)
    open_ = values <= OPEN * values.abs().max()
    inverse = torch.where(open_, 0.0, 1 / torch.where(open_, 1.0, values))
    return vectors @ (inverse[:, None] * (vectors.T @ b))


def check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """InputError unless a tensor is one of finite numbers of this shape."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise InputError(
            f"{name}: expected a floating tensor of shape {shape}, found {tuple(tensor.shape)} and "
            f"{tensor.dtype}; see rmm_lab.matching for what N, D and O are"
        )
    # A sum is fast, and finite only where all numbers are; the other way round it may overflow.
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"{name}: expected finite numbers, found NaN or infinity; look for broken inputs, or for "
            "half precision that overflows"
        )
