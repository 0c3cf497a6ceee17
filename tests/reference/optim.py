"""The formulas of the optimizers in NumPy, on whole arrays: ``update(w, g, state, step) -> w``."""

import math

import numpy as np


def adam_direction(g, state, step, betas=(0.9, 0.95), eps=1e-8):
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    return m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)


def adamw(w, g, state, step, lr, decay):
    return w * (1 - lr * decay) - lr * adam_direction(g, state, step)


def lamb(w, g, state, step, lr, decay):
    r = adam_direction(g, state, step) + decay * w
    share = np.linalg.norm(w) / np.linalg.norm(r) if np.linalg.norm(w) else 1.0
    return w - lr * share * r


def sgd(w, g, state, step, lr, decay, nesterov=False, momentum=0.9):
    g = g + decay * w
    v = state["v"] = momentum * state.get("v", 0) + g
    return w - lr * (g + momentum * v if nesterov else v)


def lars(w, g, state, step, lr, decay, trust=1e-3):
    if not decay:
        return sgd(w, g, state, step, lr, 0.0)
    share = trust * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
    return sgd(w, (g + decay * w) * share, state, step, lr, 0.0)


def orthogonalised(x):
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(w, g, state, step, lr, decay, rows=None, momentum=0.95):
    if rows is None:
        return adamw(w, g, state, step, lr, decay)
    v = state["v"] = momentum * state.get("v", 0) + (1 - momentum) * g
    matrix = ((1 - momentum) * g + momentum * v).reshape(rows, -1)
    scale = 0.2 * math.sqrt(max(matrix.shape))
    return w * (1 - lr * decay) - lr * scale * orthogonalised(matrix).reshape(w.shape)


def adafactor(w, g, state, step, lr, decay, rows=None):
    keep, eps = 1 - step**-0.8, np.finfo(g.dtype).eps

    def mean(slot, new):
        state[slot] = keep * state.get(slot, 0) + (1 - keep) * new
        return state[slot]

    if rows is None:
        v = mean("v", g**2)
    else:
        x = g.reshape(rows, -1)
        r, c = mean("r", (x**2).mean(1)), mean("c", (x**2).mean(0))
        v = (np.outer(r, c) / max(r.mean(), eps)).reshape(w.shape)
    u = g / np.sqrt(np.maximum(v, eps**2))
    rate = min(lr, step**-0.5) * max(1e-3, math.sqrt((w**2).mean()))
    return w * (1 - lr * decay) - rate / max(1.0, math.sqrt((u**2).mean())) * u
