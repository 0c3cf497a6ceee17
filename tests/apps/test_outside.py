"""Token stores, texts, configurations and models from outside are checked before anything is built from them."""

import gc
import io
import json
import os
import zipfile

import h5py
import numpy as np
import pytest

from colossal_mpi import CheckpointError, ColossalError, ConfigError, Grid
from colossal_mpi.apps import config
from colossal_mpi.apps.data import formats, read_corpus
from colossal_mpi.apps.data.images import read_images
from colossal_mpi.apps.data.store import Store, Writer
from colossal_mpi.apps.data.tokenizer import Bytes, load_tokenizer
from colossal_mpi.apps.training.metadata import SavedSteps
from colossal_mpi.layers import Parallelism, models
from tests.core.test_files import COUNTS, damaged

TOKENS = np.random.default_rng(3).integers(0, 256, 9000)


def store(path, tokenizer=None):
    with Writer(path, tokenizer or Bytes(), ["a.txt", "b.txt"]) as writer:
        for part in np.split(TOKENS, [3000, 3000, 7000]):
            writer.add(part)
            writer.end()
    return path


def read(path):
    opened = Store(path)
    documents = [opened.document(number, 10**6) for number in range(opened.documents.shape[0])]
    return opened[np.arange(len(opened))], opened.tokenizer.text, opened.sources, documents


@pytest.fixture
def words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    made.save(str(tmp_path / "words.json"))
    return load_tokenizer(str(tmp_path / "words.json"))


@pytest.mark.parametrize("count", COUNTS)
def test_damage_to_a_token_store_is_never_read_as_other_tokens(tmp_path, words, count):
    path = store(tmp_path / "a.h5", words)
    intact, generator, expected = path.read_bytes(), np.random.default_rng(9), read(path)
    found = []
    for _ in range(count):
        path.write_bytes(intact)
        what = damaged(path, generator)
        try:
            tokens, text, sources, documents = read(path)
        except ColossalError as problem:
            found.append(str(problem))
        else:
            assert np.array_equal(tokens, TOKENS), what
            assert (text, sources) == expected[1:3], what
            assert all(map(np.array_equal, documents, expected[3])), what
    assert len(found) > count // 8  # most bytes of so short a store are padding
    assert not any("\n" in message for message in found)


def external_tokens(file):
    del file["tokens"]
    file["tokens"] = h5py.ExternalLink("secret.h5", "tokens")


def external_tokenizer(file):
    file.create_dataset("tokenizer", (64,), "u1", external=[("/etc/passwd", 0, 64)])


def absurd_length(file):
    del file["tokens"]
    file.create_dataset("tokens", (1 << 44,), "u1", chunks=(1 << 16,))


def large_chunk(file):
    del file["tokens"]
    made = file.create_dataset("tokens", (1 << 31,), "u1", chunks=(1 << 31,), compression="gzip")
    made.id.write_direct_chunk((0,), bytes(1 << 22))


def vocabulary(value):
    return lambda file: file.attrs.__setitem__("vocabulary", value)


def version(file):
    file.attrs["format_version"] = "new"


def nameless(file):
    del file.attrs["tokenizer"]


def odd_sources(file):
    file.attrs["sources"] = 5


def other_sources(file):
    file.attrs["sources"] = ["c.txt"]


def documents_beyond(file):
    file["documents"][-1] = 9001


