"""Logits and labels whose sizes do not divide, and PyTorch's losses of them."""

import numpy as np

OPTIONS = {
    "plain": {},
    "ignore": {"ignore": 4},
    "ignore-outside": {"ignore": 255},
    "smoothing": {"smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "all": {"ignore": 4, "smoothing": 0.3, "z_loss": 1e-3},
}
SHAPES = {"tokens": (7, 5, 9), "classes": (7, 9)}
_rng = np.random.default_rng(3)
LOGITS = {name: 4 * _rng.standard_normal(shape) for name, shape in SHAPES.items()}
LABELS = {name: _rng.integers(0, 9, shape[:-1]) for name, shape in SHAPES.items()}
for _labels in LABELS.values():
    _labels.flat[:4] = 4, 4, 255, -1
    _labels.flat[5] = 8


def labels_of(name, ignore=None, **_):
    """Return labels, of which only `ignore` is outside the vocabulary."""
    return np.where(LABELS[name] == 255, 255 if ignore == 255 else -1, LABELS[name])


def count_of(name, ignore=None, **_):
    labels = labels_of(name, ignore)
    return int(((labels >= 0) & (labels != ignore)).sum())


def prepare(path):
    import torch
    from torch.nn import functional

    results = {}
    for name in SHAPES:
        for which, options in OPTIONS.items():
            x = torch.tensor(LOGITS[name], requires_grad=True)
            labels = torch.tensor(labels_of(name, **options)).reshape(-1)
            labels = torch.where(labels == options.get("ignore", -1), -1, labels)
            flat = x.reshape(-1, 9)
            loss = functional.cross_entropy(
                flat, labels, ignore_index=-1, label_smoothing=options.get("smoothing", 0.0)
            )
            loss = loss + options.get("z_loss", 0.0) * (flat.logsumexp(-1)[labels >= 0] ** 2).mean()
            loss.backward()
            results[f"{name}/{which}/loss"], results[f"{name}/{which}/gradient"] = loss.item(), x.grad.numpy()
    np.savez(path / "losses.npz", **results)
