"""Models loaded from transformers have its logits and gradients in every mode, and are saved bit for bit."""

import math

import numpy as np
import pytest

from colossal_mpi import CheckpointError, Grid, Layout, comm, from_global
from colossal_mpi.layers import Context, Parallelism, generate, models
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models.huggingface import directory
from tests.cases import block_of, host
from tests.reference import hf_case as case
from tests.reference.modes import FEW, GRIDS, SEQUENCE, every_cut, every_mode, parallelism

prepared_by = pytest.mark.prepare(case.prepare)


def run(model, name, p):
    """Return the logits by name and the loss, and leave its gradients in the parameters."""
    grid, total, names = p.grid, 0.0, case.outputs_of(case.CASES[name][0])
    x, ctx = inputs_of(name, p, next(model.parameters()).value.dtype)
    logits, cache = model.forward(x, ctx)
    logits, cotangents = logits if isinstance(logits, tuple) else (logits,), []
    for which, y in zip(names, logits, strict=True):
        loss, labels = CrossEntropy(p), case.labels_of(which)
        layout = p.tokens() if labels.ndim == 2 else Layout(p.tokens().dims[0])
        value, saved = loss.forward(y, from_global(labels, grid, layout), int((labels >= 0).sum()))
        cotangents.append(loss.backward(saved))
        total += value
    model.backward(tuple(cotangents) if len(names) > 1 else cotangents[0], cache)
    return dict(zip(names, logits, strict=True)), total


def inputs_of(name, p, dtype):
    """Return the input of a case and the context of its mask and segments."""
    grid = p.grid
    if name.startswith("vit"):
        return from_global(case.IMAGES, grid, Layout(p.tokens().dims[0], None, None, None), dtype=dtype), Context()
    ids, mask, segments = (from_global(a, grid, p.tokens()) for a in (case.TOKENS, case.MASK, case.SEGMENTS))
    return ids, Context(mask=mask, segments=segments if name.startswith("bert") else None)


def distance(array, which, whole):
    """Return this rank's greatest difference to `whole` at elements that count, relative to the greatest of `whole`."""
    valid = np.broadcast_to(case.labels_of(which)[..., None] >= 0, whole.shape)
    difference = np.abs(host(array) - block_of(whole, array.layout, array.grid))
    return np.max(difference[block_of(valid, array.layout, array.grid)], initial=0) / abs(whole).max()


@prepared_by
@every_cut
@pytest.mark.parametrize("name", case.MODELS)
def test_logits_and_every_gradient_are_those_of_transformers(grid, prepared, name):
    check(parallelism(grid), prepared, name)


@prepared_by
@pytest.mark.grids(*(axes for axes in (*GRIDS, *SEQUENCE) if math.prod(axes.values()) < 6))
@pytest.mark.parametrize("name", case.FAMILIES)
def test_families_like_llama_are_those_of_transformers(grid, prepared, name):
    check(parallelism(grid), prepared, name)


@prepared_by
@pytest.mark.grids(*FEW, {"ulysses": 2, "row": 2})
@pytest.mark.parametrize("name", [name for name in case.CASES if name not in (*case.MODELS, *case.FAMILIES)])
def test_variants_are_those_of_transformers(grid, prepared, name):
    check(parallelism(grid), prepared, name)


def check(p, prepared, name):
    exact = np.load(prepared / f"{name}.npz")
    model = models.from_pretrained(prepared / name, p)
    logits, loss = run(model, name, p)
    for key, array in logits.items():
        assert distance(array, key, exact[key]) <= 1e-10
    assert abs(loss - exact["loss"]) <= 1e-12 * abs(exact["loss"])
    gradients = models.from_pretrained(prepared / f"{name}-gradients", p)
    largest = {q.name: max(comm.collect(np.max(abs(host(q.value)), initial=0), p.grid)) for q in gradients.parameters()}
    floor = 1e-3 * max(largest.values())
    for mine, theirs in zip(model.parameters(), gradients.parameters(), strict=True):
        scale = max(largest[mine.name], floor)
        assert np.max(abs(host(mine.reduce()) - host(theirs.value)), initial=0) <= 1e-10 * scale, mine.name


@prepared_by
@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "qwen3", "llama-yarn", "mixtral", "qwen3-experts"])
def test_greedy_texts_are_those_of_transformers(prepared, name):
    import torch
    import transformers

    load, ids = getattr(transformers, case.CASES[name][0]).from_pretrained, case.TOKENS[:, :4]
    theirs = load(prepared / name, **case.eager(name))
    texts = torch.tensor(ids)
    for _ in range(6):
        texts = torch.cat([texts, theirs(texts).logits[:, -1:].argmax(-1)], 1)
    model = models.from_pretrained(prepared / name, Parallelism(Grid()))
    assert generate(model, ids.tolist(), 6, temperature=0.0) == texts[:, 4:].tolist()


