"""A PyTorch model with our layers has the serial model's gradients, optimizer steps and states."""

import copy
import gc
import weakref

import numpy as np
import pytest

from colossal_mpi import DTypeError, Layout, OptionError, ShapeError, SharingError
from colossal_mpi.layers.activation import GELU
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.block import MLP, TransformerBlock
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm
from tests.reference.modes import parallelism

torch = pytest.importorskip("torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402

from colossal_mpi.layers.torch import as_module, clip_grad_norm_  # noqa: E402

torch.set_num_threads(1)
F64 = {"dtype": "float64"}
B, S, H, F = 5, 3, 7, 9
# One rank and four: importing torch takes two seconds on each rank.
MODES = pytest.mark.grids(
    {"data": 2, "col": 2},
    {"row": 2, "col": 2},
    {"depth": 2, "row": 1, "col": 2},
    {"row": 1, "col": 2, "depth": 2},
    {"data": 4},
)
ONE = pytest.mark.grids({})
FOUR = pytest.mark.grids({"row": 2, "col": 2})


@pytest.fixture
def device(grid):
    """Return torch's name of the grid's device."""
    if grid.device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    return grid.device


@pytest.fixture(autouse=True)
def _host(grid, request):
    if grid.device.startswith("fake") or (grid.device != "cpu" and "device" not in request.fixturenames):
        pytest.skip("tensors of this test are in host memory")


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def linear(grid, **options):
    sizes = {"h": H, "f": F}
    return Linear("bsh,hf->bsf", sizes, "f", parallelism(grid), "up", std=0.5, **{**F64, **options})


def serial_of(module, bias=True):
    """Return torch's own Linear with the weights of ours."""
    state = module.gathered_state()
    w = state["up.weight"]
    serial = torch.nn.Linear(*w.shape, bias=bias, dtype=w.dtype)
    with torch.no_grad():
        serial.weight.copy_(w.T)
        if bias:
            serial.bias.copy_(state["up.bias"])
    return serial


def near(mine, exact, tolerance=1e-10):
    scale = float(exact.detach().abs().max())
    assert scale > 0
    assert mine.shape == exact.shape
    assert float((mine - exact).detach().abs().max()) <= tolerance * scale


def around(module):
    torch.manual_seed(0)
    first, last = torch.nn.Linear(4, H, dtype=torch.float64), torch.nn.Linear(F, 2, dtype=torch.float64)
    return torch.nn.Sequential(first, torch.nn.Tanh(), module, torch.nn.Tanh(), last)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def train(model, make, clip, norms, device):
    optimizer, x, target = make(model.to(device).parameters()), random(B, S, 4), random(B, S, 2, seed=1)
    x, target = x.to(device), target.to(device)
    for _ in range(6):
        optimizer.zero_grad()
        for rows in (slice(0, 3), slice(3, B)):  # gradients of two microbatches add up
            (((model(x[rows]) - target[rows]) ** 2).sum() / B).backward()
        norms.append(float(clip(model, 0.5)))
        optimizer.step()
    return model


@MODES
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_model_with_a_layer_of_ours_trains_as_the_serial_one(grid, device, make):
    module, norms, exact = as_module(linear(grid)), [], []

    def clip(model, norm):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), norm)

    serial = train(around(serial_of(module)), make, clip, exact, device)
    model = train(around(module), make, clip_grad_norm_, norms, device)
    assert max(exact) > 0.5  # so that the gradients are clipped
    assert np.allclose(norms, exact, rtol=1e-10, atol=0)
    state = module.gathered_state()
    near(state["up.weight"].T, serial[2].weight.cpu(), 1e-9)
    near(state["up.bias"], serial[2].bias.cpu(), 1e-9)
    near(model[0].weight, serial[0].weight, 1e-9)
    assert np.array_equal(module.wrapped.weight.value.gather(), state["up.weight"])


@ONE
def test_gradients_of_input_and_weights_pass_gradcheck(grid):
    module = as_module(TransformerBlock(4, 2, 3, parallelism(grid), "block", std=0.5, **F64))
    weights = dict(module.named_parameters())
    assert list(weights) == [p.name for p in module.wrapped.parameters()]
    x = random(2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *weights.values()))


@FOUR
def test_gradients_of_the_input_pass_gradcheck_on_ranks(grid):
    p = parallelism(grid)
    x = random(3, 1, 5).requires_grad_()
    for layer in (MLP(5, 3, p, "mlp", std=0.5, **F64), LayerNorm(5, p, "norm", **F64)):
        assert torch.autograd.gradcheck(as_module(layer), (x,))