def documents_back(file):
    file["documents"][1] = 2


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (external_tokens, "tokens is a link"),
        (external_tokenizer, "the elements of tokenizer lie in other files"),
        (absurd_length, "tokens claims 17,592,186,044,416 bytes"),
        (large_chunk, "tokens has chunks of 2,147,483,648 bytes"),
        (vocabulary(-5), "vocabulary: input should be greater than or equal to 1"),
        (vocabulary(10**15), "vocabulary: input should be less than or equal to 2147483648"),
        (vocabulary("x"), "vocabulary: input should be a valid integer"),
        (vocabulary(np.array([1, 2])), "vocabulary: input should be a valid integer"),
        (version, "format_version: input should be a valid integer"),
        (nameless, "tokenizer: field required"),
        (odd_sources, "sources: input should be a valid list"),
        (other_sources, "the checksum of tokenizer and sources differs"),
        (documents_beyond, "its documents end at 9001, and it has 9000 tokens"),
        (documents_back, "the ends of its documents do not ascend"),
    ],
)
def test_a_store_that_was_made_to_harm_is_refused(tmp_path, harm, message):
    store(tmp_path / "secret.h5")
    path = store(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        harm(file)
    with pytest.raises(ConfigError, match=f"a.h5 is damaged: {message}"):
        read_corpus([str(path)], 0.1, 8, Grid(row=1))


def test_a_store_without_checksums_is_read_with_a_word(tmp_path, capfd):
    path = store(tmp_path / "a.h5")
    read_corpus([str(path)], 0.1, 8, Grid(row=1))
    assert not capfd.readouterr().err
    gc.collect()  # the corpus keeps the store open
    with h5py.File(path, "a") as file:
        del file.attrs["crc32"], file["tokens"]
        file["tokens"] = TOKENS.astype(np.uint8)
    assert np.array_equal(read(path)[0], TOKENS)
    read_corpus([str(path)], 0.1, 8, Grid(row=1))
    assert "a.h5 lacks checksums: some damage would not be found" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a.h5", "a.npy", "a.toml", "a.json", "a.npz"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    path = str(tmp_path / name)
    os.mkfifo(path)
    read = {
        ".toml": lambda: config.load(path),
        ".json": lambda: load_tokenizer(path),
        ".npz": lambda: read_images([path], 0.2, Grid(row=1)),
    }.get(os.path.splitext(name)[1], lambda: read_corpus([path], 0.1, 8, Grid(row=1)))
    with pytest.raises(ConfigError, match="it is a pipe and must be a regular file"):
        read()


def test_a_text_may_be_a_pipe_that_a_program_writes_to_and_no_device(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_PATIENCE", 0.1)
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="it is a pipe, and no program wrote to it"):
        read_corpus([str(tmp_path / "a.txt")], 0.1, 8, Grid(row=1))
    with pytest.raises(ConfigError, match="it is a device and must be a regular file"):
        read_corpus(["/dev/zero"], 0.1, 8, Grid(row=1))
    reader = os.open(tmp_path / "a.txt", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "a.txt", os.O_WRONLY)
    os.write(writer, b"text " * 100)
    os.close(writer)
    assert len(read_corpus([str(tmp_path / "a.txt")], 0.1, 8, Grid(row=1)).train) == 450
    os.close(reader)


def test_packed_bombs_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    import gzip

    from colossal_mpi.apps.data import images

    monkeypatch.setattr(formats, "_UNPACKED", 1 << 16)
    monkeypatch.setattr(images, "_UNPACKED", 1 << 16)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"x" * (1 << 22))
    with pytest.raises(ConfigError, match="a.txt.gz unpacks to more than"):
        read_corpus([str(tmp_path / "a.txt.gz")], 0.1, 8, Grid(row=1))
    header = io.BytesIO()
    np.save(header, np.zeros((1 << 16, 8, 8), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(ConfigError, match=r"a.npz has [0-9,]+ bytes and unpacks to 4,194,432"):
        read_images([str(tmp_path / "a.npz")], 0.2, Grid(row=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 100_000, "nested deeper than 64"),
        ("[model]\nlayers = 1" + "0" * 5000, "is not valid TOML"),
        ("[model]\nlayers = 1000000000", "layers=1000000000 must be an integer from 0 to 10,000"),
        ("[model]\nhidden = 1000000000", "hidden=1000000000 must be an integer from 1 to 1,048,576"),
        ("#" + " " * (1 << 22), "it has 4,194,305 bytes and may have 4,194,304"),
    ],
)
def test_a_configuration_that_was_made_to_harm_is_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(str(tmp_path / "a.toml"))
    with pytest.raises(ConfigError, match="nested deeper than 64"):
        config.load("demo", ["model.layers=" + "[" * 100_000])


@pytest.fixture
def directory(tmp_path):
    made = models.GPTConfig(vocabulary=11, layers=1, hidden=6, heads=3, inner=5, positions=7)
    models.save_pretrained(models.GPT(made, Parallelism(Grid(row=1))), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**8},
        {"n_layer": -1},
        {"n_head": 0},
        {"n_head": 10**9},
        {"n_embd": 0},
        {"vocab_size": 10**15},
        {"n_inner": 10**13},
        {"layer_norm_epsilon": float("nan")},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused_before_it_is_built(directory, change):
    table = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* cannot be run: .* must be"):
        models.from_pretrained(directory, Parallelism(Grid(row=1)))
    ours = {"kind": "gpt", "vocabulary": 11, "layers": 10**8, "hidden": 6, "heads": 3}
    with pytest.raises(ConfigError, match="this is no configuration of a gpt: layers=100000000"):
        models.from_description(ours, Parallelism(Grid(row=1)))


def test_a_changed_file_of_weights_is_found_by_its_digest_and_sha256sum_reads_it(directory):
    import hashlib

    path = directory / "model.safetensors"
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  model.safetensors\n"
    assert (directory / "SHA256SUMS").read_text() == line
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged: its SHA-256 is not the one"):
        models.from_pretrained(directory, Parallelism(Grid(row=1)))
    (directory / "SHA256SUMS").write_text("no digest")
    with pytest.raises(CheckpointError, match="SHA256SUMS is damaged"):
        models.from_pretrained(directory, Parallelism(Grid(row=1)))
    (directory / "SHA256SUMS").unlink()
    models.from_pretrained(directory, Parallelism(Grid(row=1)))


@pytest.mark.parametrize("target", ["../x", "/etc/passwd", "..", "", "a\0b", 5])
def test_an_index_of_weights_names_files_beside_it_only(directory, target):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": target}}))
    with pytest.raises(CheckpointError, match="it maps no tensors to files beside it"):
        models.from_pretrained(directory, Parallelism(Grid(row=1)))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"step": -3}, "step"),
        ({"step": "x"}, "step"),
        ({"step": 1e300}, "step"),
        ({"optimizer": {"steps": "many", "loss_scale": None}}, "optimizer.steps"),
        ({"optimizer": {"steps": 1, "loss_scale": {"value": -1.0, "good": 0}}}, "optimizer.loss_scale.value"),
        ({"data": 3}, "data"),
    ],
)
def test_metadata_of_a_run_are_checked(tmp_path, change, key):
    with pytest.raises(CheckpointError, match=f"cannot be resumed: its metadata have {key}="):
        SavedSteps.of(tmp_path, {"step": 2, "config": {}, "optimizer": {"steps": 2, "loss_scale": None}} | change)
