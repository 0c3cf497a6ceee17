"""Directories as other people publish them are read: their activations, heads, wrapped names and tensors besides."""

import numpy as np
import pytest

from colossal_mpi import Grid, Layout, from_global
from colossal_mpi.layers import Context
from colossal_mpi.layers.activation import ACTIVATIONS, GATED, Gated
from colossal_mpi.layers.models.huggingface import architecture
from tests.cases import host


@pytest.mark.parametrize("theirs", architecture.ACTIVATIONS)
def test_activations_are_those_of_transformers_plain_and_gated(theirs):
    import torch
    from transformers.activations import ACT2FN

    x = np.random.default_rng(0).standard_normal((3, 2, 5))
    exact = ACT2FN[theirs](torch.tensor(x)).numpy()
    layer = ACTIVATIONS[architecture.ACTIVATIONS[theirs]]()
    assert np.max(abs(result(layer, x) - exact)) <= 1e-11
    if theirs in architecture.GATED_ACTIVATIONS:
        gated = Gated(ACTIVATIONS[GATED[architecture.GATED_ACTIVATIONS[theirs]]]())
        assert np.max(abs(result(gated, x) - exact[:, 0] * x[:, 1])) <= 1e-11


def result(layer, x):
    return host(layer.forward(from_global(x, Grid(), Layout(*[None] * x.ndim)), Context())[0])
