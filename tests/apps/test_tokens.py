"""A token store returns the tokens that were written, needs little memory, and trains equally on any grid."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, Layout, comm
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.data import corpus as data
from colossal_mpi.apps.data import prepare, sampling, store, texts
from colossal_mpi.apps.data.corpus import Concatenated, Stretches
from colossal_mpi.apps.data.tokenizer import Bytes
from colossal_mpi.apps.training import tasks
from tests import command_line

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]
TEXT = "".join(f"Line {i} of a text, with naïve “quotes” and\n\n  blanks.\n" for i in range(900))


def call(*arguments):
    return command_line.call("data", *arguments)


def made(path, parts, tokenizer="bytes", end=None):
    """Write a store of some documents."""
    inputs = [path.with_suffix(f".{i}.txt") for i in range(len(parts))]
    for name, text in zip(inputs, parts, strict=True):
        name.write_text(text)
    prepare.write_store(inputs, path, tokenizer, end, "text", False)
    return store.Store(path)


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """Train a byte-level BPE of 300 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    made.save(str(path))
    return path


@pytest.mark.parametrize("piece", [1 << 20, 700], ids=["whole", "pieces"])
def test_bytes_of_documents_come_out_as_they_went_in(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(texts, "PIECE", piece)
    monkeypatch.setattr(store, "_BUFFER", 5000)
    parts = [TEXT, "", "short", "x" * 3000]
    opened = made(tmp_path / "a.h5", parts, end="\n")
    whole = b"".join(text.encode() + b"\n" for text in parts)
    assert (len(opened), opened.vocabulary, opened.dtype) == (len(whole), 256, np.dtype(np.uint8))
    assert opened[np.arange(len(opened))].tobytes() == whole
    assert opened.documents[...].tolist() == np.cumsum([len(text.encode()) + 1 for text in parts]).tolist()
    assert bytes(opened.document(2, 99)) == b"short\n"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("piece", [1 << 20, 900], ids=["whole", "pieces"])
def test_subwords_are_those_of_the_whole_text(tmp_path, monkeypatch, subwords, piece):
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(texts, "PIECE", piece)
    opened = made(tmp_path / "a.h5", [TEXT, "Line 7"], str(subwords), "<|end|>")
    library = tokenizers.Tokenizer.from_file(str(subwords))
    end = [library.token_to_id("<|end|>")]
    assert opened[np.arange(len(opened))].tolist() == [
        *library.encode(TEXT).ids,
        *end,
        *library.encode("Line 7").ids,
        *end,
    ]
    assert (opened.vocabulary, opened.dtype) == (300, np.dtype(np.uint16))
    assert opened.tokenizer.decode(opened.document(0, 10**6)[:-1]).decode() == TEXT


def test_a_tokenizer_that_truncates_pads_or_drops_out_gives_the_whole_text(tmp_path, subwords):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(subwords))
    exact = plain.encode(TEXT).ids
    plain.enable_truncation(128)
    plain.enable_padding(length=128, pad_id=0, pad_token="<|end|>")
    plain.model.dropout = 0.5
    plain.save(str(tmp_path / "used.json"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (TEXT, "Line")))
    result = call("prepare", "--tokenizer", tmp_path / "used.json", tmp_path / "a.jsonl", tmp_path / "a.h5")
    assert "asks for truncation to 128 tokens, padding with <|end|>, dropout of 0.5: switched off" in result.stdout
    opened = store.Store(tmp_path / "a.h5")
    assert opened.document(0, 10**6).tolist() == exact
    assert opened.document(1, 10**6).tolist() == tokenizers.Tokenizer.from_file(str(subwords)).encode("Line").ids
    assert opened.tokenizer.encode([TEXT.encode()])[0].tolist() == exact


