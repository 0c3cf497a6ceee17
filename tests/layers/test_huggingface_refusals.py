"""Unreadable and unwritable directories raise the same error on all ranks, which names key and value, or tensor."""

import builtins
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file, save_file

from colossal_mpi import CheckpointError, ConfigError, Grid, OptionError
from colossal_mpi.layers import Parallelism, models
from colossal_mpi.layers.models.huggingface import directory
from colossal_mpi.layers.models.huggingface.directory import Writer
from colossal_mpi.layers.pooling import FirstPool
from colossal_mpi.redistribution import gather
from tests.cases import host, refusal
from tests.reference.modes import parallelism

SIZES = {"vocabulary": 11, "layers": 1, "hidden": 6, "heads": 3, "inner": 5, "positions": 7}
MODELS = {
    "gpt2": models.GPTConfig(**SIZES),
    "llama": models.LlamaConfig(**SIZES, groups=None),
    "bert": models.BertConfig(**SIZES),
    "vit": models.ViTConfig(
        image=4, patch=2, classes=3, **{k: v for k, v in SIZES.items() if k not in ("vocabulary", "positions")}
    ),
}
KINDS = {"gpt2": models.GPT, "llama": models.Llama, "bert": models.Bert, "vit": models.ViT}


def saved(name, path, **changes):
    """Return a directory of a small model, with changed keys of its config.json and without its digests."""
    model = KINDS[name](MODELS[name], Parallelism(Grid(MPI.COMM_SELF)))
    models.save_pretrained(model, path)
    (path / "SHA256SUMS").unlink()
    edit(path, **changes)
    return path


def edit(path, **changes):
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(table | changes))


def refused(path, grid=None):
    p = Parallelism(Grid(MPI.COMM_SELF)) if grid is None else parallelism(grid)
    return refusal(lambda: models.from_pretrained(path, p), p.grid)


VALUES = [
    (
        "gpt2",
        {"activation_function": "mish"},
        "activation_function='mish' cannot be run: it must be 'gelu_new'",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True cannot be run"),
    ("gpt2", {"n_layer": "1"}, "n_layer='1' cannot be run: it must be int"),
    ("gpt2", {"n_layer": True}, "n_layer=True cannot be run: it must be int"),
    ("gpt2", {"n_inner": 2.5}, "n_inner=2.5 cannot be run: it must be int or null"),
    (
        "gpt2",
        {"model_type": "gpt_neo"},
        "model_type='gpt_neo' cannot be run: it must be one of bert, gpt2, llama, mistral, mixtral, qwen2, qwen3, qw",
    ),
    ("llama", {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] cannot be run: it must be 'gelu_new' or .* 'silu'"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope.*'dynamic'.*: use one of"),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": "2"}},
        "rope.*'yarn': factor='2': it must be a number above 0",
    ),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope.*it lacks low_freq_factor"),
    ("llama", {"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope.*must be those of all layers"),
    ("llama", {"partial_rotary_factor": 0.5}, "rope.*partial_rotary_factor=0.5: heads are turned whole"),
    ("llama", {"model_type": "mistral", "sliding_window": 3}, None),
    ("llama", {"model_type": "mistral", "sliding_window": 3.5}, "sliding_window=3.5 cannot be run: it must be int or"),
    (
        "llama",
        {"model_type": "mistral", "layer_types": ["full_attention"]},
        r"layer_types=\['full_attention'\] cannot be run with sliding_window=4096: every layer",
    ),
    ("llama", {"model_type": "mistral"}, None),
    ("llama", {"model_type": "qwen2_moe"}, r"model_type='qwen2_moe' cannot be run \(there is no expert that all"),
    ("llama", {"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] cannot be run: it must be"),
    ("llama", {"model_type": "phi"}, r"model_type='phi' cannot be run \(there are no blocks whose attention and MLP"),
    (
        "llama",
        {"model_type": "qwen2", "layer_types": ["sliding_attention"]},
        r"layer_types=\['sliding_attention'\] cannot be run: with sliding_window=None it must name one",
    ),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' cannot be run"),
    ("bert", {"is_decoder": True}, "is_decoder=True cannot be run: it must be False"),
    ("vit", {"qkv_bias": False}, "qkv_bias=False cannot be run: it must be True"),
    ("vit", {"image_size": "4"}, "image_size='4' cannot be run: it must be int or tuple"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), VALUES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_values_that_cannot_be_run_are_named(tmp_path, name, changes, message):
    path = saved(name, tmp_path / "hf", **changes)
    if message is None:
        models.from_pretrained(path, Parallelism(Grid(MPI.COMM_SELF)))
        return
    with pytest.raises(ConfigError, match=f"hf/config.json: {message}"):
        models.from_pretrained(path, Parallelism(Grid(MPI.COMM_SELF)))


@pytest.mark.grids({"row": 2, "col": 2})
def test_all_ranks_refuse_alike(grid, shared_path):
    path = shared_path / "hf"
    if grid.rank == 0:
        saved("gpt2", path, n_embd=9)
    MPI.COMM_WORLD.barrier()
    kind, text = refused(path, grid)
    assert kind is CheckpointError
    assert "transformer.wte.weight is of shape (11, 6); its configuration makes it (11, 9)" in text
    model = models.GPT(models.GPTConfig(**SIZES | {"heads": 2}), parallelism(grid))
    assert (
        "hf exists: a checkpoint is never overwritten" in refusal(lambda: models.save_pretrained(model, path), grid)[1]
    )


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path):
    path = saved("llama", tmp_path / "hf")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["score.weight"] = np.zeros(3, "f4")
    save_file(tensors, path / "model.safetensors")
    kind, text = refused(path)
    assert kind is CheckpointError
    assert "it lacks model.norm.weight and has score.weight besides" in text


def test_bodies_alone_old_names_and_twins_are_read(tmp_path):
    """Older directories store the body alone, use old names of norms, or store tied tensors twice."""
    path = saved("bert", tmp_path / "bert")
    whole = load_file(path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in whole.items()
    }
    old |= {
        "cls.predictions.decoder.weight": whole["bert.embeddings.word_embeddings.weight"],
        "bert.embeddings.position_ids": np.arange(7),
    }
    save_file(old, path / "model.safetensors")
    assert same(path, "bert")
    gpt = saved("gpt2", tmp_path / "gpt2")
    body = {n.removeprefix("transformer."): t for n, t in load_file(gpt / "model.safetensors").items()}
    body["h.0.attn.bias"] = np.tril(np.ones((1, 1, 7, 7), "f4"))
    save_file(body, gpt / "model.safetensors")
    assert same(gpt, "gpt2")


def same(path, name):
    """Return whether a directory holds the model that `saved` wrote."""
    p = Parallelism(Grid(MPI.COMM_SELF))
    pairs = zip(models.from_pretrained(path, p).parameters(), KINDS[name](MODELS[name], p).parameters(), strict=True)
    return all(np.array_equal(host(a.value), host(b.value)) for a, b in pairs)


def test_twins_that_differ_are_refused(tmp_path):
    path = saved("gpt2", tmp_path / "hf")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": 2 * tensors["transformer.wte.weight"]}, path / "model.safetensors")
    assert "lm_head.weight is not transformer.wte.weight, to which tie_word_embeddings ties it" in refused(path)[1]


def test_sixteen_bits_are_read_into_float32_exactly(tmp_path):
    path = saved("llama", tmp_path / "hf")
    whole = load_file(path / "model.safetensors")
    for half in (ml_dtypes.bfloat16, np.float16):
        save_file({name: tensor.astype(half) for name, tensor in whole.items()}, path / "model.safetensors")
        model = models.from_pretrained(path, Parallelism(Grid(MPI.COMM_SELF)))
        table = next(model.parameters()).value.local
        assert table.dtype == np.float32
        assert np.array_equal(table, whole["model.embed_tokens.weight"].astype(half).astype("f4"))


def test_files_that_are_damaged_or_none_are_refused(tmp_path, monkeypatch):
    path = saved("gpt2", tmp_path / "hf")
    file = path / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:100])
    assert "model.safetensors cannot be read as safetensors" in refused(path)[1]
    file.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    assert "model.safetensors cannot be read as safetensors" in refused(path)[1]
    tensors = {name: tensor.astype("i4") for name, tensor in load_file_of(good, tmp_path).items()}
    save_file(tensors, file)
    assert "is of dtype I32; it must be F64, F32, F16, BF16" in refused(path)[1]
    file.unlink()
    (path / "pytorch_model.bin").touch()
    assert "where you trust the pickle pytorch_model.bin, load it with transformers and save it" in refused(path)[1]
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret"}}')
    assert "it maps no tensors to files beside it" in refused(path)[1]
    (path / "config.json").write_text("[")
    assert "config.json is damaged: it is no JSON object" in refused(path)[1]


