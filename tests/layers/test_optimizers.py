"""Every optimizer's distributed steps equal the formula on whole arrays, for weights of every shape and layout."""

import math

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, from_global, ledger
from colossal_mpi.layers import Parallelism, Parameter, optim
from colossal_mpi.layers.optim.matrices import as_matrix, from_matrix
from tests.cases import assemble, host, layouts, some, spread
from tests.reference import optim as formulas
from tests.reference.modes import every_mode, few
from tests.reference.modes import parallelism as parallelism_of

SHAPES = {
    "blocks.0.up.weight": ((7, 11), "bsh,hf->bsf", 1),
    "blocks.0.qkv.weight": ((10, 3, 5, 2), "bsh,htad->bstad", 1),
    "blocks.0.qkv.bias": ((3, 5, 2), "tad", None),
    "blocks.1.out.weight": ((5, 2, 10), "bsad,adh->bsh", 2),
    "blocks.1.norm.gain": ((10,), "h", None),
}
TABLE = {"tokens.weight": ((13, 6), "bsv,vh->bsh", 1)}
EXPERTS = {
    "blocks.1.mlp.up.weight": ((5, 7, 2, 3), "epch,ehtf->epctf", 1),
    "blocks.1.mlp.down.weight": ((3, 4, 7), "epcf,efh->epch", 1),
}
ALL = SHAPES | TABLE | EXPERTS
STEPS, LR, DECAY = 4, 0.02, 0.1
OPTIMIZERS = {
    "adamw": (optim.AdamW, {}, formulas.adamw, False),
    "sgd": (optim.SGD, {}, formulas.sgd, False),
    "nesterov": (
        optim.SGD,
        {"nesterov": True},
        lambda *a, **k: formulas.sgd(*a, **k, nesterov=True),
        False,
    ),
    "lamb": (optim.LAMB, {}, formulas.lamb, False),
    "lars": (optim.LARS, {}, formulas.lars, False),
    "adafactor": (optim.Adafactor, {}, formulas.adafactor, True),
    "muon": (optim.Muon, {}, formulas.muon, True),
}


def values(name, shape, number):
    return np.random.default_rng([len(name), number]).standard_normal(shape) * (1 + number)


def parameters(p):
    made = []
    for name, (shape, letters, inputs) in ALL.items():
        inner, own = next((x for x in letters if x in "fav"), "f"), p.experts() if name in EXPERTS else p
        used = own.product(letters, inner).w if "," in letters else p.inside(letters, inner)
        sizes = {"inputs": inputs or 1, "batch": int(name in EXPERTS)}
        parameter = Parameter(name, shape, used, own, std=1.0, dtype="float64", **sizes)
        parameter.value.local[...] = from_global(values(name, shape, 0), p.grid, parameter.value.layout).local
        made.append(parameter)
    return made


def whole_steps(formula, factored, clip):
    """Return the weights after the steps of the formula, with gradients clipped by their common norm."""
    arrays = {name: values(name, shape, 0) for name, (shape, _, _) in ALL.items()}
    states, norms = {name: {} for name in arrays}, []
    for step in range(1, STEPS + 1):
        gradients = {name: values(name, w.shape, step) for name, w in arrays.items()}
        norms.append(math.sqrt(sum((g**2).sum() for g in gradients.values())))
        for name, w in arrays.items():
            inputs = ALL[name][2]
            options = {"lr": LR, "decay": DECAY if inputs else 0.0}
            if factored and not (formula is formulas.muon and name in TABLE):
                matrix = w.shape[1:] if name in EXPERTS else w.shape
                options["rows"] = None if inputs is None else math.prod(matrix[:inputs])
            g = gradients[name] * min(1.0, clip / norms[-1])
            if factored and name in EXPERTS:  # each expert is a separate weight
                each = [formula(w[e], g[e], states[name].setdefault(e, {}), step, **options) for e in range(len(w))]
                arrays[name] = np.stack(each)
            else:
                arrays[name] = formula(w, g, states[name], step, **options)
    return arrays, norms


@every_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_formula(grid, name):
    make, options, formula, factored = OPTIMIZERS[name]
    exact, norms = whole_steps(formula, factored, clip=20.0)
    p = parallelism_of(grid)
    optimizer = make(parameters(p), lr=LR, weight_decay=DECAY, clip=20.0, **options)
    for step in range(1, STEPS + 1):
        for parameter in optimizer.parameters:
            g, cut = values(parameter.name, parameter.value.shape, step), parameter.value.layout.cut
            partial = [axis for axis in p.deferred if axis not in cut]
            parameter.accumulate(spread(g, grid, parameter.value.layout.with_partial(*partial)))
        assert optimizer.step() == pytest.approx(norms[step - 1], rel=1e-13)
    for parameter in optimizer.parameters:
        difference = abs(assemble(parameter.value) - exact[parameter.name]).max()
        assert difference <= 1e-11 * abs(exact[parameter.name]).max(), parameter.name


