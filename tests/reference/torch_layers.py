"""PyTorch's layers of the table in `layer_case`, as functions of input and weights by name."""

import torch
from torch.nn import functional as F  # noqa: N812

from colossal_mpi import random
from tests.reference.layer_case import CASES, RATE, SAMPLE, SIZES, STEP
from tests.reference.torch_attention import self_attention


def linear(subscripts):
    def apply(x, w):
        y = torch.einsum(subscripts, x, w["weight"])
        return y + w["bias"] if "bias" in w else y

    return apply


def layer_norm(x, w, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w["gain"], w["bias"], eps)


def rms_norm(x, w, eps=1e-5):
    return F.rms_norm(x, x.shape[-1:], w["gain"], eps)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def gated(activation):
    return lambda x, w=None: activation(x[..., 0, :]) * x[..., 1, :]


def dropped(x, shape, name="m", seed=1):
    """Return x under the mask of a whole array of that shape."""
    box = [(SAMPLE, SAMPLE + shape[0]), *[(0, n) for n in shape[1:]]]
    kept = random.mask_block(box, shape, seed, f"{name}/{STEP}", RATE)
    return x * torch.tensor(kept).reshape(*shape, *[1] * (x.ndim - len(shape))) / (1 - RATE)


def at_positions(name):
    positions = CASES[name].ctx(SIZES).positions
    return lambda x, w: x + w["weight"][torch.tensor(positions.copy())]


def convolution(**options):
    return lambda x, w: F.conv2d(x, w["weight"].permute(3, 0, 1, 2), w.get("bias"), **options)


def patches(x, w):
    y = convolution(stride=w["weight"].shape[1:3])(x, w).flatten(2).transpose(1, 2)
    return torch.cat([w["token"].expand(len(y), 1, -1), y], 1) if "token" in w else y


def classes(pool):
    return lambda x, w: pool(x) @ w["weight"] + w["bias"]


def mlp(x, w, activation, up="bsh,hf->bsf"):
    parts = [{k.removeprefix(n): v for k, v in w.items() if k.startswith(n)} for n in ("up.", "down.")]
    return linear("bsf,fh->bsh")(activation(linear(up)(x, parts[0])), parts[1])


def part(w, name):
    return {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}


def attention(x, w, **options):
    return self_attention(x, part(w, "attention"), **options)


def gpt(x, w):
    def drop(y, name):
        return dropped(y, y.shape, f"m.{name}.dropout", 0)

    x = x + drop(attention(layer_norm(x, part(w, "norm1")), w), "attention")
    return x + drop(mlp(layer_norm(x, part(w, "norm2")), part(w, "mlp"), gelu_tanh), "mlp")


def bert(x, w):
    def drop(y, name):
        return dropped(y, y.shape, f"m.{name}.dropout", 0)

    x = layer_norm(x + drop(attention(x, w, causal=False), "attention"), part(w, "norm1"), 1e-12)
    return layer_norm(x + drop(mlp(x, part(w, "mlp"), F.gelu), "mlp"), part(w, "norm2"), 1e-12)


def vit(x, w):
    def drop(y, name):
        return dropped(y, y.shape[:1], f"m.{name}.drop_path", 0)

    x = x + drop(attention(layer_norm(x, part(w, "norm1"), 1e-6), w, causal=False), "attention")
    return x + drop(mlp(layer_norm(x, part(w, "norm2"), 1e-6), part(w, "mlp"), F.gelu), "mlp")


def llama(x, w):
    x = x + attention(rms_norm(x, part(w, "norm1")), w, theta=10000.0)
    return x + mlp(rms_norm(x, part(w, "norm2")), part(w, "mlp"), gated(F.silu), "bsh,htf->bstf")


LAYERS = {
    "up": linear("bsh,hf->bsf"),
    "up-without-bias": linear("bsh,hf->bsf"),
    "down": linear("bsf,fh->bsh"),
    "heads": linear("bsh,htad->bstad"),
    "heads-down": linear("bsad,adh->bsh"),
    "gates": linear("bsh,htf->bstf"),
    "classifier": linear("bsh,hv->bsv"),
    "vector": linear("bh,hv->bv"),
    "layer-norm": layer_norm,
    "layer-norm-bert": lambda x, w: layer_norm(x, w, 1e-12),
    "layer-norm-eps": lambda x, w: layer_norm(x, w, 0.5),
    "rms-norm": rms_norm,
    "rms-norm-eps": lambda x, w: rms_norm(x, w, 0.5),
    "gelu-tanh": lambda x, w: gelu_tanh(x),
    "gelu": lambda x, w: F.gelu(x),
    "gelu-sigmoid": lambda x, w: x * torch.sigmoid(1.702 * x),
    "silu": lambda x, w: F.silu(x),
    "relu": lambda x, w: F.relu(x),
    "tanh": lambda x, w: torch.tanh(x),
    "swiglu": gated(F.silu),
    "geglu": gated(F.gelu),
    "geglu-tanh": gated(gelu_tanh),
    "geglu-sigmoid": gated(lambda x: x * torch.sigmoid(1.702 * x)),
    "reglu": gated(F.relu),
    "dropout": lambda x, w: dropped(x, x.shape),
    "dropout-inside": lambda x, w: dropped(x, x.shape),
    "dropout-evaluated": lambda x, w: x,
    "drop-path": lambda x, w: dropped(x, x.shape[:1]),
    "embedding": lambda x, w: F.embedding(x, w["weight"]),
    "positions": lambda x, w: x + w["weight"][: x.shape[1]],
    "positions-given": at_positions("positions-given"),
    "positions-of-each": at_positions("positions-of-each"),
    "tied": lambda x, w: F.linear(F.embedding(x, w["weight"]), w["weight"]),
    "softmax": lambda x, w: x.softmax(-1),
    "max-pool": lambda x, w: F.max_pool2d(x, 2),
    "max-pool-overlapping": lambda x, w: F.max_pool2d(x, (3, 4), stride=(1, 2), padding=(1, 2)),
    "max-pool-gaps": lambda x, w: F.max_pool2d(x, 2, stride=3, padding=1),
    "mean-pool": lambda x, w: F.avg_pool2d(x, 2),
    "mean-pool-overlapping": lambda x, w: F.avg_pool2d(x, (3, 4), stride=(1, 2), padding=(1, 2)),
    "convolution": convolution(),
    "convolution-strides": convolution(stride=(2, 3), padding=(1, 2)),
    "convolution-back": convolution(stride=(2, 3), padding=(1, 2)),
    "convolution-points": convolution(),
    "convolution-gaps": convolution(stride=3),
    "patches": patches,
    "patches-positions": lambda x, w: patches(x, w) + w["positions.weight"][:-2],
    "patches-first": lambda x, w: patches(x, w)[:, 0],
    "patches-mean": lambda x, w: patches(x, w).mean(1),
    "first-classes": classes(lambda x: x[:, 0]),
    "mean-classes": classes(lambda x: x.mean(1)),
    "mlp-gelu": lambda x, w: mlp(x, w, F.gelu),
    "mlp-swiglu": lambda x, w: mlp(x, w, gated(F.silu), "bsh,htf->bstf"),
    "block-gpt": gpt,
    "block-bert": bert,
    "block-vit": vit,
    "block-llama": llama,
}
