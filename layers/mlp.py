"""The MLP between two points of the stream."""

from __future__ import annotations

from typing import Any

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import ACTIVATIONS, GATED, Gated
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism


class MLP(Sequential):
    """Two products with an activation between them, ``[b, s, h]`` to ``[b, s, f]`` and back.

    Several side by side are the experts of a mixture, which take slots ``[e, p, c, h]`` instead.

    Parameters
    ----------
    hidden, inner : int
        h and f.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters of ``up`` and ``down``.
    activation : str
        One of `ACTIVATIONS`, or of `GATED`, whose weight up is ``[h, 2, f]``: of the gate and of what it lets through.
    experts : int, optional
        Number of MLPs, e, the first letter of their weights; `parallelism` is that of `Parallelism.experts`.
    std, out_std : float
        Standard deviations of the initial weights up and down.
    **common
        ``bias``, ``seed`` and ``dtype``, as `Linear` takes them.

    Raises
    ------
    OptionError
        If there is no such activation.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        parallelism: Parallelism,
        name: str,
        *,
        activation: str = "gelu-tanh",
        experts: int | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
        **common: Any,
    ) -> None:
        if activation not in (*ACTIVATIONS, *GATED):
            fitting = ", ".join(map(repr, (*ACTIVATIONS, *GATED)))
            raise OptionError(f"{name}: activation={activation!r}: use one of {fitting}")
        function, gated = ACTIVATIONS[GATED.get(activation, activation)](), activation in GATED
        (tokens, each), pair = ("bs", "") if experts is None else ("epc", "e"), "t" if gated else ""
        sizes = {"e": experts or 1, "h": hidden, "f": inner, "t": 2}
        up, down = f"{tokens}h,{each}h{pair}f->{tokens}{pair}f", f"{tokens}f,{each}fh->{tokens}h"
        super().__init__(
            Linear(up, sizes, "f", parallelism, f"{name}.up", std=std, **common),
            Gated(function) if gated else function,
            Linear(down, sizes, "f", parallelism, f"{name}.down", std=out_std, **common),
        )