@MODES
def test_uses_of_a_module_in_one_graph_add_up(grid):
    module = as_module(Linear("bsh,hf->bsf", {"h": H, "f": H}, "f", parallelism(grid), "up", std=0.5, **F64))
    serial, x, dy = serial_of(module), random(B, S, H), random(B, S, H, seed=1)
    results = []
    for m in (module, serial):
        leaf = x.clone().requires_grad_()
        y = m(torch.tanh(m(leaf))) + m(leaf)
        y.backward(dy, retain_graph=True)
        y.backward(dy)
        results.append((y, leaf.grad))
    for mine, exact in zip(*results, strict=True):
        near(mine, exact)
    weight = module.wrapped.weight.value
    whole = weight.like(module.get_parameter("up.weight").grad.numpy()).gather()
    near(torch.from_numpy(whole).T, serial.weight.grad)
    assert module.wrapped.weight.grad is None


@pytest.mark.grids({"data": 4}, {"data": 2, "col": 2})
def test_each_rank_gives_and_gets_its_block_in_a_layout(grid):
    rows = Layout("data", None, None)
    module = as_module(linear(grid), x=rows, y=rows)
    serial, x = serial_of(module), random(B, S, H)
    start, stop = rows.on(grid.axes, 3).box(x.shape, grid.axes, grid.coords)[0]
    whole, mine = x.clone().requires_grad_(), x[start:stop].clone().requires_grad_()
    exact, y = serial(whole), module(mine)
    near(y, exact[start:stop])
    (y**3).sum().backward()
    (exact**3).sum().backward()
    near(mine.grad, whole.grad[start:stop])
    weight = module.wrapped.weight.value
    near(torch.from_numpy(weight.like(module.get_parameter("up.weight").grad.numpy()).gather()).T, serial.weight.grad)


@FOUR
def test_ids_go_in_and_tied_weights_are_one_parameter(grid):
    p = parallelism(grid)
    table = Embedding(11, H, p, "tokens", **F64)
    head = Linear("bsh,vh->bsv", {"v": 11, "h": H}, "v", p, "head", bias=False, weight=table.table)
    model = torch.nn.Sequential(as_module(table), torch.nn.Tanh(), as_module(head))
    assert [name for name, _ in model.named_parameters()] == ["0.tokens.weight"]
    w = model[0].gathered_state()["tokens.weight"].requires_grad_()
    ids = torch.arange(B * S).reshape(B, S) % 11
    (torch.tanh(w[ids]) @ w.T).pow(2).sum().backward()
    model(ids).pow(2).sum().backward()
    grad = model[0].get_parameter("tokens.weight").grad
    near(torch.from_numpy(table.table.value.like(grad.numpy()).gather()), w.grad)
    assert model[0](ids.int()).shape == (B, S, H)
    with pytest.raises(
        DTypeError, match=r"needs torch\.int64 or torch\.int32 on every rank; rank 0 gives torch\.float64"
    ):
        model[0](ids.double())


@MODES
def test_a_mask_of_padding_reaches_attention(grid):
    module = as_module(SelfAttention(8, 2, parallelism(grid), "attention", causal=False, std=0.5, **F64))
    x, mask = random(B, S, 8), torch.arange(S) < torch.tensor([3, 1, 2, 3, 1])[:, None]
    other = torch.where(mask[..., None], x, 1e3)
    near(module(other, mask=mask)[mask], module(x, mask=mask)[mask])
    assert not torch.allclose(module(other)[0], module(other, mask=mask)[1])


@FOUR
def test_layers_without_parameters_need_their_parallelism(grid):
    with pytest.raises(OptionError, match="GELU has no parameters: give it its parallelism"):
        as_module(GELU())
    x = random(B, S, H)
    near(as_module(GELU(), parallelism(grid))(x), torch.nn.functional.gelu(x, approximate="tanh"))


@FOUR
def test_states_are_of_blocks_or_of_whole_weights(grid):
    module, other = as_module(linear(grid)), as_module(linear(grid, seed=1))
    x = random(B, S, H)
    y = module(x)
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    third = as_module(linear(grid, seed=2))
    third.load_gathered(module.gathered_state())
    assert torch.equal(third(x), y)
    with pytest.raises(ShapeError, match=r"load_gathered: the layer has \{.*\(7, 9\).*; the state has \{\}"):
        third.load_gathered({})
    twin = copy.deepcopy(third)
    with torch.no_grad():
        third.get_parameter("up.weight").zero_()
        assert torch.equal(third(x) - third(x * 2), torch.zeros_like(y))
    assert torch.equal(twin(x), y)
    assert twin.get_parameter("up.weight").data_ptr() == twin.wrapped.weight.value.local.ctypes.data


