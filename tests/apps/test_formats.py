"""A data file is read as what it is, or refused with what would work; binary files are no texts."""

import bz2
import gzip
import importlib.util
import io
import lzma
import struct
import sys
import zipfile

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, comm
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import data
from colossal_mpi.apps.data import store
from tests import command_line

IDS = np.random.default_rng(0).integers(0, 50257, 3000)
LINES = b'{"text": "one"}\r\n\r\n{"text": "zw\xc3\xb6lf"}\n' * 20
TEXT = "one\nzwölf\n".encode() * 20


def whole(path, **options):
    """Read a file as a corpus of which the middle stretches are held out, and return all tokens in order."""
    corpus = data.read_corpus([str(path)], 0.5, 1, Grid(MPI.COMM_SELF), **options)
    parts = [np.asarray(part[np.arange(len(part))]) for part in (corpus.train, corpus.validation)]
    return np.sort(np.concatenate(parts)), corpus.vocabulary


def llmc(ids, magic, version, dtype):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def megatron(code):
    return b"MMIDIDX\0\0" + struct.pack("<QB", 1, code) + bytes(16)


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"a.bin": llmc(IDS, 20240520, 1, "<u2")}, {}),
        ({"a.bin": llmc(IDS, 20240801, 7, "<u4")}, {}),
        ({"a.bin": IDS.astype("<u2").tobytes()}, {"dtype": "uint16"}),
        ({"a.tokens": IDS.astype("<i4").tobytes()}, {"dtype": "int32"}),
        ({"a.bin": IDS.astype("<u2").tobytes(), "a.idx": megatron(8)}, {}),
        ({"a.bin": IDS.astype("<i4").tobytes(), "a.idx": megatron(4)}, {}),
    ],
    ids=["llm.c-gpt2", "llm.c-llama3", "nanogpt", "int32", "megatron-u16", "megatron-i32"],
)
def test_files_of_tokens_give_their_tokens(tmp_path, files, options):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tokens, vocabulary = whole(tmp_path / next(iter(files)), **options)
    assert np.array_equal(tokens, np.sort(IDS))
    assert vocabulary == IDS.max() + 1


def test_a_name_in_capitals_or_without_a_suffix_hides_no_tokens(tmp_path):
    for name in ("a.NPY", "b"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, IDS.astype(">u2"))
        assert np.array_equal(whole(tmp_path / name)[0], np.sort(IDS))


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.txt.gz", gzip.compress), ("a.txt.bz2", bz2.compress), ("a.txt.xz", lzma.compress), ("a", gzip.compress)],
)
def test_a_packed_text_is_unpacked(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(TEXT[:70]) + pack(TEXT[70:]))
    assert whole(tmp_path / name)[0].tobytes() == bytes(sorted(TEXT))


def test_zstd_is_unpacked_where_a_package_for_it_is(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (TEXT[:70], TEXT[70:])]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert whole(tmp_path / "a.txt.zst")[0].tobytes() == bytes(sorted(TEXT))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES))
    assert whole(tmp_path / "a.jsonl.zst")[0].tobytes() == bytes(sorted(TEXT[:-1]))


