"""Mixed precision: 16-bit weights, activations and cotangents, with float32 master weights, gradients and sums.

Parameters, losses and optimizers use it; `LossScale` belongs to the optimizer. A parameter of a 16-bit dtype stores its
weight in 16 bits. Its gradient is float32 from the product that makes it. Its optimizer updates a float32 master
weight, in the layout of its state, and the weight is the rounded master. Sums of many terms are in float32: products,
norms, softmax, losses, and reductions over ranks.

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

import numpy as np
from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.platform import backend

MASTER = "master"
"""The name of the master weight in the state of an optimizer."""


def require_dtype(dtype: DTypeLike) -> str:
    """Return the name of a dtype, and register bfloat16 with NumPy; an OptionError if ml_dtypes is not installed."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        if find_spec("ml_dtypes") is None:
            raise OptionError(
                "dtype='bfloat16' needs the package ml_dtypes: install the extra 'bfloat16', or use 'float16'"
            )
        import ml_dtypes  # noqa: F401 - it gives NumPy the dtype by being imported
    return backend.numpy_dtype(dtype).name


def widened(array: DistArray) -> DistArray:
    """Return an array of 16-bit floats in float32, any other array as it is."""
    return array.astype("float32") if backend.is_half(array.dtype) else array


def rounded(array: DistArray, dtype: DTypeLike) -> DistArray:
    """Return an array in a dtype; the array itself if it has this dtype."""
    return array if array.dtype == dtype else array.astype(dtype)


def overflowing() -> AbstractContextManager[None]:
    """Return a context in which NumPy does not warn of overflows: a loss scale expects and finds them."""
    return np.errstate(over="ignore", invalid="ignore")


@dataclass
class LossScale:
    """The loss scale: a factor of the loss that keeps its cotangents within the range of float16, and adapts itself.

    It is a power of two, so that no bit of a gradient is lost. After `patience` steps without an overflow it doubles.
    An overflow shows in the norm of the gradients on all ranks: the scale halves and the step is left out.

    Parameters
    ----------
    value : float
        The current factor.
    patience : int, optional
        Steps without an overflow after which the factor doubles; None: it never changes.
    least : float
        The smallest factor: an overflow at this factor has another cause.
    good : int
        Steps since the last change.
    """

    value: float = 2.0**16
    patience: int | None = 2000
    least: float = 1.0
    good: int = 0

    @classmethod
    def of(cls, dtypes: set[str]) -> LossScale | None:
        """Return the loss scale that weights of these dtypes need: adaptive for float16, 1 for bfloat16, else None."""
        if "float16" in dtypes:
            return cls()
        return cls(1.0, None) if "bfloat16" in dtypes else None

    def follow(self, norm: float) -> bool:
        """Adapt to the norm of a step's gradients, and return whether the step may be done."""
        if math.isfinite(norm):
            self.good += 1
            if self.patience is not None and self.good >= self.patience:
                self.value, self.good = 2 * self.value, 0
            return True
        if self.patience is not None:
            self.value, self.good = max(self.least, self.value / 2), 0
        return False

    def state(self) -> dict[str, float]:
        """Return the numbers that a checkpoint stores."""
        return {"value": self.value, "good": self.good}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore what `state` returned."""
        self.value, self.good = float(state["value"]), int(state["good"])
