"""A layer made of a PyTorch module has the module's output and gradients in every mode."""

import copy

import numpy as np
import pytest

from colossal_mpi import OptionError
from colossal_mpi.layers import Parallelism
from tests.reference.gpt_case import difference
from tests.reference.modes import parallelism

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from colossal_mpi.layers.torch import as_module, from_module  # noqa: E402

torch.set_num_threads(1)
GRIDS = pytest.mark.grids(
    {},
    {"col": 4},
    {"row": 2, "col": 2},
    {"depth": 2, "row": 1, "col": 2},
    {"row": 1, "col": 2, "depth": 2},
    {"row": 2, "col": 1, "depth": 2},
    {"data": 2, "col": 2},
)
B, S, H, A, F, V = 5, 3, 10, 5, 7, 11
LENGTHS = torch.tensor([3, 1, 2, 3, 2])
HIDDEN = torch.arange(S) >= LENGTHS[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _host(grid):
    if grid.device != "cpu":
        pytest.skip("tensors of these tests are in host memory")


def attend(module, x, **options):
    return module(x, x, x, **options)[0]


CASES = {
    "linear": (lambda: nn.Linear(H, F, **F64), {}, None),
    "linear-back": (lambda: nn.Linear(H, F, bias=False, **F64), {"into": "stream"}, None),
    "norm": (lambda: nn.LayerNorm(H, eps=1e-3, **F64), {}, None),
    "rms": (lambda: nn.RMSNorm(H, **F64), {}, None),
    "embedding": (lambda: nn.Embedding(V, H, **F64), {}, None),
    "attention": (lambda: nn.MultiheadAttention(H, A, batch_first=True, **F64), {}, attend),
    "attention-causal": (
        lambda: nn.MultiheadAttention(H, A, bias=False, **F64),
        {"causal": True},
        lambda m, x: attend(m, x, attn_mask=CAUSAL),
    ),
    "attention-padded": (
        lambda: nn.MultiheadAttention(H, A, **F64),
        {"mask": ~HIDDEN},
        lambda m, x: attend(m, x, key_padding_mask=HIDDEN),
    ),
    "post-relu": (lambda: nn.TransformerEncoderLayer(H, A, F, 0.0, "relu", batch_first=True, **F64), {}, None),
    "pre-gelu": (lambda: nn.TransformerEncoderLayer(H, A, F, 0.0, "gelu", norm_first=True, **F64), {}, None),
    "post-tanh-eval": (
        lambda: nn.TransformerEncoderLayer(H, A, F, 0.1, nn.GELU("tanh"), layer_norm_eps=1e-3, **F64).eval(),
        {"causal": True},
        lambda m, x: m(x, src_mask=CAUSAL),
    ),
}


def made(make):
    """Return the module with weights that are far from their initial zeros and ones."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.5)
    return module


def arrays(layer, which):
    return {p.name: (getattr(p, which).gather(), ...) for p in layer.parameters()}


@GRIDS
@pytest.mark.parametrize(("make", "options", "call"), CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_module(grid, make, options, call):
    module, p, options = made(make), parallelism(grid), dict(options)
    mask = options.pop("mask", None)
    ids = isinstance(module, nn.Embedding)
    x = torch.arange(B * S).reshape(B, S) % V if ids else torch.randn(B, S, H, **F64).requires_grad_()
    x = (
        x
        if getattr(getattr(module, "self_attn", module), "batch_first", True)
        else x.detach().transpose(0, 1).requires_grad_()
    )
    exact = (call or (lambda m, x: m(x)))(module, x)
    dy = torch.randn_like(exact)
    exact.backward(dy)
    layer = from_module(module, p, "part", **options)

    mine = as_module(layer)
    x2 = x if ids else x.detach().clone().requires_grad_()
    y = mine(x2, mask=mask)
    y.backward(dy)

    assert difference({"y": (y.detach().numpy(), ...)}, {"y": exact.detach().numpy()}) <= 1e-10
    if not ids:
        assert difference({"dx": (x2.grad.numpy(), ...)}, {"dx": x.grad.numpy()}) <= 1e-10
    gradients = copy.deepcopy(module)
    for weight, source in zip(gradients.parameters(), module.parameters(), strict=True):
        weight.data = source.grad
    wanted = {name: array for name, (array, _) in arrays(from_module(gradients, p, "part", **options), "value").items()}
    got = {
        parameter.name: (parameter.value.like(mine.get_parameter(parameter.name).grad.numpy()).gather(), ...)
        for parameter in layer.parameters()
    }
    assert got.keys() == wanted.keys()
    assert max(abs(w).max() for w in wanted.values()) > 0.1
    assert difference(got, wanted) <= 1e-10


@pytest.mark.grids({})
def test_weights_are_copied_and_keep_their_dtype(grid):
    for dtype in (torch.float32, torch.bfloat16):
        module = nn.Linear(H, F, dtype=dtype)
        layer = from_module(module, Parallelism(grid))
        before = layer.weight.value.gather()
        assert layer.weight.name == "linear.weight"
        assert layer.weight.value.dtype.name == str(dtype).removeprefix("torch.")
        with torch.no_grad():
            module.weight.zero_()
        assert np.array_equal(layer.weight.value.gather(), before)


class Odd(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "conv": (lambda: nn.Conv1d(2, 2, 1), {}, "Conv1d .* is none of Linear, LayerNorm"),
    "forward": (lambda: Odd(2, 2), {}, "Odd with a forward pass of its own"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), {}, "'meta'"),
    "into": (lambda: nn.Linear(2, 2), {"into": "out"}, "use 'inside' or 'stream'"),
    "norm of dims": (lambda: nn.LayerNorm((2, 2)), {}, r"normalized_shape=\(2, 2\)"),
    "norm of none": (lambda: nn.LayerNorm(2, elementwise_affine=False), {}, "elementwise_affine=False"),
    "norm without bias": (lambda: nn.LayerNorm(2, bias=False), {}, "bias=False"),
    "table": (
        lambda: nn.Embedding(3, 2, padding_idx=1, max_norm=2.0, scale_grad_by_freq=True, sparse=True),
        {},
        "padding_idx=1, max_norm=2.0, scale_grad_by_freq=True, sparse=True: there is no such layer",
    ),
    "keys": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5), {}, "kdim=3 and vdim=5 beside 4"),
    "bias of keys": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), {}, "add_bias_kv=True"),
    "zeros": (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), {}, "add_zero_attn=True"),
    "attention dropout": (
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1),
        {},
        r"dropout=0\.1 in attention \(eval\(\)",
    ),
    "dropout": (lambda: nn.TransformerEncoderLayer(4, 2, 3), {}, r"dropout=0\.1 in attention.*, dropout=0\.1 \(eval"),
    "activation": (lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, torch.tanh), {}, "activation=.*tanh"),
    "bias": (lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, bias=False), {}, "bias=False"),
}


@pytest.mark.grids({})
@pytest.mark.parametrize(("make", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_layer_does_is_refused(grid, make, options, words):
    with pytest.raises(OptionError, match=words):
        from_module(make(), Parallelism(grid), **options)