@prepared_by
@pytest.mark.grids({}, {"row": 2, "col": 2})
def test_float32_is_asked_for_and_near(grid, prepared):
    p = parallelism(grid)
    for name in case.MODELS:
        exact = np.load(prepared / f"{name}.npz")
        model = models.from_pretrained(prepared / name, p, "float32")
        assert all(q.value.dtype == np.float32 for q in model.parameters())
        for key, array in run(model, name, p)[0].items():
            assert distance(array, key, exact[key]) <= 1e-5


class Counted:
    """A safetensors file that only hands out slices, and counts their bytes."""

    read = 0

    def __init__(self, file):
        self.file, self.keys = file, file.keys

    def get_slice(self, name):
        return CountedSlice(self.file.get_slice(name))


class CountedSlice:
    def __init__(self, piece):
        self.piece, self.get_shape, self.get_dtype = piece, piece.get_shape, piece.get_dtype

    def __getitem__(self, index):
        values = self.piece[index]
        Counted.read += values.nbytes
        return values


@prepared_by
@every_mode
def test_a_rank_reads_the_bytes_of_its_own_blocks(grid, prepared, monkeypatch):
    opened = directory._open
    monkeypatch.setattr(directory, "_open", lambda path: Counted(opened(path)))
    for name in case.MODELS:
        Counted.read = 0
        model = models.from_pretrained(prepared / name, parallelism(grid))
        assert Counted.read == sum(q.value.local.nbytes for q in model.parameters())


@prepared_by
@pytest.mark.grids({}, {"row": 2, "col": 2}, {"col": 2, "depth": 2})
def test_what_is_saved_in_several_files_is_the_same_bits(grid, prepared, shared_path):
    p = parallelism(grid)
    for name in case.CASES:
        model = models.from_pretrained(prepared / name, p)
        models.save_pretrained(model, shared_path / name, most=9000)
        assert len(list((shared_path / name).glob("*.safetensors"))) > 1
        assert case.same_tensors(prepared / name, shared_path / name)
        again = models.from_pretrained(shared_path / name, p).parameters()
        assert all(np.array_equal(host(a.value), host(b.value)) for a, b in zip(model.parameters(), again, strict=True))


@pytest.mark.grids({}, {"data": 2})
def test_a_model_that_was_read_keeps_its_tokenizer_and_the_tokens_that_end_a_text(grid, shared_path):
    p, files = Parallelism(grid), {"generation_config.json": b'{"eos_token_id": [3, 4]}', "merges.txt": b"a b"}
    model = models.GPT(models.GPTConfig(vocabulary=9, layers=1, hidden=4, heads=2, positions=5), p)
    models.save_pretrained(model, shared_path / "one", extra={"eos_token_id": 3}, settings=files)
    model = models.from_pretrained(shared_path / "one", p)
    models.save_pretrained(model, shared_path / "two")
    models.save_pretrained(model, shared_path / "three", extra={"eos_token_id": 5})
    models.save_pretrained(model, shared_path / "four", settings={})
    if grid.rank == 0:
        found = [models.find_settings(shared_path / name) for name in ("two", "three", "four")]
        assert models.read_settings(found[0]) == files
        assert [models.end_tokens(case.table(shared_path / "two"), paths) for paths in found] == [[3, 4], [5], [3]]
        assert case.table(shared_path / "four")["eos_token_id"] == 3
    with pytest.raises(
        CheckpointError, match=r"save_pretrained with settings 'x\.txt': the names are generation_config"
    ):
        models.save_pretrained(model, shared_path / "five", settings={"x.txt": b""})


@prepared_by
@pytest.mark.parametrize("name", case.CASES)
def test_transformers_loads_what_is_saved(prepared, tmp_path, name):
    import torch
    import transformers

    model = models.from_pretrained(prepared / name, Parallelism(Grid()))
    models.save_pretrained(model, tmp_path, extra=case.table(prepared / name))
    load = getattr(transformers, case.CASES[name][0]).from_pretrained
    (before, _), (after, loading) = (load(d, output_loading_info=True) for d in (prepared / name, tmp_path))
    weights = after.state_dict()
    assert not set().union(*loading.values())
    assert all(torch.equal(w, weights[key]) for key, w in before.state_dict().items() if key not in case.UNUSED)
    was, now = before.config.to_dict(), after.config.to_dict()
    assert {key for key in was if was[key] != now[key]} <= {"_name_or_path"}