@FOUR
def test_other_memory_on_one_side_is_taken_on_the_other(grid):
    module, x = as_module(linear(grid)), random(B, S, H)
    near(module.float()(x.float()), serial_of(module)(x.float()), 2 * H * torch.finfo(torch.float32).eps)
    assert module.wrapped.weight.value.dtype == np.float32
    module.double()
    module.get_parameter("up.weight").data = torch.zeros_like(module.get_parameter("up.weight"))
    assert torch.equal(module(x), module(2 * x))
    weight = module.wrapped.weight
    weight.value = weight.value + 1.0
    near(module(x)[..., 0], x.sum(-1) + float(module.gathered_state()["up.bias"][0]))
    assert module.get_parameter("up.weight").data_ptr() == weight.value.local.ctypes.data
    doubled = {name: (2 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, doubled, (x,))
    y.sum().backward()
    near(y, 2 * module(x))
    assert [p.grad is None for p in doubled.values()] == [False, False]
    with pytest.raises(SharingError, match="cannot go to meta: make the grid there"):
        module.to("meta")


@FOUR
def test_frozen_weights_have_no_gradient_and_no_products(grid, monkeypatch):
    module, x = as_module(linear(grid)), random(B, S, H).requires_grad_()
    module.requires_grad_(False)
    monkeypatch.setattr(module.wrapped.weight, "accumulate", lambda grad: pytest.fail("a product for nothing"))
    module(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert [p.grad for p in module.parameters()] == [None, None]
    with torch.no_grad():
        assert not module(x).requires_grad


class Kept(list):
    """A cache that can be watched."""


@ONE
def test_the_cache_goes_when_torch_lets_go(grid, monkeypatch):
    module, x = as_module(linear(grid)), random(B, S, H).requires_grad_()
    kept, (forward, backward) = [], (module.wrapped.forward, module.wrapped.backward)

    def watched(x, ctx):
        y, cache = forward(x, ctx)
        cache = Kept([cache])
        kept.append(weakref.ref(cache))
        return y, cache

    monkeypatch.setattr(module.wrapped, "forward", watched)
    monkeypatch.setattr(module.wrapped, "backward", lambda dy, cache, later=None: backward(dy, cache[0], later))
    loss = module(x * 1).sum()
    loss.backward(retain_graph=True)
    assert kept[0]() is not None
    loss.backward()
    gc.collect()
    assert kept[0]() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@ONE
def test_writes_to_what_the_backward_pass_needs_are_noticed(grid):
    module, x = as_module(linear(grid)), random(B, S, H)
    y = module(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module(x)
    with torch.no_grad():
        module.get_parameter("up.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    (g,) = torch.autograd.grad(module(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(OptionError, match="create_graph=True: a layer's backward pass has no derivative"):
        (g.sum() + x.sum()).backward()


@FOUR
def test_gradients_have_memory_of_their_own(grid):
    class Same(GELU):
        """Return its input."""

        def forward(self, x, ctx):
            return x, None

        def backward(self, dy, cache, later=None):
            return dy

    module, x, dy = as_module(Same(), parallelism(grid)), random(B, S, H).requires_grad_(), torch.ones(B, S, H).double()
    y = module(x)
    y.backward(dy)
    x.grad.mul_(2)
    y.detach().zero_()
    assert torch.all(dy == 1)
    assert torch.all(x != 0)


@FOUR
def test_dropout_follows_the_generator_of_torch(grid):
    layer = TransformerBlock(8, 2, 5, parallelism(grid), "block", dropout=0.4, std=0.5, **F64)
    module, x = as_module(layer), random(B, S, 8).requires_grad_()
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(grid.rank * (run is module))  # rank 0 counts
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
        x.grad = None
    assert all(map(torch.equal, *results))
    assert not torch.equal(module(x), module(x))
    module.eval()
    state = torch.get_rng_state()
    assert torch.equal(module(x), module(x))
    assert torch.equal(torch.get_rng_state(), state)


@ONE
def test_a_compiled_model_calls_the_layer_as_it_is(grid):
    model, x = around(as_module(linear(grid))), random(B, S, 4)
    exact = model(x)
    assert torch.equal(torch.compile(model, backend="eager")(x), exact)
    exact.sum().backward()


@ONE
@pytest.mark.parametrize(("size", "dtype"), [(1e200, torch.float64), (1e-200, torch.float64), (3e38, torch.float32)])
def test_clipping_takes_gradients_of_any_size(grid, size, dtype):
    model = torch.nn.Sequential(as_module(linear(grid)), torch.nn.Linear(4, 5, dtype=dtype))
    for p in model.parameters():
        p.grad = torch.full_like(p, size)
    exact = size * sum(p.numel() for p in model.parameters()) ** 0.5
    assert clip_grad_norm_(model, 2.0) == pytest.approx(exact, rel=1e-6)
    for p in model.parameters():
        near(p.grad, torch.full_like(p, 2.0 * size / exact if size > 1 else size), 1e-6)
    with pytest.raises(OptionError, match="clip_grad_norm_: max_norm=-1: the greatest norm must be above 0"):
        clip_grad_norm_(model, -1)
