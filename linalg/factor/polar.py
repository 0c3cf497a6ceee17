"""The polar factor of a matrix by Newton-Schulz iteration: orthogonalisation by matrix products alone.

``linalg`` exports `newton_schulz`, and the Muon optimizer calls it. Each step calls `herk` twice and `contract` once.
The Gram matrix stays put, panels of X move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, LayoutError, OptionError, ShapeError, SingularError
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import layout_map
from colossal_mpi.linalg.factor.syrk import herk
from colossal_mpi.platform import backend

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, Coefficients] = {
    # Jordan et al. 2024: as steep as possible at 0; the singular values end between about 0.7 and 1.2.
    "muon": (3.4445, -4.7750, 2.0315),
    # The Padé approximants of degree 3 and 5 converge to the polar factor, with 2 and 3 times the digits after a step.
    "cubic": (1.5, -0.5, 0.0),
    "quintic": (1.875, -1.25, 0.375),
}
"""The coefficients a, b, c of a step ``X <- a X + b (X X^H) X + c (X X^H)^2 X``."""

MOST = 120
"""The greatest number of steps if ``steps=None``."""


def newton_schulz(
    g: DistArray,
    steps: int | None = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "muon",
    epsilon: float = 1e-7,
    in_place: bool = False,
) -> DistArray:
    """Return the nearest matrix with orthonormal rows or columns (the polar factor), or an approximation of it.

    Parameters
    ----------
    g : DistArray, ``[m, n]``
        A matrix of float or complex dtype in any layout. The factor is computed where the blocks are, by all ranks
        along axes that replicate `g`.
    steps : int or None
        The number of steps. None iterates until the factor is orthonormal to rounding or no longer improves; the
        ``muon`` coefficients never converge and need a number.
    coefficients : {"muon", "cubic", "quintic"}, (a, b, c) or sequence of (a, b, c)
        The coefficients of ``X <- a X + b (X X^H) X + c (X X^H)^2 X``, which starts at ``g / (||g||_F + epsilon)``; a
        sequence has one (a, b, c) for each step. ``muon`` brings the singular values near 1 in five steps. The other
        two converge to 1: small singular values grow by a factor of 1.5 or 1.875 in each step.
    epsilon : float
        Added to the norm, so that zeros stay zeros.
    in_place : bool
        Whether to write the result into the blocks of `g`.

    Returns
    -------
    DistArray, ``[m, n]``
        The factor in the layout of `g`, with partial sums reduced; `g` itself if `in_place`.

    Raises
    ------
    ShapeError, DTypeError, LayoutError, OptionError
        If `g` is no matrix of floats, or a partial sum that is to be written in place, or steps and coefficients do
        not fit.
    SingularError
        If ``steps=None`` and `g` does not have full rank.

    Notes
    -----
    **Communication:** let s be the shorter dim, cut into p parts, and l the longer, cut into q parts; for a square
    matrix the dim in more parts counts as the shorter. Summed over ranks, a step receives the words of `herk` of
    ``[s, l]`` and, unless c = 0, of `herk` of ``[s, s]``, with n in p and k in q parts, and ``s l (p - 1)`` words of
    panels of X in the last product. `g` is never gathered: besides a few blocks of the size of its own, a rank stores
    two panels of s l / pq and three arrays of s^2 / p elements.

    References
    ----------
    Jordan et al.: Muon: an optimizer for hidden layers in neural networks, 2024. Björck, Bowie: An iterative algorithm
    for computing the best estimate of an orthogonal matrix, 1971.

    Examples
    --------
    >>> u = newton_schulz(g, steps=None, coefficients="quintic")
    """
    schedule = _schedule(steps, coefficients)
    _check(g, in_place)
    whole = g.reduced()
    flip = _long(whole)
    x = whole.T if flip else whole
    size, scale = x.norm() + epsilon, 1.0
    if math.isinf(size):  # the norm is beyond the range of float64
        scale = 2.0**-64
    elif size < 2.0**-960:  # so near the end of the range it has few digits
        scale = 2.0**600
    if scale != 1.0:
        x = x * scale
        size = x.norm() + epsilon * scale
    x = x / (size or 1.0)
    if schedule is None:
        x = _converged(x, _constants(coefficients))
    else:
        for constants in schedule:
            # X[S_row, L_col] . X^H[L_col, S] -> G[S_row, S]
            x = _step(x, herk(x), constants)
    x = x.T if flip else x
    if not in_place:
        return x
    g.local[...] = x.local
    return g


def _constants(coefficients: object) -> Coefficients:
    """Return the a, b, c that a name or a sequence of three numbers gives; raise OptionError otherwise."""
    if isinstance(coefficients, str) and coefficients in COEFFICIENTS:
        return COEFFICIENTS[coefficients]
    given = tuple(coefficients) if isinstance(coefficients, Sequence) and not isinstance(coefficients, str) else ()
    if len(given) != 3 or not all(isinstance(x, int | float) for x in given):
        raise OptionError(
            f"newton_schulz: coefficients={coefficients!r}; use {', '.join(map(repr, COEFFICIENTS))}, (a, b, c) "
            "or a list of one (a, b, c) for each step"
        )
    return float(given[0]), float(given[1]), float(given[2])


def _schedule(
    steps: int | None, coefficients: str | Coefficients | Sequence[Coefficients]
) -> list[Coefficients] | None:
    """Return the a, b, c of every step, None if the iteration stops by itself."""
    several = not isinstance(coefficients, str) and any(not isinstance(x, int | float) for x in coefficients)
    if steps is None:
        a, b, c = _constants(coefficients)
        if abs(a + b + c - 1) > 1e-12:  # 1 must be a fixed point
            raise OptionError(
                f"newton_schulz: {coefficients!r} never converges; give a number of steps, or use 'quintic'"
            )
        return None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0 or (several and len(coefficients) != steps):
        raise OptionError(
            f"newton_schulz: steps={steps!r} with coefficients={coefficients!r}; use a number of steps from 0 on, and "
            "one (a, b, c) or as many as steps"
        )
    return [_constants(x) for x in coefficients] if several else [_constants(coefficients)] * steps


def _check(g: DistArray, in_place: bool) -> None:
    if not isinstance(g, DistArray):
        raise DTypeError(f"newton_schulz of {type(g).__name__}: make a DistArray of it")
    if g.ndim != 2:
        raise ShapeError(f"newton_schulz of shape {g.shape}: it must be a matrix, of 2 dims")
    if backend.numpy_dtype(g.dtype).kind not in "fc":
        raise DTypeError(f"newton_schulz of {g.dtype}: use a float or complex dtype; cast it with .astype")
    if in_place and g.layout.partial:
        raise LayoutError(f"newton_schulz of {g} in place: it holds partial sums; redistribute it first")


def _long(x: DistArray) -> bool:
    """Return whether the first dim is the longer one; of two equal dims, the one in fewer parts counts as longer."""
    parts = [x.grid.extent(axes) for axes in x.layout.dims]
    return (x.shape[0], -parts[0]) > (x.shape[1], -parts[1])


def _step(x: DistArray, gramian: DistArray, constants: Coefficients) -> DistArray:
    """Return ``a x + (b G + c G^2) x`` for the Gram matrix ``G = x x^H``, whose rows are cut as the rows of `x`."""
    a, b, c = constants
    factor = gramian.local * b
    if c:
        # G[S_row, S_col] . G^H[S_col, S] -> G^2[S_row, S]: herk computes half of the product
        factor = factor + herk(gramian, layout_map("nk", x.layout)).local * c
    panel = max(1, -(-x.shape[0] // x.grid.extent(x.layout.dims[0])))
    # F[S_row, S] . X[S, L_col] + a X[S_row, L_col] -> X[S_row, L_col], in panels of X
    return contract(
        "mk,kn->mn", gramian.like(factor), x, layout_map("mn", x.layout), x.copy(), beta=a, stream="k", panel=panel
    )


def _converged(x: DistArray, constants: Coefficients) -> DistArray:
    """Iterate until the rows of `x` are orthonormal to rounding, or the distance no longer shrinks."""
    eps, last = float(backend.namespace(x.local).finfo(x.dtype).eps), math.inf
    for _ in range(MOST):
        # X[S_row, L_col] . X^H[L_col, S] -> G[S_row, S]
        gramian = herk(x)
        distance = _distance(gramian)
        if distance <= eps * x.shape[0] or (last < 0.5 and distance >= last):
            return x
        x, last = _step(x, gramian, constants), distance
    raise SingularError(
        f"newton_schulz of shape {x.shape}: no factor after {MOST} steps; it must have full rank (singular values "
        f"above {eps:.0e} of its norm): give a number of steps"
    )


def _distance(gramian: DistArray) -> float:
    """Return the Frobenius norm of a square matrix minus the identity, the same bits on all ranks."""
    xp, ((low, high), _) = backend.namespace(gramian.local), gramian.box
    unit = xp.arange(low, high)[:, None] == xp.arange(gramian.shape[1])[None, :]
    return gramian.like(gramian.local - xp.astype(unit, gramian.dtype)).norm()
