"""The layer cases of Colossal-AI's own tests pass in every mode at a tolerance of 1e-10, where it allows 1e-1 to 1e-2.

Batch 8, sequence 8, hidden 8, 8 classes, a vocabulary of 16, images of 16 x 16 in patches of 4 x 4. Colossal-AI has
each layer once per mode, and once more for a cut vocabulary or cut classes; here one layer has a case for either size.
Every gradient is compared, and depth is 2 in 2.5d and 3d.
"""

import numpy as np
import pytest

from colossal_mpi import from_global
from colossal_mpi.layers.loss import CrossEntropy
from tests.reference import layer_case as case
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import every_mode, parallelism

SIZES = {"b": 8, "s": 8, "h": 8, "f": 16, "v": 16, "c": 3, "y": 16, "x": 16, "k": 4}
CLASSES = SIZES | {"v": 8}
LAYERS = {
    "Linear": ("up", SIZES),
    "Linear back": ("down", SIZES),
    "LayerNorm": ("layer-norm-bert", SIZES),
    "Embedding": ("embedding", CLASSES),
    "VocabParallelEmbedding": ("embedding", SIZES),
    "PatchEmbedding": ("patches-positions", SIZES),
    "Classifier": ("classifier", CLASSES),
    "VocabParallelClassifier": ("classifier", SIZES),
    "VocabParallelClassifier of the embedding's weight": ("tied", SIZES),
}
LOSSES = {"CrossEntropyLoss": ("bv", CLASSES), "VocabParallelCrossEntropyLoss": ("bsv", SIZES)}
_rng = np.random.default_rng(0)
LOGITS = {name: _rng.standard_normal([n[x] for x in letters]) for name, (letters, n) in LOSSES.items()}
LABELS = {name: _rng.integers(0, logits.shape[-1], logits.shape[:-1]) for name, logits in LOGITS.items()}


def prepare(path):
    import torch
    from torch.nn import functional

    for name, (layer, sizes) in LAYERS.items():
        case.prepare(path, {name: layer}, sizes)
    for name in LOSSES:
        x, labels = torch.tensor(LOGITS[name], requires_grad=True), torch.tensor(LABELS[name])
        loss = functional.cross_entropy(x.reshape(-1, x.shape[-1]), labels.reshape(-1))
        loss.backward()
        np.savez(path / f"{name}.npz", loss=loss.item(), dx=x.grad.numpy())


def loss_and_cotangent(name, p):
    (letters, _), labels = LOSSES[name], LABELS[name]
    y = from_global(labels, p.grid, p.inside(letters[:-1], "v"))
    loss = CrossEntropy(p)
    value, cache = loss.forward(from_global(LOGITS[name], p.grid, p.inside(letters, "v")), y, labels.size)
    return value, loss.backward(cache)


@pytest.mark.prepare(prepare)
@every_mode
def test_colossal_ai_layers_equal_torch(grid, prepared):
    p, off = parallelism(grid), {}
    for name, (layer, sizes) in LAYERS.items():
        results = case.run(layer, p, sizes)[-1]
        off[name] = case.distance(results, dict(np.load(prepared / f"{name}.npz")))
    for name in LOSSES:
        exact = dict(np.load(prepared / f"{name}.npz"))
        value, dx = loss_and_cotangent(name, p)
        off[name] = max(difference({"dx": block_and_index(dx)}, exact), abs(value / exact["loss"] - 1))
    assert not {name: distance for name, distance in off.items() if not distance <= 1e-10}
