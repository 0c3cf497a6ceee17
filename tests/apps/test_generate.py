"""``colossal-mpi generate`` prints the same text for a seed on any grid, from runs and from Hugging Face."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from mpi4py import MPI

from colossal_mpi import CheckpointError, Grid, checkpoint
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.cli import generate as generate_command
from colossal_mpi.apps.data import load_tokenizer
from colossal_mpi.apps.training import saved
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.layers import Parallelism, generate, models
from colossal_mpi.runtime.launcher import mpiexec_command
from tests import command_line

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "generate"]
MODEL = {"layers": 2, "hidden": 20, "heads": 5, "context": 12, "vocabulary": 259, "std": 0.3}
OPTIONS = ["--prompt", "The ", "--prompt", "An integer", "-n", "15", "--top-k", "40", "--seed", "3"]
OPTIONS += ["--kernels", "reference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of no steps, in float64, and its trainer."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    table = {"model": MODEL, "parallel": {"dtype": "float64"}}
    trainer = Trainer(configs.validate(table, "generate"), Grid(MPI.COMM_SELF))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").touch()
    trainer.save(folder / "checkpoints" / "step-0000000", 0)
    return folder, trainer


def start(ranks, *arguments):
    if ranks == 1:
        done = command_line.call("generate", *arguments)
        return replace(done, stdout=done.stdout.encode(), stderr=done.stderr.encode())
    command, env = mpiexec_command(ranks, [*CLI, *map(str, arguments)])
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120, check=False)


def test_the_same_text_on_any_grid(run):
    folder, trainer = run
    prompts = [list(text.encode()) for text in ("The ", "An integer")]
    exact = generate(trainer.model, prompts, 15, temperature=0.8, top_k=40, seed=3, vocabulary=256)
    text = "".join(bytes(a + b).decode(errors="replace") + "\n" for a, b in zip(prompts, exact, strict=True))
    grids = (["pipe=2,col=2", "--tensor", "1d"], ["data=3"], ["row=2,col=2", "--tensor", "2d"])
    for ranks, where in zip((4, 3, 4), grids, strict=True):
        result = start(ranks, folder, *OPTIONS, "--grid", *where)
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode() == text
    assert trainer.task.sample(5) == b"\nThe " + bytes(
        generate(trainer.model, [b"\nThe "], 5, temperature=0.8, vocabulary=256)[0]
    )


def test_a_directory_of_hugging_face_with_its_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    config = models.GPTConfig(vocabulary=300, layers=1, hidden=12, heads=3, positions=20, std=0.3)
    model = models.GPT(config, Parallelism(Grid(MPI.COMM_SELF)))
    models.save_pretrained(model, tmp_path / "hf", extra={"eos_token_id": 7})
    refused = start(1, tmp_path / "hf")
    assert b"has no tokenizer.json: give the tokenizer with --tokenizer FILE" in refused.stderr
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(290)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "hf" / "tokenizer.json"))
    whole = generate(model, [[5, 6]], 30, temperature=0.0, vocabulary=290)[0]
    end = whole[4]
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, end]}))
    result = start(1, tmp_path / "hf", "--prompt", "w5 w6", "-n", 30, "--temperature", 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == words.decode([5, 6, *whole[: whole.index(end) + 1]]) + "\n"
    staged = start(2, tmp_path / "hf", "--grid", "pipe=2")
    assert b"only a checkpoint is cut into stages; make one with convert --to cm" in staged.stderr


def blanks(kind):
    """Return the JSON of a tokenizer whose tokens begin with the blank before a word, as those of Llama 2 do."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "</s>": 1, "\u2581The": 2, "\u2581cat": 3, "s": 4, "\u2581": 5}
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=0))
    if kind == "legacy":
        parts = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        made.normalizer = tokenizers.normalizers.Sequence(parts)
        steps = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Fuse()]
        made.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<unk>", "</s>"])
    return made.to_str()


@pytest.mark.parametrize("kind", ["legacy", "metaspace"])
def test_a_continuation_keeps_its_blanks_and_leaves_special_tokens_out(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(blanks(kind))
    words = load_tokenizer(str(tmp_path / "tokenizer.json"))
    before = words.encode([b"The"], special=True)[0].tolist()
    assert before == [2]
    assert generate_command._continued(words, "The", before, [3, 4, 3, 1]) == "The cats cat"
    assert words.decode([2, 3, 1], special=True) == b"The cat</s>"


def test_what_a_decoder_does_between_prompt_and_continuation_is_kept(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    path.write_text(made.to_str())
    assert generate_command._continued(load_tokenizer(str(path)), "a ", [0], [1, 0]) == "a b a"
    steps = [tokenizers.decoders.Fuse(), tokenizers.decoders.Replace("ab", "x")]
    made.decoder = tokenizers.decoders.Sequence(steps)
    path.write_text(made.to_str())
    assert generate_command._continued(load_tokenizer(str(path)), "a", [0], [1]) == "x"


def test_the_tokens_that_end_a_text(tmp_path):
    path = tmp_path / "generation_config.json"
    for table, text, tokens in (
        ({"eos_token_id": 0}, "{}", [0]),
        ({"eos_token_id": 7}, '{"eos_token_id": [3, 0]}', [3, 0]),
        ({"eos_token_id": [7, 8]}, '{"eos_token_id": null}', [7, 8]),
        ({}, '{"temperature": 0.6}', []),
    ):
        path.write_text(text)
        assert models.end_tokens(table, models.find_settings(tmp_path)) == tokens
    for text, message in (
        ("{", f"{path} is damaged: it is no JSON object"),
        ('{"eos_token_id": "7"}', f"{path}: eos_token_id='7' must be an integer or a list of integers"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            models.end_tokens({}, models.find_settings(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], b"no checkpoint at nowhere"),
        (["RUN", "--tokenizer", "nowhere.json"], b"tokenizer nowhere.json: No such file or directory"),
        (["RUN", "--top-p", "0"], b"top_p above 0 and at most 1"),
        (["RUN", "--grid", "data=3"], b"Grid"),
    ],
)
def test_a_wrong_call_is_one_message(run, arguments, message):
    result = start(2, *(run[0] if word == "RUN" else word for word in arguments))
    assert result.returncode != 0
    assert result.stderr.count(b"colossal_mpi: error:") == 1, result.stderr
    assert message in result.stderr


def test_other_models_have_no_text(tmp_path):
    grid = Grid(MPI.COMM_SELF)
    model = models.Bert(models.BertConfig(vocabulary=9, layers=1, hidden=4, heads=2, positions=5), Parallelism(grid))
    checkpoint.save(
        tmp_path / "bert", saved.weights_by_name(model.parameters()), {"model": models.describe(model)}, grid
    )
    result = start(1, tmp_path / "bert")
    assert b"is a Bert: the models that generate text are GPT, Llama" in result.stderr
