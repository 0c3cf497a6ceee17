"""Directories as other people publish them are read: their activations, heads, wrapped names and tensors besides."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file, save_file

from colossal_mpi import CheckpointError, ConfigError, Grid, Layout, OptionError, from_global
from colossal_mpi.layers import Context, Parallelism, models
from colossal_mpi.layers.activation import ACTIVATIONS, GATED, Gated
from colossal_mpi.layers.models.huggingface import architecture
from tests.cases import host, refusal
from tests.reference.modes import parallelism


@pytest.mark.parametrize("theirs", architecture.ACTIVATIONS)
def test_activations_are_those_of_transformers_plain_and_gated(theirs):
    import torch
    from transformers.activations import ACT2FN

    x = np.random.default_rng(0).standard_normal((3, 2, 5))
    exact = ACT2FN[theirs](torch.tensor(x)).numpy()
    layer = ACTIVATIONS[architecture.ACTIVATIONS[theirs]]()
    assert np.max(abs(result(layer, x) - exact)) <= 1e-11
    if theirs in architecture.GATED_ACTIVATIONS:
        gated = Gated(ACTIVATIONS[GATED[architecture.GATED_ACTIVATIONS[theirs]]]())
        assert np.max(abs(result(gated, x) - exact[:, 0] * x[:, 1])) <= 1e-11


def result(layer, x):
    return host(layer.forward(from_global(x, Grid(), Layout(*[None] * x.ndim)), Context())[0])


C = {"vocab_size": 37, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16, "initializer_range": 0.3}
IDS = np.random.default_rng(1).integers(0, 37, (2, 9))


def saved(path, name, config, outputs):
    """Return a directory that transformers wrote in float64, its tensors, and outputs of the model and token ids."""
    import torch

    from tests.reference.hf_float64 import double, made, randomised

    torch.manual_seed(0)
    with double(), torch.no_grad():
        model = randomised(made(name, config))
        exact = outputs(model, torch.tensor(IDS))
    model.save_pretrained(path)
    return path, load_file(path / "model.safetensors"), exact


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return a directory of GPT-2, its tensors and its logits."""
    path = tmp_path_factory.mktemp("gpt2") / "hf"
    return saved(path, "GPT2LMHeadModel", C, lambda model, ids: model(ids).logits.numpy())


def written(source, target, tensors, **changes):
    """Return a copy of a directory with other tensors and changed keys of its config.json."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, target / "model.safetensors")
    table = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(table), encoding="utf-8-sig")
    return target


def logits(path, **options):
    p = Parallelism(Grid())
    model = models.from_pretrained(path, p, **options)
    y, _ = model.forward(from_global(IDS, p.grid, p.tokens()), Context(train=False))
    return y.gather()


def near(y, exact):
    return np.max(abs(y - exact)) <= 1e-10 * abs(exact).max()


def _without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


_WTE, _ADAPTER = "transformer.wte.weight", "transformer.h.0.attn.c_attn.lora_A.weight"
WHOLE = {
    "compiled": lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()},
    "distributed": lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
    "both": lambda t: {f"module._orig_mod.{name}": tensor for name, tensor in t.items()},
    "blocks-wrapped": lambda t: {
        re.sub(r"(h\.\d+)\.", r"\1._checkpoint_wrapped_module._orig_mod.", name): tensor for name, tensor in t.items()
    },
    "body": lambda t: {name.removeprefix("transformer."): tensor for name, tensor in t.items()},
    "head-alone": lambda t: _without(t, _WTE) | {"lm_head.weight": t[_WTE]},
    "head-wrapped": lambda t: t | {"module.lm_head.weight": t[_WTE]},
}
BESIDES = {
    "score-head": (lambda t: t | {"score.weight": np.zeros((2, 24))}, "1 tensors .*: score.weight; strict=True"),
    "adapter": (
        lambda t: t | {_ADAPTER: np.zeros((2, 24))},
        r"GPT .*\(adapters are not added .*\): transformer.h.0.attn.c_attn.lora_A.weight",
    ),
    "peft": (
        lambda t: (
            {f"base_model.model.{name.replace('c_attn.', 'c_attn.base_layer.')}": tensor for name, tensor in t.items()}
            | {f"base_model.model.{_ADAPTER}": np.zeros((2, 24))}
        ),
        f"base_model.model.{_ADAPTER}",
    ),
    "many": (
        lambda t: t | {f"value.{i}": np.zeros(1) for i in range(5)},
        "5 tensors .*value.0, value.1, value.2 and 2",
    ),
    "twice": (lambda t: t | {f"module.{_WTE}": np.zeros((37, 24))}, f"1 tensors .*module.{_WTE}"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_names_with_prefixes_of_wrappers_are_those_of_the_model(tmp_path, gpt2, case, recwarn):
    path, tensors, exact = gpt2
    assert near(logits(written(path, tmp_path / "hf", WHOLE[case](tensors)), strict=True), exact)
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize("case", BESIDES)
def test_what_does_not_enter_the_model_is_said_and_refused_by_strict(tmp_path, gpt2, case):
    (path, tensors, exact), (change, message) = gpt2, BESIDES[case]
    hub = written(path, tmp_path / "hf", change(tensors))
    with pytest.warns(UserWarning, match=message):
        assert near(logits(hub), exact)
    with pytest.raises(CheckpointError, match="hf holds more than its model: it has .* strict=False .* leaves such"):
        logits(hub, strict=True)


@pytest.mark.grids({"col": 2})
def test_rank_0_alone_warns(grid, shared_path):
    p = parallelism(grid)
    if grid.rank == 0:
        p0 = Parallelism(Grid(MPI.COMM_SELF))
        models.save_pretrained(models.GPT(models.GPTConfig(7, 1, 4, 2, 5), p0), shared_path / "a")
        tensors = load_file(shared_path / "a" / "model.safetensors")
        written(shared_path / "a", shared_path / "hf", tensors | {"score.weight": np.zeros(3)})
    MPI.COMM_WORLD.barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        models.from_pretrained(shared_path / "hf", p)
    assert len([w for w in said if "score.weight" in str(w.message)]) == (grid.rank == 0)
    message = "holds more than its model: it has score.weight"
    assert message in refusal(lambda: models.from_pretrained(shared_path / "hf", p, strict=True), grid)[1]


BERT = {
    **{"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 16, "num_labels": 3},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a directory of BERT with the heads of pre-training, its tensors, its logits and its hidden states."""

    def outputs(model, ids):
        return {
            "tokens": model(ids).prediction_logits.numpy(),
            "follows": model(ids).seq_relationship_logits.numpy(),
            "stream": model.bert(ids).last_hidden_state.numpy(),
        }

    return saved(tmp_path_factory.mktemp("bert") / "hf", "BertForPreTraining", BERT, outputs)


