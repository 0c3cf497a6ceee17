"""Generated inputs: strategies of hypothesis for arrays in any layout, and examples that all ranks go through alike.

`hypothesis` draws the same examples on every rank, because the draw depends on the test's code alone, and shrinks a
failing one alike as long as the example fails or passes on all ranks: `agreed` sees to that.
"""

import os

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from colossal_mpi import Layout, comm

EXAMPLES = "COLOSSAL_MPI_EXAMPLES"
"""Variable of the environment with the number of examples of each test; ``pytest --all`` raises it."""
DTYPES = st.sampled_from(["float32", "float64", "complex128", "int8", "int64"])


def examples(share=1.0):
    """Return the decorator of a test with generated inputs, by default with the usual number of examples."""
    return settings(
        max_examples=max(3, round(share * int(os.environ.get(EXAMPLES, "30")))),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def shapes(least=0, most=3, largest=9):
    """Return a strategy for global shapes; extents may be 0, and less than the number of ranks."""
    return st.lists(st.integers(0, largest), min_size=least, max_size=most).map(tuple)


@st.composite
def layouts_of(draw, ndim, axes, partial=True):
    """Return a strategy for layouts of `ndim` dims: each axis cuts one of them, is partial or holds a copy."""
    places = {axis: draw(st.sampled_from([None, *(["sum"] if partial else []), *range(ndim)])) for axis in axes}
    order = draw(st.permutations(list(axes)))
    dims = [tuple(axis for axis in order if places[axis] == d) for d in range(ndim)]
    return Layout(*dims, partial=[axis for axis in axes if places[axis] == "sum"])


@st.composite
def indices_of(draw, shape):
    """Return a strategy for basic indices: slices of any bounds and step, integers, new dims and an ellipsis."""
    parts = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-n - 2, n + 2)
        step = st.none() | st.integers(-3, 3).filter(bool)
        options = [st.builds(slice, bound, bound, step), *([st.integers(-n, n - 1)] if n else [])]
        parts.append(draw(st.one_of(*options)))
    for extra, most in ((None, 2), (Ellipsis, 1)):
        for _ in range(draw(st.integers(0, most))):
            parts.insert(draw(st.integers(0, len(parts))) if extra is None else len(parts), extra)
    return tuple(parts)


def values(shape, dtype, seed=0):
    """Return an array of small integers, whose sums and products are exact in any dtype but int8, which wraps."""
    drawn = np.random.default_rng(seed).integers(-3, 4, shape)
    return (drawn * (1 + 2j) if np.dtype(dtype).kind == "c" else drawn).astype(dtype)


def agreed(grid, *truths):
    """Return whether all ranks found every one of `truths` true."""
    return all(comm.collect(all(truths), grid))
