"""A model whose kind is registered can be described and made again from the description, as checkpoints do."""

import json
from dataclasses import dataclass

import pytest
from mpi4py import MPI

from colossal_mpi import CheckpointError, Grid, OptionError
from colossal_mpi.layers import Embedding, Parallelism, Sequential, models
from colossal_mpi.layers.models import registry
from colossal_mpi.layers.pooling import FirstPool

SIZES = {"layers": 1, "hidden": 6, "heads": 3, "inner": 5}
TEXT = {"vocabulary": 11, "positions": 7, **SIZES}
CASES = {
    models.GPT: models.GPTConfig(**TEXT),
    models.Llama: models.LlamaConfig(**TEXT, groups=None),
    models.Bert: models.BertConfig(**TEXT),
    models.ViT: models.ViTConfig(image=(4, 6), patch=2, classes=3, **SIZES),
}


def shapes(model):
    return [(q.name, q.value.shape) for q in model.parameters()]


@pytest.fixture
def p():
    return Parallelism(Grid(MPI.COMM_SELF))


@pytest.fixture
def kinds(monkeypatch):
    """Let a test register kinds and remove them after it."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    return registry.MODELS


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_a_description_makes_the_same_model(p, model):
    described = model(CASES[model], p)
    description = json.loads(json.dumps(models.describe(described)))
    back = models.from_description(description, p)
    assert type(back) is model
    assert shapes(back) == shapes(described)
    assert models.describe(back) == {**models.describe(described), "seed": None}


def test_descriptions_and_models_of_no_kind_are_refused(p):
    with pytest.raises(OptionError, match="kind='rnn': it must be one of bert, gpt, llama, vit"):
        models.from_description({"kind": "rnn"}, p)
    with pytest.raises(OptionError, match="no configuration of a gpt: .*depth"):
        models.from_description({"kind": "gpt", "depth": 3}, p)
    with pytest.raises(OptionError, match="a FirstPool has no kind"):
        models.describe(FirstPool(p))


@dataclass(frozen=True)
class Config:
    vocabulary: int = 5
    layers: int = 0
    seed: int | None = 0
    dtype: str = "float32"


class Model(Sequential):
    def __init__(self, config, parallelism):
        self.config = config
        super().__init__(Embedding(config.vocabulary, 3, parallelism, "tokens", seed=config.seed, dtype=config.dtype))


def test_a_registered_model_is_described_and_made(p, kinds, tmp_path):
    models.register_model("mine", Config)(Model)
    model = Model(Config(vocabulary=7), p)
    assert models.describe(model) == {"kind": "mine", "vocabulary": 7, "layers": 0, "seed": 0, "dtype": "float32"}
    assert shapes(models.from_description(models.describe(model), p)) == shapes(model)
    with pytest.raises(CheckpointError, match="a Model is no model of transformers"):
        models.save_pretrained(model, tmp_path / "x")


def test_a_kind_that_is_taken_and_a_configuration_that_lacks_fields_are_refused(kinds):
    with pytest.raises(OptionError, match=r"register_model\('gpt'\): GPT is of this kind"):
        models.register_model("gpt", Config)(Model)
    with pytest.raises(OptionError, match="object must be a dataclass with layers, seed, dtype"):
        models.register_model("mine", object)
