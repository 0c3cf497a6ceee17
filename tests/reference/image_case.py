"""Images and weights that divide by nothing, and PyTorch's convolutions of them."""

import numpy as np

CONVOLUTIONS = {
    "plain": {"kernel": (3, 2), "stride": 1, "padding": 0},
    "stride": {"kernel": 3, "stride": (2, 3), "padding": (1, 2)},
    "point": {"kernel": 1, "stride": 1, "padding": 0},
    "gaps": {"kernel": 2, "stride": 3, "padding": 0},
}
_rng = np.random.default_rng(5)
IMAGES = _rng.standard_normal((5, 3, 7, 9))
OUTPUTS = 5


def cotangent(shape):
    return np.random.default_rng(6).standard_normal(shape)


def pair(n):
    return (n, n) if isinstance(n, int) else n


def weights(channels, kernel, outputs):
    rng = np.random.default_rng(7)
    return {
        "weight": rng.standard_normal((channels, *pair(kernel), outputs)),
        "bias": rng.standard_normal(outputs),
        "token": rng.standard_normal(outputs),
    }


def prepare(path):
    import torch
    from torch.nn import functional

    results = {}

    def keep(name, function):
        x = torch.tensor(IMAGES, requires_grad=True)
        w = {key: torch.tensor(v, requires_grad=True) for key, v in weights(3, kernels[name], OUTPUTS).items()}
        y = function(x, w)
        y.backward(torch.tensor(cotangent(tuple(y.shape))))
        results[f"{name}/y"] = y.detach().numpy()
        for key, leaf in {"x": x, **w}.items():
            if leaf.grad is not None:
                results[f"{name}/{key}"] = leaf.grad.numpy()

    def convolve(x, w, stride, padding):
        return functional.conv2d(x, w["weight"].permute(3, 0, 1, 2), w["bias"], stride=stride, padding=padding)

    def patches(x, w, token):
        y = convolve(x, w, 2, 0).flatten(2).transpose(1, 2)
        return torch.cat([w["token"].expand(len(y), 1, -1), y], 1) if token else y

    kernels = {name: options["kernel"] for name, options in CONVOLUTIONS.items()}
    kernels |= {"patches": 2, "token": 2, "head-first": 2, "head-mean": 2}
    for name, options in CONVOLUTIONS.items():
        keep(name, lambda x, w, o=options: convolve(x, w, o["stride"], o["padding"]))
    keep("patches", lambda x, w: patches(x, w, False))
    keep("token", lambda x, w: patches(x, w, True))
    keep("head-first", lambda x, w: patches(x, w, True)[:, 0])
    keep("head-mean", lambda x, w: patches(x, w, True).mean(1))
    np.savez(path / "images.npz", **results)