TORCHS = {
    "adamw": lambda t, w: t.optim.AdamW(w, lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
    "sgd": lambda t, w: t.optim.SGD(w, lr=LR, momentum=0.9),
    "nesterov": lambda t, w: t.optim.SGD(w, lr=LR, momentum=0.9, nesterov=True),
    "adafactor": lambda t, w: t.optim.Adafactor(w, lr=LR),
}


@pytest.mark.parametrize("name", TORCHS)
def test_one_rank_equals_pytorch(name):
    torch = pytest.importorskip("torch")
    make, options, _, _ = OPTIMIZERS[name]
    p = Parallelism(Grid(MPI.COMM_SELF))
    ours = [
        Parameter(f"{i}.weight", shape, Layout(*[None] * len(shape)), p, std=1.0, dtype="float64")
        for i, shape in enumerate([(7, 5), (6,)])
    ]
    theirs = [torch.nn.Parameter(torch.tensor(host(q.value).copy())) for q in ours]
    mine, reference = make(ours, lr=LR, weight_decay=0.0, clip=None, **options), TORCHS[name](torch, theirs)
    for step in range(1, STEPS + 1):
        for q, t in zip(ours, theirs, strict=True):
            q.accumulate(q.value.like(values(q.name, q.value.shape, step)))
            t.grad = torch.tensor(values(q.name, q.value.shape, step))
        mine.step()
        reference.step()
    for q, t in zip(ours, theirs, strict=True):
        assert np.allclose(host(q.value), t.detach().numpy(), rtol=1e-12, atol=1e-13)


@few
def test_weights_become_matrices_and_come_back(grid):
    for shape, at in [((7, 5), 1), ((6, 3, 4, 2), 1), ((5, 3, 4, 2), 2), ((4, 2, 9), 2), ((3, 2, 7), 1)]:
        whole = values("w", shape, 1)
        for layout in some(layouts(len(shape), grid.axes, partial=False), 12):
            w = from_global(whole, grid, layout)
            matrix = as_matrix(w, at)
            assert np.array_equal(assemble(matrix), whole.reshape(math.prod(shape[:at]), -1))
            back = from_matrix(matrix, w, at)
            assert back.layout == w.layout
            assert np.array_equal(host(back), host(w))


@pytest.mark.grids({"row": 2, "col": 2})
def test_muon_gathers_no_weight(grid):
    p = parallelism_of(grid)
    up = Parameter("blocks.0.up.weight", (64, 96), Layout("row", "col"), p, std=1.0, dtype="float64")
    optimizer = optim.Muon([up])
    up.accumulate(up.value * 1.0)
    with ledger.record() as moved:
        optimizer.step()
    assert max(event.words for event in moved.events) < up.value.size // 2


def test_groups_have_options_of_their_own():
    p = Parallelism(Grid(MPI.COMM_SELF))
    first, second, third = (
        Parameter(f"{name}.weight", (3, 2), Layout(None, None), p, fill=1.0, dtype="float64") for name in "abc"
    )
    optimizer = optim.SGD(
        [first, optim.Group([second], rate=0.1), optim.Group([third], momentum=0.0, weight_decay=1.0)], lr=1.0
    )
    for _ in range(2):
        for q in (first, second, third):
            q.accumulate(q.value.like(np.ones((3, 2))))
        optimizer.step()
    assert np.allclose(host(first.value), 1 - 1 - 1.9)
    assert np.allclose(host(second.value), 1 - 0.1 * 2.9)
    assert np.allclose(host(third.value), -1 - (1 - 1))
    with pytest.raises(OptionError, match=r"SGD: no option betas; use weight_decay, momentum, nesterov"):
        optim.SGD([optim.Group([first], betas=(0.9, 0.9))])
    with pytest.raises(OptionError, match=r"a\.weight given twice"):
        optim.SGD([first, optim.Group([first])])
    with pytest.raises(OptionError, match=r"scale='mean'\): use one of 'spectral', 'rms'"):
        optim.Muon([first], scale="mean")


@pytest.mark.grids({"row": 2, "col": 2})
def test_moving_averages(grid):
    p = parallelism_of(grid)
    w = Parameter("w", (7, 5), Layout("row", "col"), p, std=1.0, dtype="float64")
    average, expected, now = optim.MovingAverage([w], decay=0.5), assemble(w.value), assemble(w.value)
    for step in range(9):
        now = now + step
        w.value.local[...] = from_global(now, grid, w.value.layout).local
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * now
        average.update()
    with average.applied():
        assert np.allclose(assemble(w.value), expected, rtol=1e-14, atol=1e-14)
    assert np.array_equal(assemble(w.value), now)
    assert set(average.state()) == {"average/w"}
