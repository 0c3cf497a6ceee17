"""Rotary frequencies equal the package transformers', and unknown scalings are refused."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, ShapeError, zeros
from colossal_mpi.layers import Parallelism
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.models.llama import LLAMA

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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARNS = {
    "default": {},
    "exact-limits": {"truncate": False, "beta_fast": 20, "beta_slow": 2},
    "magnitude": {"attention_factor": 1.5},
    "mscale": {"mscale": 1.0, "mscale_all_dim": 0.7},
    "a-step": {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
    "null": {"attention_factor": None, "beta_fast": None, "mscale": None, "truncate": None},
    "no-factor": {"factor": 1.0},
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers_in_float64(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from tests.reference.hf_float64 import double

    scaling = {**YARN, "rope_theta": 500.0, **YARNS[name]}
    with double():
        theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=96, num_attention_heads=2, rope_parameters=dict(scaling)))
    mine, eps = Rotary(scaling=scaling), np.finfo("float64").eps
    assert abs(mine.frequencies(48) / theirs.inv_freq.numpy() - 1).max() <= 64 * eps
    assert abs(mine._magnitude - theirs.attention_scaling) <= 4 * eps


def test_given_positions_are_scaled_as_those_that_are_counted():
    rotary, x = Rotary(500.0, YARN), zeros((2, 5, 3, 48), Grid(MPI.COMM_SELF), Layout(None, None, None, None))
    counted, given = rotary.angles(x, None), rotary.angles(x, np.arange(5))
    assert all(np.array_equal(a, b) for a, b in zip(counted, given, strict=True))
    assert np.allclose(counted[0] ** 2 + counted[1] ** 2, (0.1 * np.log(4) + 1) ** 2, rtol=1e-14)


@pytest.mark.parametrize(
    ("table", "length"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"max_position_embeddings": 128, "original_max_position_embeddings": 32}, 32),
        ({"max_position_embeddings": 128, "rope_scaling": YARN}, 64),
        ({"rope_scaling": None, "rope_parameters": YARN, "original_max_position_embeddings": 32}, 32),
    ],
)
def test_the_original_length_of_yarn_stands_where_transformers_looks(table, length):
    config = LLAMA.read_config({"rope_scaling": {"type": "yarn", "factor": 4.0}, **table}, ())
    assert config["scaling"]["original_max_position_embeddings"] == length


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
        ({"rope_type": "dynamic"}, "rotary scaling 'dynamic': use one of 'default', 'linear', 'llama3', 'yarn'"),
        ({"rope_type": ["yarn"]}, r"rotary scaling \['yarn'\]: use one of"),
        (
            {"rope_type": "yarn", "factor": 2.0},
            "needs factor, original_max.*; it lacks original_max_position_embeddings",
        ),
        ({**YARN, "factor": 0}, "rotary scaling 'yarn': factor=0: it must be a number above 0"),
        ({**YARN, "beta_fast": -1.0}, "rotary scaling 'yarn': beta_fast=-1.0: it must be a number of 0 or more"),
        ({**YARN, "rope_theta": 1.0}, "rotary scaling 'yarn' needs rope_theta above 1; it is 1.0"),
        ({"rope_theta": "big"}, "rope_theta='big': it must be a number above 0"),
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
