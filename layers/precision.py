"""Mixed precision: 16-bit weights, activations and cotangents, with float32 master weights, gradients and sums.

A parameter of a 16-bit dtype stores its weight so. Its gradient is float32 from the product that makes it, and its
optimizer steps a float32 master, in the layout of its state, of which the weight is the rounded value. What sums many
terms (products, norms, softmax, losses, reductions over ranks) does so in float32.

References
----------
Micikevicius et al.: Mixed precision training, 2018. Kalamkar et al.: A study of bfloat16 for deep learning training,
2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.platform import backend

MASTER = "master"
"""The slot of a master weight in the state of an optimizer."""


def require_dtype(dtype: Any) -> str:
    """Return the name of a dtype, and let NumPy know bfloat16.

    Raises
    ------
    OptionError
        If it is bfloat16 and the package ml_dtypes is not installed.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        if find_spec("ml_dtypes") is None:
            raise OptionError(
                "dtype='bfloat16' needs the package ml_dtypes: install the extra 'bfloat16', or use 'float16'"
            )
        import ml_dtypes  # noqa: F401 - it gives NumPy the dtype by being imported
    return backend.numpy_dtype(dtype).name


def widened(array: DistArray) -> DistArray:
    """Return 16-bit floats as float32, any other array as it is."""
    return array.astype("float32") if backend.is_half(array.dtype) else array


def rounded(array: DistArray, dtype: Any) -> DistArray:
    """Return an array in a dtype; the array itself where it has it."""
    return array if array.dtype == dtype else array.astype(dtype)


def overflowing() -> AbstractContextManager[None]:
    """Return a context in which NumPy does not warn of overflows, which a loss scale is there to find."""
    return np.errstate(over="ignore", invalid="ignore")


@dataclass
class LossScale:
    """The factor of a loss that keeps its cotangents among the float16 numbers, and how it follows them.

    It is a power of two, so that gradients lose no bit by it. After `patience` steps without an overflow it doubles;
    an overflow, which the norm of the gradients shows all ranks alike, halves it, and the step is left out.

    Parameters
    ----------
    value : float
    patience : int, optional
        None: it stays as it is.
    least : float
        An overflow at this scale is none of the scale's.
    """

    value: float = 2.0**16
    patience: int | None = 2000
    least: float = 1.0
    good: int = 0
    """Steps since the last change."""

    @classmethod
    def of(cls, dtypes: set[str]) -> LossScale | None:
        """Return that of weights of these dtypes: dynamic for float16, 1 for bfloat16, None where all are wider."""
        if "float16" in dtypes:
            return cls()
        return cls(1.0, None) if "bfloat16" in dtypes else None

    def follow(self, norm: float) -> bool:
        """Take in the norm of a step's gradients; say whether the step may be done."""
        if math.isfinite(norm):
            self.good += 1
            if self.patience is not None and self.good >= self.patience:
                self.value, self.good = 2 * self.value, 0
            return True
        if self.patience is not None:
            self.value, self.good = max(self.least, self.value / 2), 0
        return False

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"value": self.value, "good": self.good}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` has returned."""
        self.value, self.good = float(state["value"]), int(state["good"])
