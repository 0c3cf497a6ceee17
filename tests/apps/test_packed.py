"""Documents that share a sequence train as if each were alone, on any grid and from every format that has ends."""

import json
import struct

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, comm, from_global, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.data import documents_of, foreign_labels, read_corpus, write_store
from colossal_mpi.apps.data.documents import ends_by_token, starts_in, starts_of
from colossal_mpi.apps.planning.forecast import forecast
from colossal_mpi.apps.planning.report import show_forecast
from colossal_mpi.apps.training.tasks import make
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.layers import Context, CrossEntropy, Parallelism
from colossal_mpi.machine import Link, Machine
from tests.cases import host
from tests.reference.gpt_case import block_and_index, difference

RNG = np.random.default_rng(4)
LENGTHS = RNG.integers(1, 40, 300)
LENGTHS[0] += 2 - LENGTHS.sum() % 5  # a text has no line feed at its end, and holds out stretches of the same length
TEXTS = ["".join(map(chr, RNG.integers(97, 123, n - 1))) for n in LENGTHS]  # and a line feed after each
CONTEXT = 23
GRIDS = [{"data": 2, "seq": 2}, {"seq": 3}, {"pipe": 2, "col": 2}, {"seq": 2, "row": 1, "col": 2}, {"ulysses": 2}]


def lines(path):
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def config_of(path, axes=None, **data):
    axes = axes or {}
    inside = [axis for axis in axes if axis in ("row", "col")]
    table = {
        "model": {"kind": "llama", "layers": 2, "hidden": 16, "heads": 4, "groups": 2, "inner": 10, "context": CONTEXT},
        "data": {"files": [str(path / "texts.jsonl")], "documents": "separate", "validation": 0.2, **data},
        "training": {"batch": 5, "microbatches": 2, "evaluate_batches": 2, "clip": 0.5, "steps": 3},
        "parallel": {"grid": axes, "tensor": {0: "none", 1: "1d", 2: "2d"}[len(inside)], "dtype": "float64"},
    }
    table["model"]["std"] = 0.3
    return configs.validate(table, "test")


def three_steps(config, grid):
    """Return losses and norms of three steps with a validation, and the weights after them."""
    run = Trainer(config, grid)
    rows = [run.step(step) for step in range(3)]
    return [*(row[key] for row in rows for key in ("loss", "gradient_norm")), run.validate()["val_loss"]], {
        q.name: q.value for q in run.optimizer.parameters
    }


def prepare(path):
    lines(path)
    numbers, weights = three_steps(config_of(path), Grid(MPI.COMM_SELF))
    np.savez(path / "alone.npz", numbers=numbers, **{name: host(value) for name, value in weights.items()})


@pytest.mark.prepare(prepare)
@pytest.mark.grids(*GRIDS)
def test_steps_and_validations_are_those_of_one_rank(grid, prepared):
    numbers, weights = three_steps(config_of(prepared, dict(grid.axes)), grid)
    exact = dict(np.load(prepared / "alone.npz"))
    assert np.allclose(numbers, exact.pop("numbers"), rtol=1e-10, atol=0)
    mine = {name: block_and_index(value) for name, value in weights.items()}
    assert mine.keys() <= exact.keys()
    assert difference(mine, {name: exact[name] for name in mine}) <= 1e-9


def test_the_loss_is_that_of_each_document_alone(tmp_path):
    lines(tmp_path)
    config = config_of(tmp_path)
    p = Parallelism(Grid(MPI.COMM_SELF))
    task = make(config, p)
    batch, weight = task.batch(0, 5), task.weight(0, 5)
    y, cache = task.model.forward(batch.inputs, Context(**batch.context))
    loss, saved = task.loss(y, batch.labels, weight)
    task.model.backward(task.backward(saved), cache)
    gradients = {q.name: host(q.reduce()).copy() for q in task.model.parameters()}
    for q in task.model.parameters():
        q.grad = None

    tokens, starts = host(batch.inputs), batch.context["documents"]
    labels, cross_entropy, total, count = host(batch.labels), CrossEntropy(p), 0.0, 0
    for row in range(5):
        for first in np.unique(starts[row]):
            own = starts[row] == first
            count += int((labels[row, own] >= 0).sum())
    assert count == round(weight * CONTEXT) < 5 * CONTEXT
    for row in range(5):
        for first in np.unique(starts[row]):
            own = starts[row] == first
            x, t = (from_global(one[row, own][None], p.grid, p.tokens()) for one in (tokens, labels))
            y, cache = task.model.forward(x, Context())
            value, saved = cross_entropy.forward(y, t, count)
            task.model.backward(cross_entropy.backward(saved), cache)
            total += value
    assert abs(loss - total) <= 1e-12 * total
    alone = {q.name: host(q.reduce()) for q in task.model.parameters()}
    assert difference({name: (g, ...) for name, g in gradients.items()}, alone) <= 1e-10


def test_a_boundary_that_is_forgotten_changes_the_loss_and_the_gradients(tmp_path):
    lines(tmp_path)
    p = Parallelism(Grid(MPI.COMM_SELF))
    task = make(config_of(tmp_path), p)
    batch, weight = task.batch(0, 2), task.weight(0, 2)

    def run(documents):
        y, cache = task.model.forward(batch.inputs, Context(documents=documents))
        loss, saved = task.loss(y, batch.labels, weight)
        task.model.backward(task.backward(saved), cache)
        gradients = {q.name: host(q.reduce()).copy() for q in task.model.parameters()}
        for q in task.model.parameters():
            q.grad = None
        return loss, gradients

    right = batch.context["documents"]
    loss, exact = run(right)
    places = np.argwhere((right == np.arange(CONTEXT)) & (np.arange(CONTEXT) > 0))
    assert len(places) >= 2
    for row, start in places:
        wrong = right.copy()
        wrong[row, right[row] == start] = right[row, start - 1]
        value, gradients = run(wrong)
        assert abs(value - loss) > 1e-12 * loss
        assert difference({name: (g, ...) for name, g in gradients.items()}, exact) > 1e-10