@pytest.fixture
def sparse(tmp_path):
    """Write a tokenizer of three words and a special token, with the ids 0, 200, 700 and 70000."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "b": 200, "c": 700, "<e>": 70000}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.add_special_tokens(["<e>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "sparse.json"))
    return tmp_path / "sparse.json"


def test_a_vocabulary_with_holes_goes_to_its_greatest_id(tmp_path, sparse):
    opened = made(tmp_path / "a.h5", ["a b c b", "c"], str(sparse), end="<e>")
    assert opened[np.arange(7)].tolist() == [0, 200, 700, 200, 70000, 700, 70000]
    assert (opened.vocabulary, opened.dtype) == (70001, np.dtype(np.uint32))


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, sparse):
    import h5py

    (tmp_path / "a.txt").write_text("a b c b")
    prepare.write_store([tmp_path / "a.txt"], tmp_path / "a.h5", str(sparse), None, "text", False)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["vocabulary"] = 4
    with pytest.raises(ConfigError, match="a.h5 holds the token 700, and the vocabulary of 4 has ids from 0 to 3"):
        store.Store(tmp_path / "a.h5")[np.arange(4)]
    with pytest.raises(ConfigError, match=r"a vocabulary of 4, and the ids .* go to 70000: make the store again"):
        data.read_corpus([str(tmp_path / "a.h5")], 0.5, 1, Grid(MPI.COMM_SELF))
    with store.Writer(tmp_path / "b.h5", Bytes(), []) as writer, pytest.raises(ConfigError, match="gave the token 256"):
        writer.add(np.array([0, 256]))


def test_lines_of_json_are_documents(tmp_path):
    lines = [{"text": "one"}, {"text": "zwei ä"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert call("prepare", tmp_path / "a.jsonl", tmp_path / "a.h5").returncode == 0
    opened = store.Store(tmp_path / "a.h5")
    assert [bytes(opened.document(i, 99)).decode() for i in range(2)] == ["one", "zwei ä"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": 1}\n')
    bad = call("prepare", tmp_path / "b.jsonl", tmp_path / "b.h5")
    assert bad.returncode == 1
    assert "b.jsonl, line 2: it must be a JSON object with a text 'text'; see --key" in bad.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.jsonl", "b.jsonl"]


def test_memory_does_not_grow_with_the_input(tmp_path):
    made(tmp_path / "warm.h5", ["x"])
    with (tmp_path / "large.txt").open("w") as file:
        for _ in range(40):
            file.write(TEXT * 25)
    size = (tmp_path / "large.txt").stat().st_size
    tracemalloc.start()
    prepare.write_store([tmp_path / "large.txt"], tmp_path / "large.h5", "bytes", None, "text", False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 50_000_000
    assert peak < 16_000_000


def test_a_reader_sees_tokens_documents_and_text(tmp_path, subwords):
    made(tmp_path / "a.h5", ["Line 1 of a text", "Line 2"], str(subwords))
    shown = call("inspect", tmp_path / "a.h5")
    assert shown.returncode == 0, shown.stderr
    assert "tokens (uint16)" in shown.stdout
    assert "documents   2, of 2 to" in shown.stdout
    assert f"vocabulary  300, tokenizer {subwords}" in shown.stdout
    assert "document 0\nLine 1 of a text" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "a.txt", "a.txt"], "give one or more inputs and then a store to write, which ends in .h5"),
        (["prepare", "nowhere", "b.h5"], "cannot read nowhere: No such file"),
        (["prepare", "a.txt", "a.h5"], "a.h5 exists: replace it with --overwrite"),
        (["prepare", "--tokenizer", "words", "a.txt", "b.h5"], "tokenizer words: No such file"),
        (["prepare", "--tokenizer", "a.txt", "a.txt", "b.h5"], "tokenizer a.txt is no JSON"),
        (["prepare", "--tokenizer", "a.json", "a.txt", "b.h5"], "a.json is no file of the package tokenizers"),
        (["prepare", "a.txt", "/proc/nowhere/b.h5"], "/proc/nowhere/b.h5 cannot be written"),
        (["inspect", "nowhere.h5"], "data.files: cannot read nowhere.h5: No such file"),
        (["inspect", "a.txt"], "data.files: cannot read a.txt: it is no HDF5 file"),
        (["inspect", "other.h5"], "other.h5 is no token store: make one with colossal-mpi data prepare"),
    ],
)
def test_what_cannot_be_says_so_in_a_line(tmp_path, monkeypatch, arguments, message):
    import h5py

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.h5").write_bytes(b"")
    with h5py.File("other.h5", "w") as file:
        file["tokens"] = [1, 2]
    result = call(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("colossal_mpi: error: ")
    assert message in result.stderr
    assert not (tmp_path / "b.h5").exists()


def test_a_tokenizer_without_its_package_names_the_extra(tmp_path, monkeypatch, subwords):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install colossal-mpi\[tokens\], or use bytes"):
        made(tmp_path / "a.h5", ["x"], str(subwords))


def test_a_flipped_bit_of_a_store_is_found(tmp_path):
    opened = made(tmp_path / "a.h5", [TEXT * 3])
    raw = bytearray((tmp_path / "a.h5").read_bytes())
    at = raw.find(b"Line 7 of")
    raw[at] ^= 1
    (tmp_path / "b.h5").write_bytes(raw)
    assert opened[np.arange(9)].tobytes() == b"Line 0 of"
    with pytest.raises(ConfigError, match="b.h5 is damaged in the tokens from 0 on"):
        store.Store(tmp_path / "b.h5")[np.arange(9)]


def test_stretches_and_joined_files_are_the_sequence(monkeypatch):
    whole = np.arange(1000)
    joined = Concatenated([whole[:7], whole[7:7], whole[7:450], whole[450:]])
    places = np.random.default_rng(0).integers(0, 1000, (5, 9))
    assert np.array_equal(joined[places], places)
    view = Stretches(joined, np.array([0, 2, 14]), 70)
    exact = np.concatenate([whole[:70], whole[140:210], whole[980:]])
    assert len(view) == len(exact)
    assert np.array_equal(view[np.arange(len(view))], exact)


@pytest.mark.grids({}, {"data": 2, "row": 2})
def test_text_store_and_array_make_the_same_batches(grid, shared_path, monkeypatch):
    monkeypatch.setattr(data, "_STRETCH", 512)
    if grid.rank == 0:
        made(shared_path / "a.h5", [TEXT])
        np.save(shared_path / "a.npy", np.frombuffer(TEXT.encode(), np.uint8))
    comm.collect(None, grid)
    batches = []
    for name in ("a.0.txt", "a.h5", "a.npy"):
        corpus = data.read_corpus([str(shared_path / name)], 0.2, 16, grid)
        parts = []
        for tokens in (corpus.train, corpus.validation):
            starts = sampling.random_starts(3, 12, len(tokens), 16, seed=1)
            layout = Layout("data" if "data" in grid.axes else None, None)
            parts += [array.gather() for array in sampling.sequences(tokens, starts, 16, grid, layout)]
        batches.append(
            (len(corpus.train), len(corpus.validation), *[part.tobytes() for part in parts if part is not None])
        )
    assert batches[0] == batches[1] == batches[2]


def test_what_a_corpus_cannot_be_of_is_refused(tmp_path, subwords):
    grid = Grid(MPI.COMM_SELF)
    made(tmp_path / "a.h5", [TEXT])
    made(tmp_path / "b.h5", [TEXT], str(subwords))
    for name, array in (("float", np.ones(5)), ("square", np.ones((2, 2), int)), ("below", np.array([1, -1]))):
        np.save(tmp_path / f"{name}.npy", array)
    for files, message in (
        (["a.h5", "a.0.txt"], "a.h5 holds tokens and .*a.0.txt text"),
        (["a.h5", "b.h5"], "stores of several tokenizers"),
        (["float.npy"], "float.npy holds float64 5: it must be integers in one dim"),
        (["square.npy"], "square.npy holds int64 2x2"),
        (["below.npy"], "below.npy holds numbers below 0"),
        (["nowhere.npy"], "cannot read .*nowhere.npy"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.read_corpus([str(tmp_path / name) for name in files], 0.1, 8, grid)
    corpus = data.read_corpus([str(tmp_path / "b.h5")], 0.1, 8, grid)
    with pytest.raises(
        ConfigError, match=r"tokens of a vocabulary of 300, and model.vocabulary=256: give it that many"
    ):
        data.require_vocabulary(corpus, 256, "model.vocabulary=256: give it that many")


def test_a_model_takes_the_vocabulary_of_its_store_unless_it_is_given_one(tmp_path, subwords):
    made(tmp_path / "b.h5", [TEXT], str(subwords))
    settings = [f"data.files=['{tmp_path}/b.h5']"]
    assert tasks.complete(configs.load("llama", settings)).model.vocabulary == 300
    assert tasks.complete(configs.load("llama", [*settings, "model.vocabulary=512"])).model.vocabulary == 512
    assert tasks.complete(configs.load("llama", [])).model.vocabulary == 256


def test_a_run_on_subwords_ends_with_text(tmp_path, monkeypatch, subwords):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "b.h5", [TEXT], str(subwords))
    settings = ["data.files=['b.h5']", "training.steps=2", "parallel.grid={ data = 1 }", "parallel.tensor=none"]
    settings += ["model.hidden=12", "model.layers=1", "model.context=8", "run.directory=run", "training.sample=5"]
    settings += ["training.evaluate_batches=1", "training.batch=2", "parallel.kernels=reference"]
    settings += ["run.peak_flops=1e9", "run.forecast=false", "run.report=false"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [*CLI, "train", "demo", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "held out of 1 documents, vocabulary 300" in result.stdout
    assert configs.load("run/config.toml").model.vocabulary == 300
    assert (tmp_path / "run" / "sample.txt").read_bytes().startswith(b"\nThe ")
    command = [*CLI, "generate", "run", "--prompt", "Line 7", "-n", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Line 7")
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text()) == json.loads(subwords.read_text())