def test_zstd_without_a_package_names_one(tmp_path, monkeypatch):
    if importlib.util.find_spec("compression"):
        pytest.skip("this Python unpacks zstd itself")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    with pytest.raises(ConfigError, match=r"a.txt.zst is compressed by zstd, .*: pip install zstandard, or unpack it"):
        whole(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.jsonl.gz", "bom.jsonl"])
def test_lines_of_json_are_documents_in_runs_and_stores(tmp_path, name):
    content = b"\xef\xbb\xbf" + LINES if name == "bom.jsonl" else LINES
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert whole(tmp_path / name)[0].tobytes() == bytes(sorted(TEXT[:-1]))
    made = command_line.call("data", "prepare", tmp_path / name, tmp_path / "a.h5")
    assert made.returncode == 0, made.stderr
    opened = store.Store(tmp_path / "a.h5")
    assert opened[np.arange(len(opened))].tobytes() == TEXT.replace(b"\n", b"")
    assert opened.documents.shape == (40,)


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a.npy", b"")
    return file.getvalue()


REFUSED = {
    "train.bin": (IDS.astype("<u2").tobytes(), r'no header of llm.c .*data.dtype="uint16" for files of nanoGPT'),
    "ascii.bin": (TEXT, r"no header of llm.c and no index of Megatron"),
    "short.bin": (llmc(IDS, 20240520, 1, "<u2")[:-2], "its header asks for 3000 tokens of uint16 after 1024 bytes"),
    "a.npz": (archive(), "a.npz is .npz or another zip archive: unpack it; save tokens with numpy.save"),
    "a.parquet": (b"PAR1" + bytes(99), "a Parquet file: write its texts as .jsonl"),
    "a.idx": (megatron(8), "the index of a Megatron data set: name the .bin beside it"),
    "a.dat": (bytes(range(1, 99)) + b"\0", r"no text in UTF-8 \(byte 0x00 at 98\).* or give data.dtype"),
    "latin.txt": ("Grüße".encode("latin-1"), r"byte 0xfc at 2\): convert it with iconv .*data.format = \"text\""),
    "wide.txt": ("Grüße".encode("utf-16"), "text in UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    "tokens.gz": (gzip.compress(IDS.astype("<u2").tobytes()), "no text in UTF-8"),
    "a.npy.gz": (gzip.compress(b"\x93NUMPY"), "a packed .npy: unpack it"),
    "cut.gz": (gzip.compress(TEXT)[:-9], "cannot read .*cut.gz: Compressed file ended"),
    "list.json": (b'[{"text": "a"}]', "not one JSON object in each line: write it so .*jq"),
    "pretty.json": (b'{\n "text": "a"\n}', "not one JSON object in each line"),
    "null.jsonl": (b'{"text": null}', "null.jsonl, line 1: it must be a JSON object with a text 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_known_is_refused_in_runs_and_stores(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data.files: " + f".*{message}"):
        whole(tmp_path / name)
    made = command_line.call("data", "prepare", tmp_path / name, tmp_path / "a.h5")
    assert made.returncode == 1
    assert len(made.stderr.splitlines()) == 1
    assert not (tmp_path / "a.h5").exists()


def test_the_bytes_of_any_file_are_text_where_the_user_says_so(tmp_path):
    content = IDS.astype("<u2").tobytes()
    (tmp_path / "train.bin").write_bytes(content)
    assert whole(tmp_path / "train.bin", choice="text")[0].tobytes() == bytes(sorted(content))
    words = ("data", "prepare", "--format", "text", tmp_path / "train.bin", tmp_path / "a.h5")
    assert command_line.call(*words).returncode == 0
    opened = store.Store(tmp_path / "a.h5")
    assert opened[np.arange(len(opened))].tobytes() == content


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("odd", "uint16", "odd has 3 bytes, and data.dtype asks for whole tokens of uint16"),
        ("a.txt", "uint16", "a.txt is no file of tokens by its name, for which data.dtype=uint16 is: leave it out"),
        ("llmc.bin", "uint32", "llmc.bin holds uint16 by its header, and data.dtype=uint32: leave it out"),
    ],
)
def test_a_dtype_that_does_not_fit_is_refused(tmp_path, name, dtype, message):
    (tmp_path / name).write_bytes(llmc(IDS, 20240520, 1, "<u2") if name == "llmc.bin" else b"abc")
    with pytest.raises(ConfigError, match=message):
        whole(tmp_path / name, dtype=dtype)
    with pytest.raises(ConfigError, match="dtype=uint16 is for tokens, and format=text for text: give one of them"):
        configs.load("demo", ["data.dtype=uint16", "data.format=text"])


@pytest.mark.grids({"data": 2})
def test_all_ranks_take_the_same_tokens_and_raise_the_same_error(grid, shared_path):
    if grid.rank == 0:
        (shared_path / "a.bin").write_bytes(llmc(IDS, 20240520, 1, "<u2"))
        (shared_path / "b.bin").write_bytes(IDS.tobytes())
    comm.collect(None, grid)
    corpus = data.read_corpus([str(shared_path / "a.bin")], 0.5, 1, grid)
    assert len(corpus.train) + len(corpus.validation) == len(IDS)
    with pytest.raises(ConfigError, match=r"b.bin has no header of llm.c"):
        data.read_corpus([str(shared_path / "b.bin")], 0.5, 1, grid)