@pytest.mark.prepare(lines)
@pytest.mark.grids({"seq": 3}, {"data": 2, "seq": 2}, {"pipe": 2, "seq": 2}, {"seq": 2, "row": 1, "col": 2})
def test_a_forecast_has_the_words_of_the_first_step(grid, prepared, capsys):
    axes, link = dict(grid.axes), Link(50e-6, 2e9)
    for documents in ("separate", "joined"):
        config = config_of(prepared, axes, documents=documents)
        run = Trainer(config, grid)
        with ledger.record() as moved:
            run.step(0)
        everyone = comm.collect((grid.coords.get("pipe", 0), moved.by_axis()), grid)
        one = forecast(config, Machine(40e9, 30e9, 5e-6, 2e-4, link, link, 4, overlap=False))
        for stage, cost in enumerate(one.stages):
            words = next(words for at, words in everyone if at == stage)  # the first rank of the stage
            assert {axis: n for axis, n in cost.words_by_axis.items() if n} == {a: n for a, n in words.items() if n}
        show_forecast(one)
        assert ("figures of the first step" in capsys.readouterr().out) == (documents == "separate")


def test_starts_are_those_of_the_documents():
    starts = starts_of(np.cumsum([3, 0, 4, 1, 1]), 12)
    assert starts.tolist() == [0, 3, 7, 8, 9]
    of = np.repeat(np.arange(5), [3, 4, 1, 1, 3])
    numbers, stretch = np.array([0, 1, 3, 5]), 2
    kept = np.concatenate([of[2 * n : 2 * n + 2] * 10 + n // 3 for n in numbers])  # other documents across a gap
    inner = starts_in(starts, numbers, stretch)
    assert inner.tolist() == np.flatnonzero(np.diff(kept, prepend=-1)).tolist()
    for length in (1, 3, 8):
        places = np.arange(12 - length)
        whole = np.array([[starts[starts <= p + i].max() for i in range(length + 1)] for p in places])
        found = documents_of(starts, places, length)
        assert np.array_equal(found, np.maximum(whole[:, :-1] - places[:, None], 0))
        assert foreign_labels(starts, places, length) == (whole[:, 1:] != whole[:, :-1]).sum()
    assert ends_by_token(np.array([5, 0, 0, 7, 0, 1]), 0).tolist() == [2, 3, 5]


def test_every_format_tells_where_documents_end(tmp_path):
    lines(tmp_path)
    grid, tokens = Grid(MPI.COMM_SELF), "\n".join([*TEXTS, ""]).encode()
    ids = np.frombuffer(tokens, np.uint8)
    write_store([tmp_path / "texts.jsonl"], tmp_path / "store.h5", "bytes", "\n", "text", False)
    np.save(tmp_path / "array.npy", ids.astype("u2"))
    ids.astype("<u2").tofile(tmp_path / "megatron.bin")
    bounds = np.arange(len(LENGTHS) + 1)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(LENGTHS), len(bounds))
    places = 2 * np.cumsum([0, *LENGTHS[:-1]])
    rest = [LENGTHS.astype("<i4"), places.astype("<i8"), bounds.astype("<i8")]
    (tmp_path / "megatron.idx").write_bytes(head + b"".join(part.tobytes() for part in rest))
    known = None
    for name in ("store.h5", "array.npy", "megatron.bin"):
        corpus = read_corpus([str(tmp_path / name)], 0.2, CONTEXT, grid, separate=True, end=10)
        known = known or [corpus.train_starts.tolist(), corpus.validation_starts.tolist()]
        assert [corpus.train_starts.tolist(), corpus.validation_starts.tolist()] == known
    text = read_corpus([str(tmp_path / "texts.jsonl")], 0.2, CONTEXT, grid, separate=True)
    assert [text.train_starts.tolist(), text.validation_starts.tolist()] == known
    with pytest.raises(ConfigError, match=r"array.npy does not say where documents end.*give data.end_token"):
        read_corpus([str(tmp_path / "array.npy")], 0.2, CONTEXT, grid, separate=True)
    (tmp_path / "megatron.idx").write_bytes(head + b"short")
    with pytest.raises(ConfigError, match=r"megatron.idx has \d+ bytes, less than its 300 sequences"):
        read_corpus([str(tmp_path / "megatron.bin")], 0.2, CONTEXT, grid, separate=True)


def test_other_document_ends_are_other_data(tmp_path):
    lines(tmp_path)
    grid = Grid(MPI.COMM_SELF)
    np.save(tmp_path / "array.npy", np.tile(np.arange(7), 99))
    read = [str(tmp_path / "array.npy")], 0.2, CONTEXT, grid
    ends = {read_corpus(*read, separate=True, end=end).digest for end in (1, 2)}
    assert len({read_corpus(*read).digest, *ends}) == 3


def test_only_models_of_the_next_token_keep_documents_apart():
    with pytest.raises(ConfigError, match="documents are kept apart for models that predict the next token"):
        configs.validate({"model": {"kind": "bert"}, "data": {"documents": "separate"}}, "test")
