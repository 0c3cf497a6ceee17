"""Rotary frequencies equal the package transformers', and unknown scalings are refused."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, OptionError, ShapeError
from colossal_mpi.layers import Parallelism
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {**SCALINGS[name], "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=96, num_attention_heads=2, rope_parameters=dict(scaling))
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    mine = Rotary(scaling=scaling).frequencies(48)
    assert mine.dtype == np.float64
    # transformers computes them in float32, in a few steps.
    assert abs(mine / theirs - 1).max() <= 16 * np.finfo("float32").eps
    assert np.array_equal(Rotary(500.0, SCALINGS[name]).frequencies(48), mine)


def test_llama3_keeps_blends_and_divides():
    plain, scaled = Rotary(500.0).frequencies(48), Rotary(500.0, SCALINGS["llama3"]).frequencies(48)
    ratio = scaled / plain
    assert ratio[0] == 1.0
    assert ratio[-1] == 1 / 8
    assert ((ratio > 1 / 8) & (ratio < 1.0)).any()


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn"}, "rotary scaling 'yarn': use one of 'default', 'linear', 'llama3'"),
        ({"type": "linear"}, "rotary scaling 'linear' needs factor; it lacks factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: heads are turned whole"),
    ],
)
def test_scalings_that_are_not_known_are_refused(scaling, message):
    with pytest.raises(OptionError, match=message):
        Rotary(scaling=scaling)


def test_heads_that_do_not_fit_are_refused():
    p = Parallelism(Grid(MPI.COMM_SELF))
    with pytest.raises(ShapeError, match="the width of a head must be even; it is 3"):
        SelfAttention(9, 3, p, "attention", rotary=Rotary())
    with pytest.raises(ShapeError, match=r"4 groups do not divide 6 heads: use groups in \{1, 2, 3, 6\}"):
        SelfAttention(12, 6, p, "attention", groups=4)
