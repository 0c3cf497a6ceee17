"""The memory of weights, optimizer state and activations on a rank falls as one over the number of ranks."""

import math

import pytest
from mpi4py import MPI

from colossal_mpi import Grid, from_global, random
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.optim import AdamW
from tests.reference.saved import saved_arrays

CONFIG = GPTConfig(vocabulary=256, layers=2, hidden=256, heads=8, positions=32)
TOKENS = [[(7 * i + 3 * j) % 256 for j in range(32)] for i in range(8)]


def stored_bytes(grid, tensor, keep_gathered=False):
    """Return the bytes of weights, gradients and optimizer state, and the bytes of the saved activations."""
    p = Parallelism(grid, tensor, keep_gathered)
    model = GPT(CONFIG, p)
    state = AdamW(model.parameters()).state()
    ids = from_global(TOKENS, grid, p.tokens())
    logits, cache = model.forward(ids, Context())
    activations = sum(array.nbytes for array in saved_arrays(cache))
    model.backward(logits, cache)
    arrays = [*state.values()]
    for parameter in model.parameters():
        arrays += [parameter.value, parameter.reduce()]
    return sum(array.local.nbytes for array in arrays), activations


def check(grid, tensor, copies=1):
    whole, all_activations = stored_bytes(Grid(MPI.COMM_SELF), None)
    mine, activations = stored_bytes(grid, tensor)
    assert mine <= 1.05 * copies * whole / grid.size
    assert activations > 0
    assert activations <= 1.05 * all_activations / grid.size
    # With keep_gathered, the gathered operands of the products are kept instead of the stored ones.
    assert stored_bytes(grid, tensor, keep_gathered=True)[1] <= activations + gathered_bytes(grid, tensor)


def gathered_bytes(grid, tensor):
    """Return the bytes of all gathered operands of all products on this rank."""
    p, n = Parallelism(grid, tensor), len(TOKENS)
    h, a, f, v = CONFIG.hidden, CONFIG.heads, 4 * CONFIG.hidden, CONFIG.vocabulary
    size = {"b": n, "s": 32, "h": h, "t": 3, "a": a, "d": h // a, "f": f, "v": v}
    block = [("bsh,htad->bstad", "a"), ("bsad,adh->bsh", "a"), ("bsh,hf->bsf", "f"), ("bsf,fh->bsh", "f")]
    total = 0
    for subscripts, inner in [*block * CONFIG.layers, ("bsh,vh->bsv", "v")]:
        product = p.product(subscripts, inner)
        for letters, layout in zip(subscripts.split("->")[0].split(","), (product.x, product.w), strict=True):
            box = layout.box([size[x] for x in letters], grid.axes, grid.coords)
            total += 4 * math.prod(stop - start for start, stop in box)
    return total


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 4})
def test_2d(grid):
    check(grid, "2d")


@pytest.mark.grids({"depth": 2, "row": 2, "col": 2}, {"depth": 2, "col": 2})
def test_25d_is_replicated_over_depth(grid):
    check(grid, "2.5d", copies=2)


@pytest.mark.grids({"row": 2, "col": 2, "depth": 2}, {"row": 1, "col": 2, "depth": 2})
def test_3d(grid):
    check(grid, "3d")


@pytest.mark.grids({"col": 4})
def test_1d(grid):
    check(grid, "1d")


@pytest.mark.grids({})
def test_attention_keeps_no_scores(grid):
    """A token keeps its input, q, k, v and output, two statistics per head, and cosine and sine of its angles."""
    p = Parallelism(grid)
    layer = SelfAttention(8, 4, p, "attention", groups=2, rotary=Rotary())
    kept = []
    for s in (512, 1024):
        _, cache = layer.forward(random.normal((1, s, 8), grid, p.stream()).astype("float32"), Context())
        kept.append(sum(array.nbytes for array in saved_arrays(cache)))
    assert kept[1] <= 2 * kept[0]
    assert kept[1] <= 4 * (1024 * (4 * 8 + 2 * 4 + 2) + 3 * 8 * 8)