def load_file_of(content, tmp_path):
    (tmp_path / "good.safetensors").write_bytes(content)
    return load_file(tmp_path / "good.safetensors")


def test_a_dtype_that_is_none_of_weights_is_refused(tmp_path):
    with pytest.raises(OptionError, match="dtype='int8': use one of 'float64', 'float32'"):
        models.from_pretrained(tmp_path, Parallelism(Grid(MPI.COMM_SELF)), "int8")


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    path, imported = saved("gpt2", tmp_path / "hf"), builtins.__import__

    def without(name, *rest):
        if name == "safetensors":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"needs the package safetensors: pip install 'colossal-mpi\[hf\]'"):
        directory._require("safetensors")
    monkeypatch.undo()
    assert path.is_dir()


def test_models_that_hugging_face_does_not_have_are_refused(tmp_path):
    p = Parallelism(Grid(MPI.COMM_SELF))
    with pytest.raises(CheckpointError, match="a FirstPool is no model of transformers"):
        models.save_pretrained(FirstPool(p), tmp_path / "x")
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocabulary", "positions")}
    with pytest.raises(ConfigError, match="pool='mean' has no place in a vit of Hugging Face"):
        models.save_pretrained(models.ViT(models.ViTConfig(image=4, patch=2, pool="mean", **sizes), p), tmp_path / "x")
    with pytest.raises(ConfigError, match="activation='geglu' has no name in Hugging Face's activation_function"):
        models.save_pretrained(models.GPT(models.GPTConfig(**SIZES, activation="geglu"), p), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.grids({"col": 2})
def test_a_failed_write_leaves_nothing_and_is_known_to_all_ranks(grid, shared_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "write", full)
    monkeypatch.setattr(gather, "PIECE", 8)
    model = models.GPT(MODELS["gpt2"], parallelism(grid))
    kind, text = refusal(lambda: models.save_pretrained(model, shared_path / "hf"), grid)
    assert kind is CheckpointError
    assert "hf cannot be written: [Errno 28] No space left on device" in text
    assert not list(shared_path.iterdir())