def _old(tensors):
    """Return tensors under their older names, as the first directories of BERT have them."""
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()}  # fmt: skip


def _body(tensors):
    return {name.removeprefix("bert."): t for name, t in tensors.items() if not name.startswith("cls.")}


HUB = {
    "masked": (["BertForMaskedLM"], lambda t: t, "tokens", "4 tensors .*: bert.pooler.dense.bias"),
    "masked-old-names": (["BertForMaskedLM"], _old, "tokens", "4 tensors do not enter the Bert"),
    "both-named": (["BertForPreTraining", "BertForMaskedLM"], _old, ("tokens", "follows"), None),
    "none-named": (None, _old, ("tokens", "follows"), None),
    "body": (["BertModel"], _body, "stream", "2 tensors .*: pooler.dense.bias, pooler.dense.weight"),
    "body-none-named": (None, _body, "stream", "2 tensors .*: pooler.dense.bias, pooler.dense.weight"),
    "body-and-heads": (["BertModel"], lambda t: t, "stream", " tensors .*: bert.pooler.dense.bias"),
}


@pytest.mark.parametrize("case", HUB)
def test_the_class_that_a_bert_names_chooses_its_head(tmp_path, bert, case):
    (path, tensors, exact), (named, change, outputs, message) = bert, HUB[case]
    hub, p = written(path, tmp_path / "hf", change(tensors), architectures=named), Parallelism(Grid())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = models.from_pretrained(hub, p)
    assert [bool(re.search(message, str(w.message))) for w in said] == ([True] if message else [])
    y, _ = model.forward(from_global(IDS, p.grid, p.tokens()), Context(train=False))
    names, y = (outputs, y) if isinstance(y, tuple) else ([outputs], [y])
    assert all(near(part.gather(), exact[name]) for name, part in zip(names, y, strict=True))


def test_a_class_of_bert_that_we_lack_is_named(tmp_path, bert):
    hub = written(bert[0], tmp_path / "hf", bert[1], architectures=["BertForTokenClassification"])
    with pytest.raises(ConfigError, match=r"\['BertForTokenClassification'\] cannot be run: one must be 'BertForPre"):
        models.from_pretrained(hub, Parallelism(Grid()))
    with pytest.raises(OptionError, match="a Bert of head='first': use 'pretraining', 'classes' or 'none'"):
        models.Bert(models.BertConfig(head="first"), Parallelism(Grid()))


@pytest.mark.filterwarnings("ignore:.*left aside")
def test_transformers_loads_a_body_that_is_saved(tmp_path, bert):
    import torch
    import transformers

    from tests.reference.hf_float64 import double

    hub = written(bert[0], tmp_path / "hf", _body(bert[1]), architectures=["BertModel"])
    models.save_pretrained(models.from_pretrained(hub, Parallelism(Grid())), tmp_path / "saved")
    with double(), torch.no_grad():
        model = transformers.BertModel.from_pretrained(tmp_path / "saved").eval()
        assert near(model(torch.tensor(IDS)).last_hidden_state.numpy(), bert[2]["stream"])


def test_an_untied_bert_has_both_of_its_biases_and_needs_one(tmp_path):
    p = Parallelism(Grid())
    model = models.Bert(models.BertConfig(7, 1, 4, 2, 5, tied=False, next_sentence=False), p)
    bias = next(q for q in model.parameters() if q.name == "decoder.bias")
    bias.value.local[...] = np.arange(7)
    models.save_pretrained(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    one = _without(tensors, "cls.predictions.decoder.bias")
    assert np.array_equal(one["cls.predictions.bias"], np.arange(7))
    again = models.from_pretrained(written(tmp_path / "a", tmp_path / "b", one), p, strict=True)
    assert all(
        np.array_equal(host(a.value), host(b.value))
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
